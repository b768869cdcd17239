"""A script that ends, or raises, before it closes what it opened exits by itself."""

from __future__ import annotations

import subprocess
import sys

import pytest

CACHE = """
from hicache_core.build.cache import HiCache
from hicache_core.config.settings import HiCacheConfig
from hicache_core.kv.spec import KVSpec
from hicache_core.pools.device import DevicePool

spec = KVSpec.mha(num_layers=2, num_heads=1, head_dim=2, dtype="float32", fingerprint="x")
events = {"endpoint": "tcp://127.0.0.1:0"}
config = HiCacheConfig(
    page_size=4, hicache_status_port=0, hicache_storage_backend="memory", kv_events_config=events
)
cache = HiCache(config, spec, DevicePool(spec, 4, 16))
pages = cache.allocate(2)
result = cache.insert(range(8), pages)
cache.match_prefix(range(8))
"""

ENGINE = """
from hicache_core.config.settings import HiCacheConfig
from hicache_core.engine.engine import Engine, EngineConfig
from hicache_core.engine.request import Request, SamplingParams
from tests.engine.world import cache_config, model_of

config = cache_config(hicache_storage_backend="memory", hicache_status_port=0)
engine = Engine(model_of(), config, EngineConfig(device_tokens=512))
engine.open()
heard = []
engine.submit(Request("r", tuple(range(30)), SamplingParams(max_new_tokens=400)), heard.append)
while len(heard) < 3:
    pass
"""

ADAPTER = """
from hicache_core.integrations.transformers import CachedModel
from tests.engine.world import cache_config, model_of
import torch

config = cache_config(hicache_storage_backend="memory", hicache_status_port=0)
model = CachedModel.open(model_of().model, config, device_tokens=512)
model.generate(torch.arange(30)[None], max_new_tokens=4)
"""


@pytest.mark.parametrize("script", [CACHE, ENGINE, ADAPTER], ids=["cache", "engine", "adapter"])
def test_a_script_that_raises_before_it_closes_exits_with_its_error(script: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", f"{script}raise RuntimeError('of the user')"],
        check=False,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert ran.returncode == 1, ran.stderr
    assert "of the user" in ran.stderr, ran.stderr
    assert "Fatal" not in ran.stderr
    assert "terminate" not in ran.stderr
