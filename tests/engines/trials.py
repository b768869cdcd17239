"""What each engine must stand over each of our stores: the same trials, told by name."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from tests.engines.scene import N_NEW, OTHER_PROMPTS, PROMPTS, Engine, wait_until
from tests.engines.stores import Store


@dataclass(frozen=True)
class Pair:
    """Two engines of one kind over one store, in processes of their own.

    Attributes:
        first: fills the store.
        second: knows of the store only.
        expected: what both answer to ``PROMPTS`` when nothing is cached.
    """

    first: Engine
    second: Engine
    expected: list[list[int]]

    def second_hits(self) -> list[int]:
        """How many tokens of each prompt the second finds; what it answers must be right."""
        return self.second.hits(self.expected)


def hits(pair: Pair) -> None:
    """What the first stored, the second hits."""
    assert pair.second_hits() == [pair.second.n_cached] * len(PROMPTS)


def damage(pair: Pair, store: Store) -> None:
    """A damaged page is refused and computed again, and so is every page."""
    everything = [pair.second.n_cached] * len(PROMPTS)
    pages = store.pages()
    store.damage(pages[0])
    one_short = pair.second_hits()
    assert sum(one_short) < sum(everything)
    assert max(one_short) == everything[0]
    for page in store.pages():
        store.damage(page)
    assert pair.second_hits() == [0] * len(PROMPTS)


def lose(pair: Pair, store: Store, hazard: str, *, within: bool) -> None:
    """A store that is killed or frozen, before a request or within one, costs hits alone.

    Args:
        pair: has filled the store.
        store: on a server; stays lost.
        hazard: ``kill`` or ``freeze``.
        within: whether requests run when it happens.
    """
    assert store.server is not None
    happen = getattr(store.server, hazard)
    if within:
        soon = threading.Timer(0.05, happen)
        soon.start()
        pair.second_hits()
        soon.join()
    else:
        happen()
    assert pair.second_hits() == [0] * len(PROMPTS)


def kill_the_first(pair: Pair, store: Store) -> None:
    """An engine that is killed while it stores leaves only right pages, which the second hits.

    Args:
        pair: its first engine ends here.
        store: can list.
    """
    before = set(store.pages())
    pair.first.child.send("generate", prompts=OTHER_PROMPTS, n_new=N_NEW)
    wait_until(lambda: bool(set(store.pages()) - before), "the first page is stored")
    pair.first.kill()
    tokens, found = pair.second.answers(OTHER_PROMPTS)
    assert sum(found) > 0
    for page in store.pages():
        store.damage(page)
    assert pair.second.answers(OTHER_PROMPTS) == (tokens, [0] * len(OTHER_PROMPTS))
