"""SGLang's own host pools, controller and file store around our backend, without an engine.

In SGLang's environment: sglang_pools.py FOLDER
"""

from __future__ import annotations

import hashlib
import inspect
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from json_lines import Commands, serve

PAGE_SIZE = 16
N_PAGES = 12
CAPACITY = 4 * N_PAGES * PAGE_SIZE
CLASS = {
    "backend_name": "hicache",
    "module_path": "hicache_core.integrations.sglang",
    "class_name": "HiCacheBackend",
}


def start() -> Commands:
    """Publishes the settings that SGLang's pools look up, as its processes do."""
    from sglang.srt import runtime_context
    from sglang.srt.server_args import ServerArgs

    runtime_context.publish(ServerArgs(model_path="dummy", device="cpu"), role="test")
    ranks = {"tp_rank": 0, "pp_rank": 0, "attn_tp_rank": 0, "attn_cp_rank": 0}
    runtime_context.get_parallel().override_permanently(**ranks)
    folder = Path(sys.argv[1])
    world = World(folder)
    return {
        "round_trip": world.round_trip,
        "stored_under": world.stored_under,
        "one_writer": world.one_writer,
        "side_pools": world.side_pools,
        "refusal": world.refusal,
        "stats": world.stats,
        "class_for_sglang": world.class_for_sglang,
    }


