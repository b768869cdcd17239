"""A client in a process of its own; commands and answers are lines of JSON.

python -m tests.servers.mooncake_peer CONFIG
"""

import json
import os
import random
import sys

from hicache_mooncake import MooncakeBackend, MooncakeConfig

from hicache_core.types import BackendContext


def main() -> None:
    """Reads commands until stdin ends."""
    backend = MooncakeBackend(MooncakeConfig(**json.loads(sys.argv[1])), BackendContext("0" * 16))
    backend.open()
    memory = bytearray(8 * 2**20)
    view = memoryview(memory)
    backend.register_memory([view])
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        nbytes = command["nbytes"]
        keys = command["keys"]
        pages = [(view[n * nbytes : (n + 1) * nbytes],) for n in range(len(keys))]
        if command["do"] == "set":
            for page, seed in zip(pages, command["seeds"], strict=True):
                page[0][:] = random.Random(seed).randbytes(nbytes)
            answer: object = backend.batch_set(keys, pages)
        else:
            n_filled = backend.batch_get(keys, pages)
            answer = [
                page[0] == random.Random(seed).randbytes(nbytes)
                for page, seed in zip(pages[:n_filled], command["seeds"], strict=False)
            ]
        print(json.dumps(answer), flush=True)
    backend.close()
    os._exit(0)  # threads of the client may crash an orderly exit


if __name__ == "__main__":
    main()
