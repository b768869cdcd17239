"""What is checked and measured on a GPU, in which order, and how long each part may take."""

from __future__ import annotations

from dataclasses import dataclass

TOTAL_S = 350
"""All parts together, their imports and what ends them included: below six minutes."""


@dataclass(frozen=True)
class Part:
    """A part, which runs in a process of its own: one that fails or hangs costs only itself.

    Attributes:
        name: of its module in this package, which has ``run(place)``.
        deadline_s: when its process is ended.
        what: what it shows.
    """

    name: str
    deadline_s: int
    what: str


PARTS = (
    Part("same_bytes", 70, "kernel and direct copies against a plain copy, byte for byte"),
    Part("streams", 30, "pinned memory, streams and events"),
    Part("bandwidth", 80, "GB/s of copies against one copy of the same bytes"),
    Part("overlap", 45, "loading layer by layer beside compute"),
    Part("ttft", 95, "time to first token of hits against prefill"),
    Part("trace", 30, "a trace of torch's profiler"),
)

NOT_MEASURED = "not measured on a GPU: a dry run on the CPU, with sizes shrunk"
