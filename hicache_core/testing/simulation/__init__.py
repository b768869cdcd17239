"""Random lives of the very same controller under a virtual clock and a seeded executor.

``python -m hicache_core.testing.simulation --schedules N --seed S`` runs them. A schedule is a
function of its seed: requests, evictions, slow and failing and corrupting storage, skewed ranks,
crashes. Time passes only where the schedule says so, and after each step every invariant is
checked. Needs the extra ``simulation`` (torch, greenlet), unlike the rest of ``testing``.
"""
