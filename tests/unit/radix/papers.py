"""S3-FIFO and ARC as their papers have them: dumb caches of single objects."""

from __future__ import annotations

from collections import OrderedDict, deque


class PaperS3FIFO:
    """Algorithm 1 of «FIFO queues are all you need for cache eviction».

    An eviction ends with the first object that leaves the cache.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.small: deque[int] = deque()
        self.main: deque[int] = deque()
        self.ghost: OrderedDict[int, None] = OrderedDict()
        self.freq: dict[int, int] = {}

    @property
    def cached(self) -> set[int]:
        """What is in the cache."""
        return set(self.freq)

    def request(self, item: int) -> bool:
        """Read an object; returns whether it was there."""
        if item in self.freq:
            self.freq[item] = min(self.freq[item] + 1, 3)
            return True
        while len(self.freq) >= self.capacity:
            self.evict()
        if item in self.ghost:
            del self.ghost[item]
            self.main.append(item)
        else:
            self.small.append(item)
        self.freq[item] = 0
        return False

    def evict(self) -> None:
        """Take one object out."""
        n_before = len(self.freq)
        while len(self.freq) == n_before:
            if 10 * len(self.small) >= self.capacity or not self.main:
                self.evict_small()
            else:
                self.evict_main()

    def evict_small(self) -> None:
        """The oldest of the small queue goes to the main queue or to the ghosts."""
        item = self.small.popleft()
        if self.freq[item] > 1:
            self.freq[item] = 0
            self.main.append(item)
            return
        del self.freq[item]
        self.ghost[item] = None
        while len(self.ghost) > self.capacity * 9 // 10:
            self.ghost.popitem(last=False)

    def evict_main(self) -> None:
        """The oldest of the main queue gets another round or leaves."""
        item = self.main.popleft()
        if self.freq[item] > 0:
            self.freq[item] -= 1
            self.main.append(item)
        else:
            del self.freq[item]


class PaperARC:
    """ARC(c) of «ARC: a self-tuning, low overhead replacement cache», Figure 4.

    In one thing it is our order of events: REPLACE comes before the adaptation (in cases II and
    III), and does not know which object is to come.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.p = 0.0
        self.t1: OrderedDict[int, None] = OrderedDict()
        self.t2: OrderedDict[int, None] = OrderedDict()
        self.b1: OrderedDict[int, None] = OrderedDict()
        self.b2: OrderedDict[int, None] = OrderedDict()

    @property
    def cached(self) -> set[int]:
        """What is in the cache."""
        return {*self.t1, *self.t2}

    def request(self, item: int) -> bool:
        """Read an object; returns whether it was there."""
        for members in (self.t1, self.t2):
            if item in members:
                del members[item]
                self.t2[item] = None
                return True
        if item in self.b1:
            self.replace()
            self.p = min(self.capacity, self.p + max(1.0, len(self.b2) / len(self.b1)))
            del self.b1[item]
            self.t2[item] = None
        elif item in self.b2:
            self.replace()
            self.p = max(0.0, self.p - max(1.0, len(self.b1) / len(self.b2)))
            del self.b2[item]
            self.t2[item] = None
        else:
            self.make_room_for_a_new_one()
            self.t1[item] = None
        return False

    def make_room_for_a_new_one(self) -> None:
        """Case IV: the bounds of the first list, and of all four."""
        c = self.capacity
        first = len(self.t1) + len(self.b1)
        total = first + len(self.t2) + len(self.b2)
        if first == c:
            if len(self.t1) < c:
                self.b1.popitem(last=False)
                self.replace()
            else:
                self.t1.popitem(last=False)
        elif total >= c:
            if total == 2 * c:
                self.b2.popitem(last=False)
            self.replace()

    def replace(self) -> None:
        """The oldest of T1 or T2 becomes a ghost."""
        if len(self.cached) < self.capacity:
            return
        if self.t1 and (len(self.t1) > self.p or not self.t2):
            self.b1[self.t1.popitem(last=False)[0]] = None
        else:
            self.b2[self.t2.popitem(last=False)[0]] = None
