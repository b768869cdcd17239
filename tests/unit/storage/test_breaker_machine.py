"""The breaker against a dumb model that keeps every call, under a virtual clock."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hicache_core.storage.guard.breaker import BreakerState, CallOutcome, CircuitBreaker, Ticket
from hicache_core.storage.guard.config import GuardConfig
from tests.unit.storage.virtual import Clock

CONFIG = GuardConfig(
    window_s=10, min_calls=3, error_rate=0.5, slow_rate=0.6, open_s=4, max_open_s=10,
    half_open_probes=2,
)  # fmt: skip
SLOW_S, ALLOWED_S = 1.0, 2.0


@dataclass(eq=False)
class Call:
    """One call, as the model sees it."""

    start: float
    probe: bool
    era: int
    hung: bool = False


@dataclass
class Model:
    """Keeps all; looks at the whole history each time."""

    state: str = "closed"
    era: int = 0
    opened_in_a_row: int = 0
    open_until: float = 0.0
    calls: list[Call] = field(default_factory=list)
    judged: list[tuple[float, bool, bool]] = field(default_factory=list)  # of this era
    successes: list[float] = field(default_factory=list)
    good_probes: int = 0

    def begin(self, now: float) -> Call | None:
        self.find_hanging(now)
        if self.state == "open" and now >= self.open_until:
            self.change("half_open")
        out = [call for call in self.calls if call.probe and call.era == self.era]
        if self.state == "open" or (self.state == "half_open" and len(out) + self.good_probes >= 2):
            return None
        call = Call(now, self.state == "half_open", self.era)
        self.calls.append(call)
        return call

    def end(self, call: Call, outcome: CallOutcome, now: float) -> None:
        self.calls.remove(call)
        if outcome is CallOutcome.OK:
            self.successes.append(now)
        if not call.hung and outcome is not CallOutcome.NOTHING:
            self.judge(call, outcome, now)

    def find_hanging(self, now: float) -> None:
        for call in self.calls:
            if not call.hung and now - call.start >= ALLOWED_S:
                call.hung = True
                self.judge(call, CallOutcome.TIMED_OUT, now)

    def judge(self, call: Call, outcome: CallOutcome, now: float) -> None:
        if call.era != self.era:
            return
        bad, slow = outcome is not CallOutcome.OK, now - call.start > SLOW_S
        if self.state == "half_open":
            if bad or slow:
                return self.open(now)
            self.good_probes += 1
            if self.good_probes == 2:
                self.opened_in_a_row = 0
                self.change("closed")
            return None
        self.judged.append((now, bad, slow))
        recent = [(b, s) for at, b, s in self.judged if at // 1 > now // 1 - 10]
        enough = len(recent) >= 3 and (bad or slow)
        late = outcome is CallOutcome.TIMED_OUT or (bad and now - call.start >= ALLOWED_S)
        if (
            (late and not any(at > call.start for at in self.successes))
            or (enough and sum(b for b, _ in recent) / len(recent) >= 0.5)
            or (enough and sum(s for _, s in recent) / len(recent) >= 0.6)
        ):
            self.open(now)
        return None

    def open(self, now: float) -> None:
        self.open_until = now + min(10, 4 * 2**self.opened_in_a_row)
        self.opened_in_a_row += 1
        self.change("open")

    def change(self, state: str) -> None:
        self.state = state
        self.era += 1
        self.judged.clear()
        self.good_probes = 0


class BreakerMachine(RuleBasedStateMachine):
    """Any order of calls, of ends and of time."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.breaker = CircuitBreaker(CONFIG, self.clock)
        self.model = Model()
        self.open_calls: list[tuple[Ticket, Call]] = []

    @rule()
    def begin(self) -> None:
        ticket = self.breaker.enter("get", SLOW_S, ALLOWED_S)
        call = self.model.begin(self.clock.now)
        assert (ticket is None) == (call is None)
        if ticket is not None and call is not None:
            assert ticket.probe == call.probe
            self.open_calls.append((ticket, call))

    @precondition(lambda self: self.open_calls)
    @rule(data=st.data(), outcome=st.sampled_from(CallOutcome))
    def end(self, data: st.DataObject, outcome: CallOutcome) -> None:
        n = data.draw(st.integers(0, len(self.open_calls) - 1))
        ticket, call = self.open_calls.pop(n)
        self.breaker.leave(ticket, outcome, "an error")
        self.model.end(call, outcome, self.clock.now)

    @rule(seconds=st.sampled_from((0.25, 0.5, 1.0, 2.0, 4.0, 10.0)))
    def pass_time(self, seconds: float) -> None:
        self.clock.now += seconds

    @invariant()
    def they_agree(self) -> None:
        view = self.breaker.view()
        assert view.state.value == self.model.state
        assert view.n_in_flight == len(self.open_calls)
        assert view.n_hanging == sum(call.hung for _, call in self.open_calls)
        if view.state is BreakerState.OPEN:
            assert view.next_probe_s == max(0.0, self.model.open_until - self.clock.now)


TestBreakerMachine = BreakerMachine.TestCase
TestBreakerMachine.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
