"""SequenceUnits: the device units of one running sequence, of each group of layers."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

from hicache_core.controller.controller import Controller
from hicache_core.engine.runner import HeldUnits, WindowPages
from hicache_core.errors import PoolExhausted
from hicache_core.kv.spec import Group, GroupKind
from hicache_core.radix.results import LACKING, InsertResult, Match, NewUnits, Units

CopyState = Callable[[int, int], None]
"""Copies a unit of the state over another."""


class SequenceUnits:
    """Holds units from admission to the end; owner thread only. Empty without groups.

    A unit is the tree's, and kept by the lock on a node, or the sequence's own until ``insert``
    takes it.

    Attributes:
        is_sent: as of ``PageTable``: units that the tree did not take stay until ``release``.
    """

    def __init__(
        self,
        cache: Controller,
        groups: Sequence[Group] = (),
        snapshot_interval: int = 1,
        *,
        keeps_answers: bool = True,
    ) -> None:
        """Starts empty; ``begin`` fills it.

        Args:
            cache: whose units it holds.
            groups: of the spec.
            snapshot_interval: a prompt keeps a snapshot of its state every so many tokens.
            keeps_answers: False for a model whose state is another one after an answer than after
                a prompt of the same tokens: then prompts are stored, and answers are not.
        """
        self._cache = cache
        self._keeps_answers = keeps_answers
        self._n_prompt = 0
        self.is_sent = False
        self._groups = tuple(groups)
        self._spares = [array("i") for _ in groups]
        self._snapshot_interval = snapshot_interval
        page_size = cache.page_size
        windows = [at for at, its in enumerate(groups) if its.kind is GroupKind.WINDOW]
        states = [at for at, its in enumerate(groups) if its.kind is GroupKind.STATE]
        every = -(-snapshot_interval // page_size) * page_size
        self._windows = [_Window(cache, at, groups[at].window) for at in windows]
        self._states = [_State(cache, at, every) for at in states]

    def another(self) -> SequenceUnits:
        """An empty one for the same groups."""
        return SequenceUnits(
            self._cache,
            self._groups,
            self._snapshot_interval,
            keeps_answers=self._keeps_answers,
        )

    def n_kept(self, n_tokens: int) -> int:
        """How many of the first ``n_tokens`` tokens, all computed, may be stored."""
        return n_tokens if self._keeps_answers else min(n_tokens, self._n_prompt)

    @property
    def has_windows(self) -> bool:
        """Whether pages leave windows while the sequence grows."""
        return bool(self._windows)

    @property
    def held(self) -> HeldUnits:
        """What a forward reads and writes."""
        windows = tuple(WindowPages(its.first, its.units) for its in self._windows)
        if not self._states:
            return HeldUnits(windows)
        (state,) = self._states
        return HeldUnits(windows, state.read, state.working)

    def held_of(self, group: int) -> WindowPages:
        """The pages of a window; of a state, the unit that changes with each forward."""
        for window in self._windows:
            if window.group == group:
                return WindowPages(window.first, window.units)
        (working,) = [state.working for state in self._states if state.group == group]
        return WindowPages(0, array("i", [working]))

    @property
    def n_held(self) -> list[int]:
        """Units of each group, shared ones included."""
        counts = [len(spares) for spares in self._spares]
        for window in self._windows:
            counts[window.group] += len(window.units)
        for state in self._states:
            counts[state.group] += state.n_held
        return counts

    @property
    def has_spares(self) -> bool:
        """Whether it keeps units beside those that the tree has for the same tokens."""
        return any(self._spares)

    def begin(self, match: Match, n_tokens: int) -> None:
        """Starts with a match that was loaded.

        Args:
            match: what ``load_back`` returned; its node is locked. Its ``own`` units go over.
            n_tokens: of the whole prompt.
        """
        self._n_prompt = n_tokens
        for at, units in enumerate(match.groups):
            own = match.own[at] if match.own else array("i")
            for window in self._windows:
                if window.group == at:
                    window.begin(units, own)
            for state in self._states:
                if state.group == at:
                    state.begin(units, own, match, n_tokens)

    def expect(self, n_tokens: int) -> None:
        """Makes room for what another node has of a whole prompt: each last window, and the state.

        All of it is the sequence's own, whatever the tree has of it. Once it is there, the
        sequence goes on with ``computed``, as if it had computed its prompt.

        Raises:
            PoolExhausted: a group has no room; what was taken before is held.
        """
        self._n_prompt = n_tokens
        for window in self._windows:
            window.expect(n_tokens)
        for state in self._states:
            state.expect(n_tokens)

    def extend(self, n_tokens: int) -> None:
        """Makes room for the tokens up to ``n_tokens``.

        Raises:
            PoolExhausted: a group has none; what was taken before is held.
        """
        for window in self._windows:
            window.extend(n_tokens)
        for state in self._states:
            state.extend()

    def next_stop(self, n_computed: int) -> int | None:
        """Where the next forward of a prompt must end at the latest; None for nowhere."""
        stops = [state.next_stop(n_computed) for state in self._states]
        return min(stops, default=None)

    def computed(self, n_tokens: int, copy: CopyState) -> None:
        """Takes a snapshot if the sequence ends with a page; ``n_tokens`` of it are computed."""
        for state in self._states:
            state.computed(n_tokens, copy, is_kept=self.n_kept(n_tokens) == n_tokens)

    def runs(self, n_pages: int) -> list[list[NewUnits]]:
        """Its own units of the first ``n_pages`` pages, for ``insert``."""
        runs: list[list[NewUnits]] = [[] for _ in self._groups]
        for window in self._windows:
            runs[window.group] = window.runs(n_pages)
        for state in self._states:
            runs[state.group] = state.runs(n_pages)
        return runs

    def stored(self, result: InsertResult, n_pages: int) -> None:
        """Goes on with what the tree has of the first ``n_pages`` pages; its own duplicates go."""
        for at, duplicates in enumerate(result.unit_duplicates):
            if self.is_sent:
                self._spares[at].extend(duplicates)
            else:
                self._cache.free_units(at, duplicates)
        for window in self._windows:
            window.stored(result.units[window.group], n_pages)
        for state in self._states:
            state.stored(n_pages)

    def leave(self, n_tokens: int) -> None:
        """Gives back what has left the windows of a sequence of ``n_tokens`` tokens."""
        for window in self._windows:
            window.leave(n_tokens)

    def release(self) -> None:
        """Gives everything back; what was stored stays in the cache as long as it may."""
        for window in self._windows:
            window.release()
        for state in self._states:
            state.release()
        if self.has_spares:
            for at, spares in enumerate(self._spares):
                self._cache.free_units(at, spares)
                self._spares[at] = array("i")
        self.is_sent = False


class _Window:
    """The pages of one window.

    ::

        pages    | have left | of the tree, kept by the lock | mine: not in the tree |
                             first
    """

    def __init__(self, cache: Controller, group: int, window: int) -> None:
        self.group = group
        self.first = 0
        self.units = array("i")
        self._cache = cache
        self._window = window
        self._mine: set[int] = set()

    def begin(self, units: Units, own: array[int]) -> None:
        self.first = units.first
        self.units = units.device[:]
        self._mine = set(own)

    def expect(self, n_tokens: int) -> None:
        self.first = self._first_needed(n_tokens)
        self.extend(n_tokens)

    def extend(self, n_tokens: int) -> None:
        n_missing = -(-n_tokens // self._cache.page_size) - self.first - len(self.units)
        if n_missing > 0:
            added = self._cache.allocate_units(self.group, n_missing)
            self.units.extend(added)
            self._mine.update(added)

    def runs(self, n_pages: int) -> list[NewUnits]:
        runs: list[NewUnits] = []
        for page, unit in enumerate(self.units[: max(0, n_pages - self.first)], self.first):
            if unit not in self._mine:
                continue
            if runs and runs[-1].first + len(runs[-1].device) == page:
                runs[-1].device.append(unit)
            else:
                runs.append(NewUnits(page, array("i", [unit])))
        return runs

    def stored(self, tree: Units, n_pages: int) -> None:
        behind = self.units[max(0, n_pages - self.first) :]
        assert tree.first + len(tree.device) == n_pages
        assert LACKING not in tree.device
        self.first, self.units = tree.first, tree.device + behind
        self._mine = set(behind)

    def _first_needed(self, n_tokens: int) -> int:
        """The first page of which the last whole page, which may be stored, needs something."""
        page_size = self._cache.page_size
        n_whole = n_tokens // page_size * page_size
        return max(0, n_whole - self._window + 1) // page_size

    def leave(self, n_tokens: int) -> None:
        """What the last whole page needs stays."""
        n_gone = self._first_needed(n_tokens) - self.first
        if n_gone > 0:
            self._free(self.units[:n_gone])
            self.first, self.units = self.first + n_gone, self.units[n_gone:]

    def release(self) -> None:
        self._free(self.units)
        self.first, self.units = 0, array("i")

    def _free(self, units: array[int]) -> None:
        mine = array("i", [unit for unit in units if unit in self._mine])
        self._mine.difference_update(mine)
        if mine:
            self._cache.free_units(self.group, mine)


class _State:
    """The state of a sequence: a unit of its own, and the snapshots that are not in the tree yet.

    The first forward reads the snapshot of the match and writes the sequence's own unit.

    Attributes:
        read: unit to go on from; ``LACKING`` at the beginning.
        working: unit of its own that changes with each forward; ``LACKING`` until ``extend``.
    """

    def __init__(self, cache: Controller, group: int, every: int) -> None:
        self.group = group
        self.read = self.working = LACKING
        self._cache = cache
        self._every = every
        self._snapshots: dict[int, int] = {}  # unit by boundary, in tokens
        self._stops: frozenset[int] = frozenset()
        self._n_prompt = 0
        self._latest = 0  # boundary of the snapshot that the next one replaces

    def begin(self, units: Units, own: array[int], match: Match, n_tokens: int) -> None:
        page_size = self._cache.page_size
        self.read = units.device[-1] if units.device else LACKING
        self._snapshots = {match.n_tokens: own[0]} if own else {}
        self._n_prompt = n_tokens
        uncut = min(match.n_uncut_tokens, n_tokens - 1) // page_size * page_size
        self._stops = frozenset({(n_tokens - 1) // page_size * page_size, uncut})

    @property
    def n_held(self) -> int:
        return int(self.working != LACKING) + len(self._snapshots)

    def expect(self, n_tokens: int) -> None:
        self._n_prompt = n_tokens
        self.extend()

    def extend(self) -> None:
        if self.working == LACKING:
            (self.working,) = self._cache.allocate_units(self.group, 1)

    def next_stop(self, n_computed: int) -> int:
        behind = (n_computed // self._every + 1) * self._every
        return min([behind, *(stop for stop in self._stops if stop > n_computed)])

    def computed(self, n_tokens: int, copy: CopyState, *, is_kept: bool) -> None:
        self.read = self.working
        if n_tokens % self._cache.page_size or not is_kept:
            return
        in_prompt = n_tokens < self._n_prompt
        stays = in_prompt and (n_tokens in self._stops or n_tokens % self._every == 0)
        unit = self._snapshots.pop(self._latest, LACKING) if not stays else LACKING
        if unit == LACKING:
            try:
                (unit,) = self._cache.allocate_units(self.group, 1)
            except PoolExhausted:  # a later one may find room; this boundary is no hit
                return
        copy(self.working, unit)
        self._snapshots[n_tokens] = unit
        if not stays:
            self._latest = n_tokens

    def runs(self, n_pages: int) -> list[NewUnits]:
        page_size = self._cache.page_size
        return [
            NewUnits(boundary // page_size - 1, array("i", [unit]))
            for boundary, unit in sorted(self._snapshots.items())
            if boundary <= n_pages * page_size
        ]

    def stored(self, n_pages: int) -> None:
        end = n_pages * self._cache.page_size
        self._snapshots = {at: unit for at, unit in self._snapshots.items() if at > end}

    def release(self) -> None:
        mine = array("i", self._snapshots.values())
        if self.working != LACKING:
            mine.append(self.working)
        if mine:
            self._cache.free_units(self.group, mine)
        self.read = self.working = LACKING
        self._snapshots, self._stops, self._n_prompt, self._latest = {}, frozenset(), 0, 0
