"""Dynamo's index of KV events, in its own environment: run_dynamo.py ARGUMENTS

ARGUMENTS is JSON, a list of workers for ``SelectionService.upsert_worker``. Nothing else of Dynamo
runs: its listener subscribes to a server's events, and the index answers in this process.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from json_lines import Commands, serve


def start() -> Commands:
    """Subscribes to the events of all workers."""
    from dynamo.llm import SelectionService

    workers = json.loads(sys.argv[1])["workers"]
    loop = asyncio.new_event_loop()

    async def subscribe() -> Any:
        service = SelectionService(indexer_threads=1)
        for worker in workers:
            await service.upsert_worker(worker)
        return service

    service = loop.run_until_complete(subscribe())

    def find(token_ids: list[int], **named: Any) -> Any:
        """What the index knows of a prompt, worker by worker."""

        async def ask() -> Any:
            query = {"model_name": workers[0]["model_name"], "token_ids": token_ids, **named}
            return await service.overlap_scores(query)

        return loop.run_until_complete(ask())["workers"]

    return {"find": find}


if __name__ == "__main__":
    serve(start)
