"""What keeps pages of SGLang apart that have one model's files and one pool's shape."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from hicache_core.integrations.sglang.namespace import arguments_of

GIVEN = {
    "revision": "a",
    "quantization": "fp8",
    "json_model_override_args": '{"rope_scaling": null}',
    "kv_cache_dtype": "fp8_e5m2",
    "quantization_param_path": "scales.json",
}


@pytest.mark.parametrize("name", GIVEN)
def test_an_argument_that_changes_pages_counts(name: str) -> None:
    given = arguments_of(SimpleNamespace(**{name: GIVEN[name]}), "")
    assert given == {name: GIVEN[name]}


def test_a_variant_counts_and_defaults_do_not() -> None:
    defaults = SimpleNamespace(revision=None, kv_cache_dtype="auto", json_model_override_args="{}")
    assert arguments_of(defaults, "") == {}
    assert arguments_of(None, "second weights") == {"variant": "second weights"}
