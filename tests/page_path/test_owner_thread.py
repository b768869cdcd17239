"""A cache belongs to one thread: every public method says so to another one."""

from __future__ import annotations

import inspect
from functools import partial

import pytest
import torch

from hicache_core.build.cache import HiCache
from hicache_core.config.settings import HiCacheConfig
from hicache_core.errors import WrongThread
from hicache_core.integrations.transformers import CachedModel
from hicache_core.kv.spec import KVSpec
from hicache_core.pools.device import DevicePool
from tests.unit.process.test_owner import elsewhere, in_a_child, raised_by

from .tiny_models import prompt_of, tiny_model

FOR_ALL_THREADS = {"snapshot", "explain", "recent", "check_integrity"}
METHODS = sorted(
    name
    for name, _ in inspect.getmembers(HiCache, inspect.isfunction)
    if not name.startswith("_") and name not in FOR_ALL_THREADS
)


def opened() -> HiCache:
    spec = KVSpec.mha(num_layers=1, num_heads=1, head_dim=4, dtype="float32", fingerprint="none")
    return HiCache(HiCacheConfig(page_size=4), spec, DevicePool(spec, 4, 8))


@pytest.mark.parametrize("method", METHODS)
def test_every_public_method_refuses_another_thread_before_it_does_anything(method: str) -> None:
    with opened() as cache:
        cache.poll()
        needed = [
            parameter
            for parameter in inspect.signature(getattr(cache, method)).parameters.values()
            if parameter.default is parameter.empty
        ]
        arguments = [None] * len(needed)
        assert isinstance(elsewhere(partial(getattr(cache, method), *arguments)), WrongThread)


def test_a_forked_child_gets_an_error_and_can_close() -> None:
    with opened() as cache:
        cache.poll()
        assert "open another one here" in in_a_child(lambda: raised_by(cache.poll))
        assert in_a_child(lambda: str(cache.close())) == "None"
        cache.poll()


def test_a_cached_model_refuses_another_thread_before_any_work() -> None:
    torch.manual_seed(0)
    model = tiny_model("llama")
    prompt = prompt_of(12)
    with CachedModel.open(model, HiCacheConfig(page_size=4), device_tokens=64) as cached:
        want = cached.generate(prompt, max_new_tokens=2, do_sample=False)

        def generate() -> None:
            assert cached.generate(prompt, max_new_tokens=2, do_sample=False).tokens == want.tokens

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model, "forward", None)
            assert isinstance(elsewhere(generate), WrongThread)
            assert "open another one here" in in_a_child(lambda: raised_by(generate))
        generate()
        cached.hand_over()
        assert elsewhere(generate) is None
        generate()
