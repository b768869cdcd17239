"""A prefill or decode node takes rooms from its router alone."""

from __future__ import annotations

from typing import Any

import pytest

from hicache_core.config.settings import HiCacheConfig
from hicache_core.engine.request import Bootstrap
from hicache_core.kv_transfer.secret import MIN_LENGTH, room_proof
from hicache_core.server.access import Keys
from hicache_core.server.settings import Disaggregation, ServerSettings, with_secret
from tests.server.world import server

pytestmark = pytest.mark.anyio

SECRET = "only router and nodes know it"
ROOM = {"bootstrap_host": "10.0.0.7", "bootstrap_port": 7001, "bootstrap_room": 4711}
HERE = {**ROOM, "bootstrap_host": "127.0.0.1"}
PROOF = {"bootstrap_proof": room_proof(SECRET, "10.0.0.7", 7001, 4711)}


async def taken(
    fields: dict[str, Any], secret: str | None, mode: str = "decode"
) -> tuple[int, Bootstrap | None]:
    """The status, and the room that the engine was told."""
    half = Disaggregation(mode)
    async with server(keys=Keys(transfer=secret), disaggregation=half) as s:
        body = {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 1}, **fields}
        answer = await s.client.post("/generate", json=body)
        if answer.status_code == 403:
            assert "--disaggregation-secret" in answer.json()["error"]["message"]
        return answer.status_code, s.engine.received[-1].bootstrap if s.engine.received else None


@pytest.mark.parametrize("mode", ["prefill", "decode"])
async def test_a_room_with_the_routers_proof_is_taken(mode: str) -> None:
    assert await taken(ROOM | PROOF, SECRET, mode) == (200, Bootstrap("10.0.0.7", 7001, 4711))


@pytest.mark.parametrize(
    "fields",
    [
        ROOM,
        HERE,
        ROOM | {"bootstrap_proof": "0" * 64},
        ROOM | {"bootstrap_proof": "\ud7ff"},
        ROOM | PROOF | {"bootstrap_host": "10.0.0.8"},
        ROOM | PROOF | {"bootstrap_port": 7002},
        ROOM | PROOF | {"bootstrap_room": 4712},
    ],
)
@pytest.mark.parametrize("mode", ["prefill", "decode"])
async def test_a_room_without_a_proof_of_its_own_is_refused(
    fields: dict[str, Any], mode: str
) -> None:
    assert await taken(fields, SECRET, mode) == (403, None)


async def test_without_a_secret_rooms_are_on_this_very_machine() -> None:
    assert await taken(HERE, None) == (200, Bootstrap("127.0.0.1", 7001, 4711))
    for host in ("10.0.0.7", "169.254.169.254", "node", "127.0.0.1.example.org"):
        assert await taken({**ROOM, "bootstrap_host": host}, None) == (403, None)


async def test_a_server_that_is_no_half_of_a_pair_knows_no_rooms() -> None:
    assert await taken(ROOM, None, "null") == (200, None)


async def test_a_request_without_a_room_needs_no_proof() -> None:
    assert await taken({}, SECRET) == (200, None)


def settings(host: str, mode: str, secret: str | None = None) -> ServerSettings:
    keys, half = Keys(transfer=secret), Disaggregation(mode)
    return ServerSettings("tiny", HiCacheConfig(), keys=keys, host=host, disaggregation=half)


@pytest.mark.parametrize("mode", ["prefill", "decode"])
def test_a_node_that_others_can_reach_believes_nobody_unless_it_was_given_a_secret(
    mode: str,
) -> None:
    made = [with_secret(settings(host, mode)).keys.transfer for host in ("0.0.0.0", "node", "::")]
    assert len(set(made)) == 3
    assert all(secret is not None and len(secret) >= MIN_LENGTH for secret in made)
    assert with_secret(settings("0.0.0.0", mode, SECRET)).keys.transfer == SECRET
    for own_machine in ("127.0.0.1", "::1", "localhost"):
        assert with_secret(settings(own_machine, mode)).keys.transfer is None


def test_a_server_that_is_no_half_of_a_pair_needs_no_secret() -> None:
    assert with_secret(settings("0.0.0.0", "null")).keys.transfer is None
