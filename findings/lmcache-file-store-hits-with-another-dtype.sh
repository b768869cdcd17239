#!/usr/bin/env bash
# LMCache 0.5.6, L2 adapter "fs": a chunk that a server with bfloat16 stored is a hit for a server with float16.
#
# One would guess that the dtype is part of the name of a chunk, or is checked at the load, since two servers of one model
# may share a folder. A file is named after model, rank, group and hash alone, and has no header. If the sizes agree, the
# load answers yes, and every value is another one: 1.0 in bfloat16 reads as 1.875 in float16.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" --quiet --disable-pip-version-check install torch==2.13.0 numpy==2.4.6 numba==0.68.1 \
  sortedcontainers==2.4.0 prometheus_client==0.26.0 py-cpuinfo==9.0.0 psutil==7.2.2 aiohttp==3.14.5 requests==2.34.2 \
  cachetools==8.0.2 pyyaml==6.0.4 cryptography==50.0.2 aiofiles==25.1.0 2>/dev/null
"$work/venv/bin/pip" --quiet --disable-pip-version-check install --no-deps lmcache==0.5.6 2>/dev/null
cd "$work"
LMCACHE_TRACK_USAGE=false LMCACHE_LOG_LEVEL=ERROR "$work/venv/bin/python" - <<'PY'
import os
import select

import torch
from lmcache.v1.distributed.api import ObjectKey
from lmcache.v1.distributed.l2_adapters.fs_l2_adapter import FSL2Adapter, FSL2AdapterConfig
from lmcache.v1.memory_management import MemoryObjMetadata, TensorMemoryObj


def buffer(tensor):
    described = MemoryObjMetadata(tensor.shape, tensor.dtype, tensor.data_ptr(), tensor.nbytes, ref_count=1)
    return TensorMemoryObj(tensor.view(torch.uint8), described, parent_allocator=None)


def finished(fd):
    assert select.select([fd], [], [], 10)[0]
    os.eventfd_read(fd)


def server():
    return FSL2Adapter(FSL2AdapterConfig.from_dict({"base_path": "chunks"}))


key = ObjectKey(bytes(32), "a/model", 0)
first = server()
task = first.submit_store_task([key], [buffer(torch.ones(1024, dtype=torch.bfloat16))])
finished(first.get_store_event_fd())
assert first.pop_completed_store_tasks()[task].is_successful()
first.close()

second, target = server(), torch.zeros(1024, dtype=torch.float16)
task = second.submit_load_task([key], [buffer(target)])
finished(second.get_load_event_fd())
hit = second.query_load_result(task).test(0)
second.close()
print(f"stored as bfloat16: 1.0; loaded as float16: hit {hit}, values {target.unique().tolist()}")
assert hit and target.unique().tolist() == [1.875], "the behaviour has changed"
PY
# Seen:
#   stored as bfloat16: 1.0; loaded as float16: hit True, values [1.875]