class World:
    """Backends on stores below a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._n_stores = 0

    def round_trip(self, kind: str, layout: str, writer: str, reader: str) -> dict[str, Any]:
        """One backend stores ``N_PAGES`` pages and another reads them, through SGLang's controller.

        Args:
            kind: of the host pool: ``heads`` or ``latent``.
            layout: of the host pool.
            writer: ``v1`` or ``tensors``.
            reader: likewise.
        """
        path = self._new_store()
        pool = host_pool(kind, layout)
        mla = kind == "latent"
        first = self.backend(pool, path, interface_v1=writer == "v1", is_mla_model=mla)
        keys = hashes("round trip")
        source, target = slots(range(N_PAGES)), slots(range(N_PAGES, 2 * N_PAGES))
        absent = first.batch_exists(keys)
        stored = page_set(first, pool, writer)(keys, source)
        stored_again = page_set(first, pool, writer)(keys, source)
        first.close()
        second = self.backend(pool, path, interface_v1=reader == "v1", is_mla_model=mla)
        found = second.batch_exists([*keys, *hashes("another")])
        n_read = page_get(second, pool, reader)(keys, target)
        n_behind_gap = page_get(second, pool, reader)([*hashes("another")[:1], *keys[:1]], target)
        second.close()
        return {
            "absent": absent,
            "stored": [stored, stored_again],
            "found": found,
            "read": [n_read, n_behind_gap],
            "equal": [content(pool, n) == content(pool, N_PAGES + n) for n in range(N_PAGES)],
        }

    def stored_under(self) -> list[str]:
        """The first part of the keys of a pool with heads and of one with latent attention."""
        prefixes = []
        for kind in ("heads", "latent"):
            pool = host_pool(kind, "page_first")
            backend = self.backend(pool, self._new_store(), True, is_mla_model=kind == "latent")
            prefixes.append(backend._store._pools["kv"].prefix)
            backend.close()
        return prefixes

    def one_writer(self) -> dict[str, Any]:
        """Two TP ranks of a model with latent attention: what each stores, and reads."""
        path = self._new_store()
        pool = host_pool("latent", "page_first")
        ranks = [
            self.backend(pool, path, interface_v1=True, is_mla_model=True, tp_rank=rank, tp_size=2)
            for rank in (0, 1)
        ]
        keys = hashes("one writer")
        stored = []
        for rank in (1, 0):
            answer = ranks[rank].batch_set_v1(keys, slots(range(N_PAGES)))
            stored.append([all(answer), ranks[rank].batch_exists(keys)])
        read = ranks[1].batch_get_v1(keys, slots(range(N_PAGES, 2 * N_PAGES)))
        for rank in ranks:
            rank.close()
        return {"stored": stored, "read": sum(read)}

    def side_pools(self, seed: int, n_stores: int, layout: str) -> dict[str, Any]:
        """Our interface for several pools beside that of SGLang's ``HiCacheFile``.

        Both get the same pages of random stores, and the same questions.

        Returns:
            How many answers were compared, and those that differ.
        """
        layers = {"kv": 4, "swa": 2, "draft": 1}
        pools = {name: host_pool("heads", layout, n) for name, n in layers.items()}
        chance = random.Random(seed)
        n_compared, different = 0, []
        for n in range(n_stores):
            theirs, ours = self._file_store(pools), self._our_store(pools)
            for question in Questions(chance, f"{seed} {n}").all():
                answers = comparable(*(question(store, pools) for store in (theirs, ours)))
                n_compared += answers[0] is not None
                if answers[0] != answers[1]:
                    different.append([str(answer) for answer in answers])
            ours.close()
        return {"compared": n_compared, "different": different}

    def refusal(
        self, extra: dict[str, Any], layout: str, version: str | None = None, **ranks: Any
    ) -> str:
        """The sentence with which attaching fails; empty if it does not."""
        from hicache_core.integrations.sglang import backend

        true_version = backend.sglang_version
        backend.sglang_version = version or true_version
        pool = host_pool("heads", "page_first")
        pool.layout = layout
        try:
            self.backend(pool, self._new_store(), True, extra, **ranks).close()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        finally:
            backend.sglang_version = true_version
        return ""

    def stats(self) -> list[Any]:
        """SGLang's metrics collector takes what we count."""
        from sglang.srt.observability.metrics_collector import StorageMetricsCollector

        pool = host_pool("heads", "page_first")
        backend = self.backend(pool, self._new_store(), interface_v1=True)
        backend.batch_set_v1(hashes("stats"), slots(range(N_PAGES)))
        moved = backend.get_stats()
        StorageMetricsCollector({"storage_backend": "dynamic"}).log_storage_metrics(moved)
        cleared = [backend.clear(), backend.batch_exists(hashes("stats"))]
        backend.close()
        return [moved.backup_pgs, len(moved.backup_bandwidth), moved.prefetch_pgs, *cleared]

    def class_for_sglang(
        self, module: str, class_name: str, n_pages: int, **extra: Any
    ) -> dict[str, Any]:
        """A class written for SGLang behind our seal and guard: the other way round.

        Args:
            module: of the class; an answer of {} says that it is not installed.
            class_name: its name.
            n_pages: how many pages are stored; as many others are asked for.
            extra: the class's own keys.
        """
        import importlib.util

        from hicache_core.integrations.foreign.namespace import ForeignNamespace
        from hicache_core.integrations.foreign.opening import open_store

        if importlib.util.find_spec(module.partition(".")[0]) is None:
            return {}
        named = {"backend_name": "theirs", "module_path": module, "class_name": class_name}
        nbytes = 4096
        store = open_store("dynamic", {**named, **extra}, object_nbytes=nbytes)
        namespace = ForeignNamespace("a test", "1", "a model", "flat", 16, nbytes)
        keys = [namespace.key(bytes.fromhex(key)) for key in hashes(class_name)[: 2 * n_pages]]
        pages = [[memoryview(bytearray(random.randbytes(nbytes)))] for _ in keys[:n_pages]]
        targets = [[memoryview(bytearray(nbytes))] for _ in pages]
        stored = store.write(keys[:n_pages], pages)
        found = store.exists(keys)
        read = store.read(keys[:n_pages], targets)
        store.close()
        return {
            "stored": sum(stored.mask),
            "found": sum(found.mask),
            "read": sum(read.mask),
            "equal": [bytes(page[0]) for page in pages] == [bytes(page[0]) for page in targets],
            "errors": [answer.error for answer in (stored, found, read) if answer.error],
        }

    def backend(
        self, pool: Any, path: Path, interface_v1: bool, extra: Any = None, **changed: Any
    ) -> Any:
        """Our backend, made and registered as SGLang's controller does."""
        from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig
        from sglang.srt.mem_cache.storage.backend_factory import StorageBackendFactory

        settings = {"backend": "file", "backend_config": {"path": str(path)}, **(extra or {})}
        ranks = {
            "tp_rank": 0,
            "tp_size": 1,
            "pp_rank": 0,
            "pp_size": 1,
            "attn_cp_rank": 0,
            "attn_cp_size": 1,
        }
        config = HiCacheStorageConfig(
            **ranks
            | {
                "is_mla_model": False,
                "enable_storage_metrics": True,
                "is_page_first_layout": pool.layout == "page_first",
                "model_name": "a model",
                "extra_config": CLASS | settings | {"interface_v1": int(interface_v1)},
            }
            | changed
        )
        made = StorageBackendFactory.create_backend("dynamic", config, pool)
        made.register_mem_pool_host(pool)
        return made

    def _our_store(self, pools: dict[str, Any]) -> Any:
        return registered(self.backend(pools["kv"], self._new_store(), interface_v1=True), pools)

    def _file_store(self, pools: dict[str, Any]) -> Any:
        from sglang.srt.mem_cache.hicache_storage import HiCacheFile, HiCacheStorageConfig

        config = HiCacheStorageConfig(0, 1, 0, 1, 0, 1, False, False, True, "a model")
        store = HiCacheFile(config, str(self._new_store()))
        store.register_mem_pool_host(pools["kv"])
        return registered(store, pools)

    def _new_store(self) -> Path:
        self._n_stores += 1
        return self._folder / f"store-{self._n_stores}"


