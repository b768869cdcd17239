"""What the demo's processes exchange: settings, turns and events, as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

TIERS = ("device", "host", "storage")


@dataclass(frozen=True, slots=True)
class DemoSettings:
    """What a process of the demo needs to know.

    Attributes:
        model: a folder with a transformers model, a GGUF file, or the name of packaged weights.
        max_new_tokens: tokens in an answer at most.
        threads: threads of torch.
        cache: the settings of ``HiCacheConfig`` by name.
        salt: cache salt of this run, so that turn 1 is cold even on a shared store.
        corrupt: overwrite a cached page on purpose, to show that the comparison can fail.
    """

    model: str
    max_new_tokens: int
    threads: int
    cache: Mapping[str, Any]
    salt: str
    corrupt: bool = False

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> DemoSettings:
        """The inverse of ``to_json``."""
        return cls(**json.loads(text))


@dataclass(frozen=True, slots=True)
class TurnPlan:
    """One turn of the demo.

    Attributes:
        number: from 1 on.
        question: what the user asks.
        tier: where the prefix is expected, one of ``TIERS``; empty if nothing is cached yet.
        label: what this turn shows, a few words.
        flush_device: empty the device tier first.
        other_user: a second conversation: shares the system prompt, and nothing else.
    """

    number: int
    question: str
    tier: str
    label: str
    flush_device: bool = False
    other_user: bool = False


@dataclass(frozen=True, slots=True)
class TurnRecord:
    """The result of a turn, with measured times in seconds.

    Attributes:
        turn: its number.
        pid: of the process that computed it.
        label: what it shows.
        tier: where the prefix was expected.
        question: of the user.
        answer: of the model, as text.
        prompt_tokens: tokens of the prompt.
        cached_tokens: by tier, where they were found when the turn began.
        new_tokens: tokens of the answer.
        ttft_s: time to the first token; matching, fetching and loading included.
        baseline_ttft_s: the same without any cache.
        decode_tokens_per_s: speed after the first token.
        baseline_decode_tokens_per_s: the same without any cache.
        identical: both gave the same tokens.
        logits_difference: largest absolute difference of the first token's logits.
        logits_margin: difference between the two largest logits of the baseline's first token.
    """

    turn: int
    pid: int
    label: str
    tier: str
    question: str
    answer: str
    prompt_tokens: int
    cached_tokens: Mapping[str, int]
    new_tokens: int
    ttft_s: float
    baseline_ttft_s: float
    decode_tokens_per_s: float
    baseline_decode_tokens_per_s: float
    identical: bool
    logits_difference: float
    logits_margin: float

    @property
    def as_expected(self) -> bool:
        """Whether the tier that the turn is about served tokens (a cold turn: none did)."""
        if not self.tier:
            return not any(self.cached_tokens.values())
        return self.cached_tokens[self.tier] > 0

    def public(self) -> dict[str, Any]:
        """The turn's entry in ``--json``."""
        return {
            "turn": self.turn,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": dict(self.cached_tokens),
            "ttft_s": self.ttft_s,
            "baseline_ttft_s": self.baseline_ttft_s,
            "identical": self.identical,
        }


@dataclass(frozen=True, slots=True)
class Step:
    """A process of the demo says what it is doing now."""

    text: str


@dataclass(frozen=True, slots=True)
class Note:
    """A process of the demo has done something that the reader should know."""

    text: str


@dataclass(frozen=True, slots=True)
class Facts:
    """What a process of the demo runs on."""

    pid: int
    model: str
    dtype: str
    in_force: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Failure:
    """A process of the demo cannot go on."""

    text: str


Event = Step | Note | Facts | TurnRecord | Failure
_EVENTS: dict[str, type[Event]] = {
    kind.__name__: kind for kind in (Step, Note, Facts, TurnRecord, Failure)
}


def to_line(event: Event) -> str:
    """An event as one line of JSON."""
    return json.dumps({"event": type(event).__name__, **asdict(event)})


def from_line(line: str) -> Event:
    """The inverse of ``to_line``."""
    fields = json.loads(line)
    return _EVENTS[fields.pop("event")](**fields)


@dataclass(slots=True)
class Outcome:
    """All that the demo found.

    Attributes:
        settings: with which it ran.
        turns: one record a turn, in order.
        facts: of each process.
        notes: what the processes reported, in order.
        elapsed_s: of the whole demo.
    """

    settings: DemoSettings
    turns: list[TurnRecord] = field(default_factory=list)
    facts: list[Facts] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    elapsed_s: float = 0.0

    def problems(self) -> list[str]:
        """What failed, one sentence each; empty if nothing did."""
        found = [
            f"turn {turn.turn}: the tokens differ from those computed without a cache"
            for turn in self.turns
            if not turn.identical
        ]
        for turn in self.turns:
            if not turn.as_expected:
                wanted = f"something from the {turn.tier} tier" if turn.tier else "nothing cached"
                got = ", ".join(f"{tier} {n}" for tier, n in turn.cached_tokens.items())
                found.append(f"turn {turn.turn}: expected {wanted}, found tokens: {got}")
        return found

    def public(self) -> dict[str, Any]:
        """The document of ``--json``."""
        return {"turns": [turn.public() for turn in self.turns], "summary": self.summary()}

    def summary(self) -> dict[str, Any]:
        """The values that concern the whole demo."""
        turns = self.turns
        backend = self.settings.cache.get("hicache_storage_backend")
        return {
            "identical": all(turn.identical for turn in turns),
            "as_expected": all(turn.as_expected for turn in turns),
            "comparison": COMPARISON,
            "prompt_tokens": sum(turn.prompt_tokens for turn in turns),
            "cached_tokens": {t: sum(turn.cached_tokens[t] for turn in turns) for t in TIERS},
            "ttft_s": sum(turn.ttft_s for turn in turns),
            "baseline_ttft_s": sum(turn.baseline_ttft_s for turn in turns),
            "largest_logits_difference": max((t.logits_difference for t in turns), default=0.0),
            "smallest_logits_margin": min((t.logits_margin for t in turns), default=0.0),
            "decode_tokens_per_s": _mean([t.decode_tokens_per_s for t in turns]),
            "baseline_decode_tokens_per_s": _mean([t.baseline_decode_tokens_per_s for t in turns]),
            "model": self.facts[0].model if self.facts else None,
            "dtype": self.facts[0].dtype if self.facts else None,
            "pids": [facts.pid for facts in self.facts],
            "backend": backend,
            "in_force": dict(self.facts[0].in_force) if self.facts else {},
            "threads": self.settings.threads,
            "max_new_tokens": self.settings.max_new_tokens,
            "answers": [turn.answer for turn in turns],
            "problems": self.problems(),
            "elapsed_s": self.elapsed_s,
        }


COMPARISON = (
    "float32; the baseline computes the whole prompt in one prefill without any cache; "
    "greedy tokens must be equal, one by one"
)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
