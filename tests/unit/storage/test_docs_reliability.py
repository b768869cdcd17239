"""``docs/reliability.md`` names every setting of guard and chain, with its default."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hicache_core.storage.chain.config import ChainConfig
from hicache_core.storage.guard.config import GuardConfig

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "reliability.md").read_text()
ROWS = {
    name: values[index].strip() if len(values) > index else ""
    for names, defaults in re.findall(r"^\| (`[^|]*) \| ([^|]*) \|", PAGE, re.MULTILINE)
    for index, name in enumerate(re.findall(r"`(\w+)`", names))
    for values in [defaults.split(",")]
}


@pytest.mark.parametrize("name", GuardConfig.model_fields)
def test_every_setting_of_the_guard_stands_there_with_its_default(name: str) -> None:
    assert float(ROWS[name]) == float(GuardConfig.model_fields[name].default)


@pytest.mark.parametrize("name", ChainConfig.model_fields)
def test_every_setting_of_a_chain_stands_there(name: str) -> None:
    default = ChainConfig.model_fields[name].default
    found = ROWS[name].strip("`").removesuffix(" MiB")
    if name.endswith("nbytes"):
        assert int(found) * 2**20 == default
    elif name == "links":
        assert found == "none"
    else:
        expected = f"{default:g}" if isinstance(default, float) else str(default).lower()
        assert found == expected
