"""What came out of a simulation: hits by tier, times, bytes moved, cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hicache_core.bench.result import percentile
from hicache_core.fleet.setting import GB, UNLIMITED, Prices, Setting
from hicache_core.types import CachedTokens

SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


@dataclass(frozen=True, slots=True)
class Served:
    """One request that was served.

    Attributes:
        number: of the request in the trace.
        server: number of the server.
        n_prompt: tokens of the prompt.
        n_output: tokens of the answer.
        cached: tokens of the prompt that the tiers had.
        arrived_s: when it came.
        first_s: when its first token was known.
        finished_s: when its last token was known.
    """

    number: int
    server: int
    n_prompt: int
    n_output: int
    cached: CachedTokens
    arrived_s: float
    first_s: float
    finished_s: float


@dataclass(frozen=True, slots=True)
class Result:
    """A simulation of one setting.

    Attributes:
        setting: of the fleet.
        served: all requests that were served, in the order of their end.
        n_refused: requests with more tokens than a device holds.
        n_computed_tokens: of prompts, on each server.
        moved_nbytes: bytes that went between tiers, of all servers.
        storage_nbytes: what the store had at the end.
        dropped_pages: pages that did not go down: no room on the host, or too many writes waiting.
    """

    setting: Setting
    served: Sequence[Served]
    n_refused: int
    n_computed_tokens: Sequence[int]
    moved_nbytes: dict[str, int]
    storage_nbytes: int
    dropped_pages: int

    @property
    def n_prompt_tokens(self) -> int:
        """Tokens of all prompts that were served."""
        return sum(one.n_prompt for one in self.served)

    @property
    def hit_tokens(self) -> dict[str, int]:
        """Tokens of prompts by the tier that had them."""
        return {
            tier: sum(getattr(one.cached, tier) for one in self.served)
            for tier in ("device", "host", "storage")
        }

    @property
    def hit_rate(self) -> float:
        """Share of the tokens of prompts that a tier had, from 0 to 1."""
        return sum(self.hit_tokens.values()) / (self.n_prompt_tokens or 1)

    @property
    def duration_s(self) -> float:
        """From the first arrival to the last answer."""
        ends = [one.finished_s for one in self.served]
        return max(ends, default=0.0) - min((one.arrived_s for one in self.served), default=0.0)

    def cost(self, prices: Prices) -> float:
        """What the fleet costs for its duration; a store without limit costs what it has."""
        setting = self.setting
        is_limited = setting.storage_gb < UNLIMITED
        stored_gb = setting.storage_gb if is_limited else self.storage_nbytes / GB
        server_hour = prices.server_hour + prices.host_gb_hour * setting.host_gb
        fleet_hour = setting.servers * server_hour + prices.storage_gb_hour * stored_gb
        return fleet_hour * self.duration_s / 3600

    def as_json(self, prices: Prices | None = None) -> dict[str, Any]:
        """The summary, as JSON values; with ``prices`` also what it costs."""
        n_prompt, hits = self.n_prompt_tokens, self.hit_tokens
        n_output = sum(one.n_output for one in self.served)
        found: dict[str, Any] = {
            "setting": self.setting.as_json(),
            "requests": len(self.served),
            "refused": self.n_refused,
            "prompt_tokens": n_prompt,
            "output_tokens": n_output,
            "hit_tokens": hits,
            "computed_tokens": sum(self.n_computed_tokens),
            "hit_rate": self.hit_rate,
            "hit_rates": {tier: n / (n_prompt or 1) for tier, n in hits.items()},
            "ttft_s": _spread([one.first_s - one.arrived_s for one in self.served]),
            "latency_s": _spread([one.finished_s - one.arrived_s for one in self.served]),
            "duration_s": self.duration_s,
            "moved_nbytes": self.moved_nbytes,
            "storage_nbytes": self.storage_nbytes,
            "dropped_pages": self.dropped_pages,
            "requests_by_server": self._by_server(),
        }
        if prices is not None:
            cost = self.cost(prices)
            per_million = 1e6 * cost / ((n_prompt + n_output) or 1)
            found |= {"cost": cost, "cost_per_million_tokens": per_million}
        return found

    def _by_server(self) -> list[int]:
        counts = [0] * self.setting.servers
        for one in self.served:
            counts[one.server] += 1
        return counts


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    found = {name: percentile(values, share) for name, share in SHARES.items()}
    return {"mean": sum(values) / len(values) if values else None, **found}
