"""Orders: what rank 0 of an engine was asked to do, as text for the other ranks."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

from hicache_core.controller.controller import Controller
from hicache_core.engine.request import Bootstrap, Request, SamplingParams, WantedLogprobs
from hicache_core.errors import ConfigError, HiCacheError
from hicache_core.observe.tracing import Origin
from hicache_core.types import Namespace

log = logging.getLogger(__name__)

ALLOWED_CALLS = (
    "attach_storage",
    "clear_storage",
    "detach_storage",
    "finish_prefetch",
    "flush",
    "reset",
    "set_policies",
    "warm",
)
"""Methods of the cache that every rank calls when the operator asks for one."""


@dataclass(frozen=True, slots=True)
class Add:
    """A request that was accepted.

    Attributes:
        request: what was asked.
        number: the requests are served in this order.
        seed: of its sampler.
        n_new_max: length of its answer at most.
    """

    request: Request
    number: int
    seed: int
    n_new_max: int


@dataclass(frozen=True, slots=True)
class Abort:
    """A request whose client left."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a cache method, one of ``ALLOWED_CALLS``.

    Attributes:
        method: its name.
        arguments: values that JSON knows.
    """

    method: str
    arguments: tuple[object, ...]


def call_of(method: str, arguments: tuple[object, ...]) -> Call:
    """Raises ConfigError: the method is not one of ``ALLOWED_CALLS``."""
    if method not in ALLOWED_CALLS:
        raise ConfigError(f"{method} is not for all ranks; {', '.join(ALLOWED_CALLS)} are")
    return Call(method, arguments)


def called(call: Call, cache: Controller) -> Any:
    """Calls the method and returns its result. Owner thread."""
    return getattr(cache, call.method)(*call.arguments)


def follow(call: Call, cache: Controller) -> None:
    """Calls the method on a rank other than 0, which answers no one. Owner thread."""
    try:
        called(call, cache)
    except HiCacheError as error:  # the same on rank 0, who tells
        log.warning("%s: %s", call.method, error)


Order: TypeAlias = Add | Abort | Call


@dataclass(frozen=True, slots=True)
class StepOrders:
    """What the ranks do before their next step.

    Attributes:
        orders: in the order of their arrival.
        closing: True if the engine ends as soon as its requests have ended.
        is_over: True if the time for that has passed, and the remaining requests are aborted.
        drain_s: seconds for the last writes.
    """

    orders: tuple[Order, ...] = ()
    closing: bool = False
    is_over: bool = False
    drain_s: float = 0.0


NOTHING = StepOrders()


def encode(given: StepOrders) -> str:
    """The orders as text; empty for ``NOTHING``."""
    if given == NOTHING:
        return ""
    orders = [[type(order).__name__, asdict(order)] for order in given.orders]
    return json.dumps([orders, given.closing, given.is_over, given.drain_s])


def decode(text: str) -> StepOrders:
    """The orders that ``encode`` turned into ``text``."""
    if not text:
        return NOTHING
    orders, closing, is_over, drain_s = json.loads(text)
    return StepOrders(
        tuple(_order(name, fields) for name, fields in orders), closing, is_over, drain_s
    )


def _order(name: str, fields: dict[str, Any]) -> Order:
    if name == Add.__name__:
        return Add(**{**fields, "request": _request(fields["request"])})
    if name == Call.__name__:
        return Call(fields["method"], tuple(fields["arguments"]))
    return Abort(**fields)


def _request(fields: dict[str, Any]) -> Request:
    sampling = fields["sampling"]
    for key in ("stop", "stop_token_ids"):
        sampling[key] = tuple(sampling[key])
    return Request(
        fields["request_id"],
        tuple(fields["tokens"]),
        SamplingParams(**sampling),
        Namespace(**fields["namespace"]),
        fields["priority"],
        fields["bootstrap"] and Bootstrap(**fields["bootstrap"]),
        fields["origin"] and Origin(**fields["origin"]),
        fields["logprobs"] and WantedLogprobs(**fields["logprobs"]),
    )
