"""The simulation finds bugs: each mutation breaks one rule, and few schedules suffice to see it.

The mutations are what went wrong for others: pages freed while a read may still write into them,
layers read too early, locks never given back, ranks that decide by their own clock.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from hicache_core.controller.attachment import Attachment
from hicache_core.controller.controller import Controller
from hicache_core.controller.groups import GroupPaths
from hicache_core.controller.jobs import Agreement, JobTable
from hicache_core.controller.load_back import LoadBack, LoadBackPath
from hicache_core.controller.parts import GroupParts, Parts
from hicache_core.controller.prefetch import PrefetchPath
from hicache_core.controller.prefetch_record import UnitRead
from hicache_core.controller.quarantine import Quarantine
from hicache_core.controller.storage_tier import StorageTier
from hicache_core.controller.unit_reads import Question, UnitReader
from hicache_core.controller.write_path import WritePath
from hicache_core.kv.keys import PageKeys
from hicache_core.kv.spec import Group, GroupKind
from hicache_core.pools.pins import PinnedUnits
from hicache_core.radix.holdings import Holdings
from hicache_core.radix.node import Node
from hicache_core.radix.results import Match, Units
from hicache_core.radix.tree import RadixTree
from hicache_core.storage.sealed import SealedBackend
from hicache_core.types import Namespace, Tier
from tests.simulation.__main__ import report
from tests.simulation.schedule import N_STEPS, run_schedule
from tests.simulation.trace import ScheduleFailed

Patch = pytest.MonkeyPatch


def found(ranks: int, groups: bool, n_schedules: int) -> ScheduleFailed:
    """The first failure among the schedules from seed 0 on."""
    for seed in range(n_schedules):
        try:
            run_schedule(seed, ranks=ranks, groups=groups)
        except ScheduleFailed as failure:
            return failure
    raise AssertionError(f"{n_schedules} schedules did not find the bug")


def pages_of_overdue_reads_are_freed(patch: Patch) -> None:
    def hold(self: Quarantine, job_id: int, pages: array[int], free: Any = None) -> None:
        (free or self._allocator.free)(pages)

    patch.setattr(Quarantine, "hold", hold)


def nobody_checks_the_seals(patch: Patch) -> None:
    def batch_get(self: SealedBackend, keys: Any, pages: Any) -> int:
        return self.inner.batch_get(keys, pages)

    patch.setattr(SealedBackend, "batch_get", batch_get)


def a_job_settles_twice(patch: Patch) -> None:
    agree = JobTable.agree

    def twice(self: JobTable, flag: int = 1) -> Agreement:
        settled, agreed = agree(self, flag)
        return Agreement(settled + settled, agreed)

    patch.setattr(JobTable, "agree", twice)


def a_store_never_unlocks(patch: Patch) -> None:
    patch.setattr(RadixTree, "unlock_host", lambda *_: None)


def layers_are_read_before_they_arrive(patch: Patch) -> None:
    patch.setattr(LoadBackPath, "wait_layer", lambda *_: None)


def a_copy_counts_before_it_has_ended(patch: Patch) -> None:
    def collect(self: JobTable) -> None:
        for copy in list(self._copies.values()):
            del self._copies[copy.job_id]
            self.report(copy.job_id, copy.n_pages)

    patch.setattr(JobTable, "collect_copies", collect)


def a_host_page_goes_while_it_is_read(patch: Patch) -> None:
    def spare(self: Node) -> bool:
        return (self.on_host and self.on_device) or self.may_drop_host()

    patch.setattr(Node, "may_spare_host", spare)


def a_page_too_many_counts_as_read(patch: Patch) -> None:
    settled = PrefetchPath._batch_settled

    def one_more(self: PrefetchPath, prefetch: Any, index: int, n_pages: int) -> None:
        n_wanted = len(prefetch.batches[index].host_pages)
        settled(self, prefetch, index, min(n_pages + 1, n_wanted))

    patch.setattr(PrefetchPath, "_batch_settled", one_more)


def tenants_share_their_pages(patch: Patch) -> None:
    patch.setattr("hicache_core.controller.controller.chain_seed", lambda _: b"")


def a_request_gives_up_by_the_clock_of_its_rank(patch: Patch) -> None:
    def ready(self: PrefetchPath, request_id: str) -> bool:
        prefetch = self._requests.get(request_id)
        if prefetch is None or prefetch.done or prefetch.given_up:
            return True
        if self._parts.clock() % 10 > 5:
            self._give_up(prefetch)
        return prefetch.given_up

    patch.setattr(PrefetchPath, "ready", ready)


def a_rank_with_nothing_to_say_stays_away(patch: Patch) -> None:
    agree = JobTable.agree

    def perhaps(self: JobTable, flag: int = 1) -> Agreement:
        return agree(self, flag) if self.has_reports else Agreement([], flag)

    patch.setattr(JobTable, "agree", perhaps)


def a_rank_settles_what_it_has_done_itself(patch: Patch) -> None:
    def alone(self: JobTable, flag: int = 1) -> Agreement:
        self._ranks.agree_min([flag] * (self._ranks.window or 1))
        done = sorted(self._reported.items())
        return Agreement(self._leave(done), flag)

    patch.setattr(JobTable, "agree", alone)


def a_failed_store_stays_stored(patch: Patch) -> None:
    settled = WritePath._batch_settled

    def forgets_to_unlock(self: WritePath, store: Any, *counts: int) -> None:
        if counts[0] == counts[1]:
            settled(self, store, *counts)

    patch.setattr(WritePath, "_batch_settled", forgets_to_unlock)


def a_failed_load_is_told_to_its_rank_only(patch: Patch) -> None:
    settled = LoadBackPath._settled

    def hushed(self: LoadBackPath, load_back: LoadBack, n_valid: int) -> None:
        before = self.n_failed
        settled(self, load_back, n_valid)
        if load_back.ticket.error is None:
            self.n_failed = before

    patch.setattr(LoadBackPath, "_settled", hushed)


def a_tier_loses_pages_in_silence(patch: Patch) -> None:
    tell = Parts.tell_removed

    def of_the_device_only(self: Parts, tier: Tier, node: Node, cause: str) -> None:
        if tier is Tier.DEVICE:
            tell(self, tier, node, cause)

    patch.setattr(Parts, "tell_removed", of_the_device_only)


def every_rank_stores_what_all_hold(patch: Patch) -> None:
    submit = StorageTier.submit_all

    def as_writer(self: StorageTier, attachment: Attachment, *job: Any) -> None:
        submit(self, replace(attachment, is_writer=True), *job)

    patch.setattr(StorageTier, "submit_all", as_writer)


def a_wait_does_not_wait(patch: Patch) -> None:
    patch.setattr(Controller, "_wait", lambda *_, **__: None)


def a_prompt_seems_longer_than_it_is(patch: Patch) -> None:
    record = Controller._record

    def twice(
        self: Controller,
        request_id: str,
        tokens: bytes,
        namespace: Namespace,
        match: Match,
        n_prompt: int,
    ) -> None:
        record(self, request_id, tokens, namespace, match, 2 * n_prompt)

    patch.setattr(Controller, "_record", twice)


MUTATIONS: dict[Callable[[Patch], None], tuple[int, str]] = {
    pages_of_overdue_reads_are_freed: (1, "own until drained|wrong bytes|one owner|allocated"),
    nobody_checks_the_seals: (1, "no wrong bytes"),
    a_job_settles_twice: (1, "settle once"),
    a_store_never_unlocks: (1, "rest|host lock|locked"),
    layers_are_read_before_they_arrive: (1, "no wrong bytes"),
    a_copy_counts_before_it_has_ended: (1, "no wrong bytes"),
    a_host_page_goes_while_it_is_read: (1, "own until drained|is there|no wrong bytes|in use"),
    a_page_too_many_counts_as_read: (1, "no wrong bytes"),
    a_tier_loses_pages_in_silence: (1, "journal"),
    a_wait_does_not_wait: (1, "no spinning"),
    a_prompt_seems_longer_than_it_is: (1, "explain adds up"),
    every_rank_stores_what_all_hold: (2, "one writer"),
    a_failed_load_is_told_to_its_rank_only: (2, "ranks agree|no wrong bytes|no hang"),
    tenants_share_their_pages: (1, "no wrong bytes"),
    a_failed_store_stays_stored: (1, "rest"),
    a_request_gives_up_by_the_clock_of_its_rank: (2, "ranks agree"),
    a_rank_with_nothing_to_say_stays_away: (2, "no hang"),
    a_rank_settles_what_it_has_done_itself: (2, "ranks agree|no hang"),
}
"""What is broken, on how many ranks it is looked for, and what is found."""


def a_unit_counts_before_it_has_arrived(patch: Patch) -> None:
    settled = UnitReader._settled

    def all_of_it(self: UnitReader, read: UnitRead, then: Any, _: int) -> None:
        settled(self, read, then, len(read.units))

    patch.setattr(UnitReader, "_settled", all_of_it)


def a_match_is_not_cut(patch: Patch) -> None:
    patch.setattr(Holdings, "cover", lambda *_, **__: True)


def a_window_is_a_page_short(patch: Patch) -> None:
    needed = Group.first_needed

    def one_later(self: Group, n_pages: int, page_size: int) -> int:
        return min(needed(self, n_pages, page_size) + 1, max(n_pages - 1, 0))

    patch.setattr(Group, "first_needed", one_later)


def a_split_moves_the_snapshot(patch: Patch) -> None:
    split = Holdings.split

    def to_the_upper_part(self: Holdings, upper: Node, node: Node) -> None:
        split(self, upper, node)
        holding = self.get(node)
        if self.group.kind is GroupKind.STATE and holding is not None and not holding.host:
            units = holding.device
            assert units is not None
            self.device.pin(units)
            self.drop_device(node)
            self.device._let_go.discard(units[0])
            self.device.unpin(units)
            self.gain_device(upper, units)

    patch.setattr(Holdings, "split", to_the_upper_part)


def a_snapshot_is_stored_as_that_of_the_first_page(patch: Patch) -> None:
    def of_the_first(
        self: GroupPaths, group: GroupParts, node: Node, storage: Attachment
    ) -> PageKeys:
        at = self._parts.groups.index(group)
        assert node.parent is not None
        parent = self._parts.tree.last_digest(node.parent)
        page_size = self._parts.page_size
        keys = PageKeys(storage.group_namespaces[at], node.tokens, page_size, parent)
        return keys[:1] if group.held.group.kind is GroupKind.STATE else keys

    patch.setattr(GroupPaths, "_keys", of_the_first)


def a_unit_is_free_while_a_call_reads_it(patch: Patch) -> None:
    def at_once(self: PinnedUnits, units: array[int]) -> None:
        self._allocator.free(units)

    patch.setattr(PinnedUnits, "free", at_once)


def a_unit_is_free_while_a_load_fills_it(patch: Patch) -> None:
    load, loaded = GroupPaths._load, GroupPaths._loaded

    def unpinned(self: GroupPaths, group: GroupParts, *rest: Any) -> Units:
        found = load(self, group, *rest)
        group.held.device.unpin(rest[-1])
        return found

    def pinned(self: GroupPaths, load: Any, n_copied: int) -> None:
        load.group.held.device.pin(load.device_units)
        loaded(self, load, n_copied)

    patch.setattr(GroupPaths, "_load", unpinned)
    patch.setattr(GroupPaths, "_loaded", pinned)


def units_are_read_before_they_arrive(patch: Patch) -> None:
    patch.setattr(GroupPaths, "wait_layer", lambda *_: None)


def a_lock_of_units_is_not_taken_back(patch: Patch) -> None:
    patch.setattr(Holdings, "unlock", lambda *_: None)


def a_prefix_locks_no_units(patch: Patch) -> None:
    patch.setattr(Holdings, "lock", lambda *_: None)
    patch.setattr(Holdings, "unlock", lambda *_: None)


def a_failed_load_of_units_is_told_to_its_rank_only(patch: Patch) -> None:
    loaded = GroupPaths._loaded

    def hushed(self: GroupPaths, load: Any, n_copied: int) -> None:
        before = self.n_failed
        loaded(self, load, n_copied)
        if load.ticket.error is None:
            self.n_failed = before

    patch.setattr(GroupPaths, "_loaded", hushed)


def a_rank_reads_the_units_that_it_has_found_itself(patch: Patch) -> None:
    n_more, start = Question.n_more, UnitReader.start
    mine: dict[int, int] = {}

    def noted(self: Question, mask: Any, *limit: Any) -> tuple[int, str]:
        mine[id(self._asked[0].group)] = self.reached + n_more(self, mask)[0]
        return n_more(self, mask, *limit)

    def alone(self: UnitReader, reads: Any, *rest: Any) -> bool:
        reads.boundary = mine.get(id(self._parts.groups[0]), reads.boundary)
        return start(self, reads, *rest)

    patch.setattr(Question, "n_more", noted)
    patch.setattr(UnitReader, "start", alone)


OF_GROUPS: dict[Callable[[Patch], None], tuple[int, str]] = {
    a_unit_counts_before_it_has_arrived: (1, "no wrong bytes|own until drained"),
    a_match_is_not_cut: (1, "every group"),
    a_window_is_a_page_short: (1, "every group"),
    a_split_moves_the_snapshot: (1, "no wrong bytes|every group"),
    a_snapshot_is_stored_as_that_of_the_first_page: (1, "no wrong bytes"),
    a_unit_is_free_while_a_call_reads_it: (1, "own until drained|no wrong bytes|one owner|owned"),
    a_unit_is_free_while_a_load_fills_it: (1, "own until drained|no wrong bytes|one owner"),
    units_are_read_before_they_arrive: (1, "no wrong bytes"),
    a_lock_of_units_is_not_taken_back: (1, "locked"),
    a_prefix_locks_no_units: (1, "locked: units|one owner|every group"),
    a_failed_load_of_units_is_told_to_its_rank_only: (2, "ranks agree|no wrong bytes|no hang"),
    a_rank_reads_the_units_that_it_has_found_itself: (2, "ranks agree|no hang"),
}


@pytest.mark.parametrize("mutation", MUTATIONS | OF_GROUPS, ids=lambda it: it.__name__)
def test_a_mutation_is_found(mutation: Callable[[Patch], None], monkeypatch: Patch) -> None:
    groups = mutation in OF_GROUPS
    ranks, invariant = (MUTATIONS | OF_GROUPS)[mutation]
    mutation(monkeypatch)
    failure = found(ranks, groups, 600)
    print(failure.seed, failure.reason)
    with pytest.raises(ScheduleFailed, match=invariant) as again:
        run_schedule(failure.seed, ranks=ranks, groups=groups)
    assert again.value.trace == failure.trace, "a schedule is a function of its seed"
    text = report(failure, ranks, groups, N_STEPS)
    option = "groups" if groups else "no-groups"
    assert f"--seed {failure.seed} --ranks {ranks} --{option}" in text
