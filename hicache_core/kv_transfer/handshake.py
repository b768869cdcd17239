"""The handshake of two nodes: it checks that their models agree, and who sends which heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hicache_core.config.hosts import as_reached, joined
from hicache_core.errors import PeerRefused, TransferError
from hicache_core.kv_transfer.page_memory import Heads, PageMemory
from hicache_core.kv_transfer.wire import PROTOCOL

MAX_RANKS = 256


@dataclass(frozen=True, slots=True)
class Welcome:
    """What a sender tells a receiver about itself.

    Attributes:
        heads: of the model that the sender has.
        carrier: the greeting of its carrier.
        others: addresses of the other ranks of its node.
    """

    heads: Heads
    carrier: dict[str, Any]
    others: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Want:
    """What a receiver asks a sender for.

    Attributes:
        heads: of the model; None to ask this sender for no rows.
        start: position of the first token.
        stop: position after the last token.
        rank: of the receiver.
        n_receivers: number of ranks that receive this room.
    """

    heads: Heads | None
    start: int
    stop: int
    rank: int
    n_receivers: int


def hello_of(memory: PageMemory, rank: int, world_size: int) -> dict[str, Any]:
    """The first message of a receiver, as JSON.

    Args:
        memory: page memory of the receiver.
        rank: its rank.
        world_size: number of ranks of its node.
    """
    return {
        "protocol": PROTOCOL,
        "identity": memory.identity(),
        "rank": rank,
        "world_size": world_size,
    }


def check_hello(hello: dict[str, Any], memory: PageMemory) -> None:
    """Checks that a receiver may have rows of ``memory``.

    Raises:
        PeerRefused: its protocol version, model, dtype, page size or layers differ; the message
            names each difference.
    """
    if hello.get("protocol") != PROTOCOL:
        raise PeerRefused(
            f"the decode node speaks version {hello.get('protocol')} of the transfer protocol, the "
            f"prefill node version {PROTOCOL}; run the same version of hicache-core on both"
        )
    theirs, ours = hello.get("identity"), memory.identity()
    if not isinstance(theirs, dict):
        raise PeerRefused("the decode node did not say what it holds")
    differences = [
        f"{name} is {theirs.get(name)} on the decode node and {value} on the prefill node"
        for name, value in ours.items()
        if theirs.get(name) != value
    ]
    if differences:
        raise PeerRefused(
            "; ".join(differences) + "; start both nodes with the same model and --page-size"
        )


def welcome_of(
    memory: PageMemory, carrier: dict[str, Any], others: Sequence[str]
) -> dict[str, Any]:
    """The content of a WELCOME frame, as JSON.

    Args:
        memory: page memory of the sender.
        carrier: the greeting of its carrier.
        others: addresses of the other ranks of its node.
    """
    return {"heads": list(memory.heads), "carrier": carrier, "others": list(others)}


def welcomed_of(value: dict[str, Any], address: str) -> Welcome:
    """Reads the WELCOME of the sender at ``address``.

    If another rank's address cannot be used from here, the host of this sender replaces it.

    Raises:
        TransferError: the message is malformed.
    """
    host = address.rpartition(":")[0]
    try:
        start, stop = (int(head) for head in value["heads"])
        others = [str(other).rpartition(":") for other in value.get("others", [])]
        carrier = dict(value["carrier"])
        if len(others) >= MAX_RANKS or not all(port.isdigit() for _, _, port in others):
            raise ValueError(f"other ranks at {value['others']}")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise TransferError(f"{address} sent a malformed welcome: {error}") from error
    return Welcome(
        (start, stop),
        carrier,
        tuple(joined(as_reached(theirs, host), port) for theirs, _, port in others),
    )


def want_of(heads: Heads | None, tokens: tuple[int, int]) -> dict[str, Any]:
    """The content of a WANT frame, as JSON."""
    return {"heads": heads, "start": tokens[0], "stop": tokens[1]}


def wanted_of(value: dict[str, Any], hello: dict[str, Any], memory: PageMemory) -> Want:
    """Reads a WANT.

    Args:
        value: the JSON object.
        hello: the first message of the same receiver.
        memory: page memory of the sender.

    Raises:
        TransferError: the message is malformed, or asks for rows that are not here.
    """
    heads = value.get("heads")
    rank, n_receivers = hello.get("rank"), hello.get("world_size")
    numbers = [value.get("start"), value.get("stop"), rank, n_receivers]
    numbers += heads if isinstance(heads, list) else []
    is_plain = all(type(number) is int and number >= 0 for number in numbers)
    if not (is_plain and isinstance(heads, list | None)):
        raise TransferError("a malformed want")
    if heads is None:
        chosen = None
    else:
        first, last = memory.heads
        if len(heads) != 2 or not first <= heads[0] < heads[1] <= last:
            raise TransferError(f"asked for heads {heads}; {(first, last)} are here")
        chosen = (heads[0], heads[1])
    assert isinstance(rank, int)  # checked above, for the reader of types
    assert isinstance(n_receivers, int)
    if not rank < n_receivers <= MAX_RANKS:
        raise TransferError(f"rank {rank} of {n_receivers} asked; up to {MAX_RANKS} may")
    return Want(chosen, value["start"], value["stop"], rank, n_receivers)


def divide(missing: Sequence[Heads], offered: Heads) -> tuple[Heads | None, list[Heads]]:
    """Which heads to ask a sender of ``offered`` for, and which are still missing then.

    ::

        missing   |-----------|
        offered         |-----------|
        asked           |-----|
        left      |-----|

    Senders may hold the same heads (a latent, or more ranks than heads): the first one asked sends.
    One range is asked for; if a sender could fill two holes, the others that hold them are asked.
    """
    for index, (start, stop) in enumerate(missing):
        low, high = max(start, offered[0]), min(stop, offered[1])
        if low < high:
            left = [*missing[:index], *missing[index + 1 :]]
            if start < low:
                left.append((start, low))
            if high < stop:
                left.append((high, stop))
            return (low, high), sorted(left)
    return None, list(missing)