def registered(store: Any, pools: dict[str, Any]) -> Any:
    """A store that knows all pools, as SGLang's controller of several pools tells it."""
    from sglang.srt.mem_cache.hicache_storage import PoolName

    for name, pool in pools.items():
        store.register_mem_host_pool_v2(pool, PoolName(name))
    return store


def comparable(theirs: Any, ours: Any) -> list[Any]:
    """Answers to the same question; 0.5.22 does not say which shorter prefixes are restorable."""
    if getattr(theirs, "restorable_prefix_pages", ()) is None:
        ours.restorable_prefix_pages = None
    return [theirs, ours]


class Questions:
    """Writes, questions and reads with gaps: functions of a store that give what it answers."""

    def __init__(self, chance: random.Random, name: str) -> None:
        self._chance = chance
        self._keys = hashes(name)

    def all(self) -> list[Any]:
        """The questions of one store, in order."""
        swa_windows = (0, 1, 3, 9)
        return [
            self._fill,
            self._write(kv=0.9, swa=0.6, draft=0.8),
            self._write(kv=0.3),
            self._wrong_slots,
            lambda store, _: store.batch_exists_v2(self._keys),
            self._ask(N_PAGES, self._needs("swa", None)),
            *(
                self._ask(self._chance.randint(0, N_PAGES), self._needs("swa", window))
                for window in swa_windows
            ),
            self._ask_for_both,
            self._read("swa"),
            self._read("kv"),
        ]

    def _fill(self, _: Any, pools: dict[str, Any]) -> None:
        import torch

        torch.manual_seed(int(self._keys[0][:8], 16))
        for pool in pools.values():
            pool.kv_buffer.view(torch.uint8).random_(0, 255)

    def _write(self, **shares: float) -> Any:
        stored = {pool: self._some(share) for pool, share in shares.items()}
        return lambda store, _: store.batch_set_v2(
            [self._transfer(pool, pages, 0) for pool, pages in stored.items()]
        )

    def _wrong_slots(self, store: Any, _: Any) -> Any:
        transfer = self._transfer("swa", [0], 0)
        transfer.host_indices = transfer.host_indices[1:]
        return [store.batch_set_v2([transfer]), store.batch_get_v2([transfer])]

    def _needs(self, pool: str, window: int | None) -> Any:
        from sglang.srt.mem_cache.hicache_storage import PoolHitPolicy, PoolName, PoolTransfer

        policy = PoolHitPolicy.ALL_PAGES if window is None else PoolHitPolicy.TRAILING_PAGES
        keys = self._keys[: window or 0] or None
        return PoolTransfer(PoolName(pool), hit_policy=policy, keys=keys)

    def _ask(self, n_keys: int, needed: Any) -> Any:
        return lambda store, _: store.batch_exists_v2(self._keys[:n_keys], [needed])

    def _ask_for_both(self, store: Any, _: Any) -> Any:
        if not hasattr(store, "on_host_pools_registered"):
            return None  # 0.5.22 takes the shorter of two prefixes, which may lack pages
        wanted = [self._needs("draft", None), self._needs("swa", 2)]
        return store.batch_exists_v2(self._keys, wanted)

    def _read(self, pool: str) -> Any:
        pages = self._some(0.7)

        def run(store: Any, pools: dict[str, Any]) -> Any:
            pools[pool].kv_buffer[:] = 0
            answer = store.batch_get_v2([self._transfer(pool, pages, N_PAGES)])
            return answer, [content(pools[pool], N_PAGES + n) for n in pages]

        return run

    def _transfer(self, pool: str, pages: Sequence[int], at: int) -> Any:
        from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer

        return PoolTransfer(
            PoolName(pool),
            host_indices=slots([at + n for n in pages]),
            keys=[self._keys[n] for n in pages],
        )

    def _some(self, share: float) -> list[int]:
        return [n for n in range(N_PAGES) if self._chance.random() < share]


