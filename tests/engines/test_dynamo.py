"""Dynamo's index of KV events follows a server: it knows what a request is then served from."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.engines.child import Child
from tests.engines.environments import running
from tests.server.process import ServerProcess, server_process
from tests.servers.process import free_port

pytestmark = [pytest.mark.full, pytest.mark.timeout(300)]

DYNAMO = "dynamo-1.6.1"
PAGE = 8
IN_TIME_S = 60.0
"""Events are told in far less."""
LATER = itertools.count(1000)
"""Numbers of prompts that no test uses otherwise."""
SALTS = {
    "none": {},
    "tenant-1": {"cache_salt": "tenant-1"},
    "tenant-2": {"cache_salt": "tenant-2"},
}


def prompt(number: int, n_pages: int = 4) -> list[int]:
    """A prompt of whole pages and a rest; no two share a page."""
    draw = random.Random(number)
    return [draw.randrange(3, 90) for _ in range(n_pages * PAGE + 3)]


@dataclass(frozen=True)
class Addresses:
    """Where a server publishes, also when it is started again."""

    events: str
    replays: str

    @classmethod
    def free(cls) -> Addresses:
        return cls(*(f"tcp://127.0.0.1:{free_port()}" for _ in range(2)))

    @contextlib.contextmanager
    def server(self, model: Path, *flags: str) -> Iterator[ServerProcess]:
        config = {"endpoint": self.events, "replay_endpoint": self.replays}
        flags = ("--page-size", str(PAGE), "--kv-events-config", json.dumps(config), *flags)
        with server_process(model, ["--enable-hierarchical-cache", *flags]) as process:
            yield process


@dataclass(frozen=True)
class Index:
    """Dynamo's, of one worker."""

    child: Child

    def tokens(self, token_ids: list[int], **named: Any) -> dict[str, int]:
        """How many tokens of a prompt each tier has, behind those of the tier above it."""
        (found,) = self.child.ask("find", token_ids=token_ids, **named)
        device = found["device_blocks"]
        host = max(0, found["host_pinned_blocks"] - device)
        storage = max(0, found["disk_blocks"] - device - host)
        return {"device": device * PAGE, "host": host * PAGE, "storage": storage * PAGE}

    def has(self, token_ids: list[int], *mediums: str, within_s: float = IN_TIME_S) -> bool:
        """Whether, in time, these tiers are known to have all whole pages of a prompt."""
        until = time.monotonic() + within_s
        while True:
            (found,) = self.child.ask("find", token_ids=token_ids)
            if all(found[f"{each}_blocks"] == len(token_ids) // PAGE for each in mediums):
                return True
            if time.monotonic() > until:
                return False
            time.sleep(0.02)


@contextlib.contextmanager
def index_of(addresses: Addresses, url: str, folder: Path) -> Iterator[Index]:
    """An index that has subscribed."""
    worker = {
        "worker_id": 1,
        "model_name": "m",
        "block_size": PAGE,
        "endpoint": url,
        "kv_events_endpoint": addresses.events,
        "replay_endpoint": addresses.replays,
    }
    with running(DYNAMO, folder, {"workers": [worker]}) as (child,):
        yield Index(child)


def served(server: ServerProcess, token_ids: list[int], **named: Any) -> dict[str, int]:
    """Computes a prompt; the tokens that each tier had of it."""
    body = {"input_ids": token_ids, "sampling_params": {"max_new_tokens": 0}, **named}
    answer = httpx.post(f"{server.url}/generate", json=body, timeout=60).raise_for_status()
    details: dict[str, int] = answer.json()["meta_info"]["cached_tokens_details"]
    return details


def caught_up(server: ServerProcess, index: Index) -> None:
    """Returns when the index has heard of all that the server did; a new prompt is the last.

    A subscriber that has just connected may miss messages, and asks for them at the next one.
    """
    until = time.monotonic() + IN_TIME_S
    while True:
        last = prompt(next(LATER), 1)
        served(server, last)
        if index.has(last, "device", "host_pinned", within_s=3.0):
            return
        assert time.monotonic() < until


def test_the_index_knows_what_a_request_is_then_served_from(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """Also of prompts from before it subscribed, of shared prefixes, and of what was evicted."""
    addresses = Addresses.free()
    sizes = ("--max-total-tokens", str(16 * PAGE), "--hicache-ratio", "2")
    with addresses.server(tiny_folder, *sizes) as server:
        served(server, prompt(0))
        with index_of(addresses, server.url, tmp_path) as index:
            prompts = [prompt(number) for number in range(10)]
            prompts += [prompts[9][: 2 * PAGE] + prompt(20, 2)]
            tiers = set()
            for each in [*prompts[1:], *prompts, *reversed(prompts)]:
                caught_up(server, index)
                told = index.tokens(each)
                assert served(server, each) == told
                tiers.update(tier for tier, n in told.items() if n)
                tiers.update({"none"} if not any(told.values()) else set())
    assert tiers == {"none", "device", "host"}


def test_a_salted_prompt_is_found_by_its_salt_alone(tiny_folder: Path, tmp_path: Path) -> None:
    addresses = Addresses.free()
    with (
        addresses.server(tiny_folder, "--max-total-tokens", "1024") as server,
        index_of(addresses, server.url, tmp_path) as index,
    ):
        nothing = {"device": 0, "host": 0, "storage": 0}
        everything = {**nothing, "device": 4 * PAGE}
        assert served(server, prompt(1), cache_salt="tenant-1") == nothing
        caught_up(server, index)
        told = {salt: index.tokens(prompt(1), **named) for salt, named in SALTS.items()}
        assert told == {"none": nothing, "tenant-1": everything, "tenant-2": nothing}
        for salt, named in SALTS.items():
            assert served(server, prompt(1), **named) == told[salt]


def test_the_index_forgets_what_a_server_had_before_it_was_started_again(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """It is told of pages in storage when the new server finds them there."""
    addresses = Addresses.free()
    extra = json.dumps({"path": str(tmp_path / "store"), "prefetch_threshold": PAGE})
    flags = ["--max-total-tokens", "1024", "--hicache-storage-backend", "file"]
    flags += ["--hicache-storage-backend-extra-config", extra]
    flags += ["--hicache-storage-prefetch-policy", "wait_complete"]
    with contextlib.ExitStack() as closed_later:
        with addresses.server(tiny_folder, *flags) as server:
            index = closed_later.enter_context(index_of(addresses, server.url, tmp_path))
            served(server, prompt(1))
            caught_up(server, index)
            assert index.has(prompt(1), "device", "host_pinned", "disk")
        with addresses.server(tiny_folder, *flags) as server:  # the first one was killed
            caught_up(server, index)
            assert index.tokens(prompt(1)) == {"device": 0, "host": 0, "storage": 0}
            assert served(server, prompt(1)) == {"device": 0, "host": 0, "storage": 4 * PAGE}
            assert index.has(prompt(1), "device", "host_pinned", "disk")
            assert served(server, prompt(1)) == index.tokens(prompt(1))
