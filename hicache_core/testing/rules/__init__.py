"""The rules of the kit, in the order in which they are run.

A rule is one function with one sentence. Later rules build on earlier ones and name them in
``needs``: when those do not pass, the later ones are not run, so that one defect is one failure.
"""

from __future__ import annotations

from hicache_core.testing.rules import (
    capabilities,
    data,
    each,
    lifetime,
    model,
    races,
    retention,
    seal,
    server,
    sharing,
    sizes,
)
from hicache_core.testing.rules.rule import Rule

RULES: tuple[Rule, ...] = (
    *lifetime.OPENING,
    *data.RULES,
    *sizes.RULES,
    *each.RULES,
    *lifetime.RULES,
    *races.RULES,
    *sharing.RULES,
    *capabilities.ASKING,
    *capabilities.RULES,
    *races.DELETING,
    *seal.RULES,
    *retention.RULES,
    *server.RULES,
    *each.FULL,
    *model.RULES,
)
"""Every rule; ids are unique and stable."""