def host_pool(kind: str, layout: str, n_layers: int = 4) -> Any:
    """One of SGLang's host pools, filled with random bytes.

    Args:
        kind: ``heads`` (MHA) or ``latent`` (MLA).
        layout: of the pool.
        n_layers: how many layers a page has.
    """
    import torch
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool
    from sglang.srt.mem_cache.pool_host.base import host_memory_budget_scope
    from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost
    from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost

    common = {
        "size": PAGE_SIZE,
        "page_size": PAGE_SIZE,
        "dtype": torch.bfloat16,
        "layer_num": n_layers,
        "device": "cpu",
        "enable_memory_saver": False,
        "start_layer": 0,
        "end_layer": n_layers,
    }
    if kind == "heads":
        device = MHATokenToKVPool(head_num=2, head_dim=16, **common)
        cls, info = MHATokenToKVPoolHost, "_mha_buffer_info"
    else:
        device = MLATokenToKVPool(kv_lora_rank=32, qk_rope_head_dim=8, **common)
        cls, info = MLATokenToKVPoolHost, "_mla_buffer_info"
    accepted = inspect.signature(cls.__init__).parameters
    geometry = {
        "device_capacity_tokens": PAGE_SIZE,
        "start_layer": 0,
        "end_layer": n_layers,
        "target_layer_num": n_layers,
        "host_token_capacity": CAPACITY,
    }
    named = {name: value for name, value in geometry.items() if name in accepted}
    source = getattr(device, info)() if "buffer_info" in accepted else device
    with host_memory_budget_scope(1 << 40):
        pool = cls(source, CAPACITY / PAGE_SIZE, 0, PAGE_SIZE, layout, pin_memory=False, **named)
    pool.kv_buffer.view(torch.uint8).random_(0, 255)
    return pool


def page_set(backend: Any, pool: Any, path: str) -> Any:
    """The controller's own function that stores pages: of interface v1, or with tensors."""
    from sglang.srt.managers.cache_controller import HiCacheController

    name = "_page_set_zero_copy" if path == "v1" else "_generic_page_set"
    controller = SimpleNamespace(
        storage_backend=backend, storage_host_pool=pool, mem_pool_host=pool, page_size=PAGE_SIZE
    )
    return lambda keys, indices: getattr(HiCacheController, name)(controller, keys, indices)


def page_get(backend: Any, pool: Any, path: str) -> Any:
    """The controller's own function that reads pages; it counts up to the first miss."""
    from sglang.srt.managers.cache_controller import HiCacheController

    name = "_page_get_zero_copy" if path == "v1" else "_generic_page_get"
    controller = SimpleNamespace(
        storage_backend=backend, storage_host_pool=pool, mem_pool_host=pool, page_size=PAGE_SIZE
    )
    operation = SimpleNamespace(request_id="a request", is_terminated=lambda: False)
    return lambda keys, indices: getattr(HiCacheController, name)(
        controller, operation, keys, indices
    )


def hashes(name: str) -> list[str]:
    """Page hashes as SGLang's: SHA-256 in hex."""
    return [hashlib.sha256(f"{name} {n}".encode()).hexdigest() for n in range(N_PAGES)]


def slots(pages: Sequence[int]) -> Any:
    """The slots of some pages."""
    import torch

    return torch.tensor([n * PAGE_SIZE + i for n in pages for i in range(PAGE_SIZE)])


def content(pool: Any, page: int) -> str:
    """The bytes of a page, in hex."""
    import torch

    return str(pool.get_data_page(page * PAGE_SIZE).view(torch.uint8).numpy().tobytes().hex())


if __name__ == "__main__":
    serve(start)
