"""Runs classes written for SGLang's ``dynamic`` storage as a ``StorageBackend``.

``hicache_core.plugin.dynamic`` imports it by name when it meets such a class; needs torch, not
sglang.

Two paths, as in SGLang: the generic one (``batch_get``/``batch_set`` with flat uint8 tensors), and
with ``interface_v1: 1`` the one over registered host memory (``batch_get_v1``/``batch_set_v1``).
Pages are copied through the adapter's own memory, so a class that keeps a tensor, or whose call
hangs, never holds a page of the host pool. The answers of a class are checked: one that does not
have the documented form is a miss, counted in ``stats()["odd_answers"]``.
"""

from __future__ import annotations

import logging
import struct
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, ClassVar, TypeAlias

import torch
from pydantic import ConfigDict

from hicache_core.errors import (
    BackendFull,
    BackendUnavailable,
    IncompatibleBackend,
    UseAfterClose,
)
from hicache_core.integrations.sglang_stand_ins import ExtraInfo, StagingPool, StorageConfig
from hicache_core.integrations.three_methods import ThreeMethods
from hicache_core.plugin.dynamic import NAMES_OF_CLASS, DynamicSettings, has_three_methods_only
from hicache_core.process.logs import log_once
from hicache_core.storage.answers import n_leading
from hicache_core.storage.base import BackendConfig, Buffer, StorageBackend
from hicache_core.storage.segments import nbytes_of, scatter
from hicache_core.types import BackendContext, Page

_SGLANG_MODULE = "sglang.srt.mem_cache.hicache_storage"
_V1_METHODS = ("register_mem_pool_host", "batch_get_v1", "batch_set_v1")
_STAGING_NBYTES = 128 << 20
_MAX_SLOTS = 128
_logger = logging.getLogger(__name__)

_InSlots: TypeAlias = Callable[[list[str], Sequence[Page], list[int]], Sequence[bool]]
"""Moves pages through slots of registered memory; answers for each page."""

_LENGTH = struct.Struct("<Q")
_UNTOUCHED = 2**64 - 1


class SettingsOfStranger(BackendConfig):
    """Any key: the class has no ``Config`` of its own to check them by."""

    model_config = ConfigDict(frozen=True, extra="allow")


class SGLangBackend(StorageBackend):
    """A class for SGLang's generic path; ``adapt`` makes a subclass of it for each such class."""

    Config = SettingsOfStranger
    foreign_class: ClassVar[Callable[..., Any]]
    chosen: ClassVar[DynamicSettings]

    def __init__(self, config: BackendConfig, context: BackendContext) -> None:
        # docstring inherited
        super().__init__(config, context)
        self._foreign: Any = None
        self._closed = False
        self._count_lock = threading.Lock()
        self._odd_answers = 0

    def open(self) -> None:
        # docstring inherited
        named = {key: getattr(self.chosen, key) for key in NAMES_OF_CLASS}
        extra_config = {**named, **(self.config.model_extra or {})}
        if self._foreign is not None:
            return
        try:
            foreign = self.foreign_class(self._storage_config(extra_config), {})
            self._register(foreign)
        except Exception as error:  # a stranger's constructor may raise anything: translated
            raise BackendUnavailable(
                f"opening {self.chosen.class_name} of backend {self.name!r}"
                f" raised {type(error).__name__}: {error}"
            ) from error
        self._foreign = foreign

    def _register(self, foreign: Any) -> None:
        """Hands over the memory that pages will lie in; the generic path has none."""

    def close(self) -> None:
        # docstring inherited
        foreign, self._foreign, self._closed = self._foreign, None, True
        if callable(getattr(foreign, "close", None)):
            foreign.close()

    def stats(self) -> Mapping[str, float]:
        """How many answers were not of the documented form."""
        return {"odd_answers": self._odd_answers}

    def exists(self, key: str) -> bool:
        # docstring inherited
        answer = self._opened().exists(_plain(key))
        return answer if isinstance(answer, bool) else bool(self._odd("exists", answer))

    def batch_exists(self, keys: Sequence[str]) -> int:
        # docstring inherited
        foreign = self._opened()
        if not callable(getattr(foreign, "batch_exists", None)):
            return super().batch_exists(keys)
        answer = foreign.batch_exists([_plain(key) for key in keys])
        if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer <= len(keys):
            return answer
        return self._odd("batch_exists", answer)

    def get(self, key: str) -> Buffer | None:
        # docstring inherited
        target = self._empty(self.context.object_nbytes) if self.context.object_nbytes else None
        return self._bytes_of(self._opened().get(_plain(key), target, None), "get")

    def set(self, key: str, value: Buffer) -> None:
        # docstring inherited
        if self.batch_set([key], [[memoryview(value).cast("B")]]) == 0:
            raise BackendFull(f"backend {self.name!r} did not store {key}")

    def batch_get(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        # docstring inherited
        answers = self._answers(keys, pages)
        for n, (answer, page) in enumerate(zip(answers, pages, strict=True)):
            if not self._fill(answer, page):
                return n
        return len(keys)

    def get_each(self, keys: Sequence[str], pages: Sequence[Page]) -> Sequence[bool]:
        # docstring inherited
        answers = self._answers(keys, pages)
        return [self._fill(answer, page) for answer, page in zip(answers, pages, strict=True)]

    def batch_set(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        # docstring inherited
        foreign = self._opened()
        plain = [_plain(key) for key in keys]
        values = [self._copy_of(page) for page in pages]
        if callable(getattr(foreign, "batch_set", None)):
            if self._is_true(foreign.batch_set(plain, values, None, None), "batch_set"):
                return len(keys)
            return self.batch_exists(keys)  # it does not say how far it came
        for n, (key, value) in enumerate(zip(plain, values, strict=True)):
            if not self._is_true(foreign.set(key, value, None, None), "set"):
                return n
        return len(keys)

    def set_each(self, keys: Sequence[str], pages: Sequence[Page]) -> Sequence[bool]:
        # docstring inherited
        foreign = self._opened()
        plain = [_plain(key) for key in keys]
        values = [self._copy_of(page) for page in pages]
        if callable(getattr(foreign, "batch_set", None)):
            if self._is_true(foreign.batch_set(plain, values, None, None), "batch_set"):
                return [True] * len(keys)
            return self.exists_each(keys)  # it does not say which of them it has stored
        return [
            self._is_true(foreign.set(key, value, None, None), "set")
            for key, value in zip(plain, values, strict=True)
        ]

    def _answers(self, keys: Sequence[str], pages: Sequence[Page]) -> Sequence[object]:
        """What the class found for each key; None for each if its answer is odd."""
        foreign = self._opened()
        plain = [_plain(key) for key in keys]
        targets = [self._empty(nbytes_of(page)) for page in pages]
        if not callable(getattr(foreign, "batch_get", None)):
            return [foreign.get(key, to, None) for key, to in zip(plain, targets, strict=True)]
        answers = foreign.batch_get(plain, targets, None)
        if isinstance(answers, (list, tuple)) and len(answers) == len(keys):
            return answers
        if answers is not None:
            self._odd("batch_get", answers)
        return [None] * len(keys)

    def _fill(self, answer: object, page: Page) -> bool:
        """Copies what the class found into the page; returns whether it fits."""
        data = self._bytes_of(answer, "batch_get")
        if data is None or data.nbytes != nbytes_of(page):
            return False
        scatter(data, page)
        return True

    def _storage_config(self, extra_config: dict[str, object]) -> object:
        """SGLang's own dataclass if the class brought sglang along, else ours."""
        ours = StorageConfig(
            extra_config,
            model_name=self.context.namespace,
            tp_lcm_size=self.chosen.tp_lcm_size,  # SGLang's controller moves it, too
        )
        sglang = sys.modules.get(_SGLANG_MODULE)
        if sglang is None:
            return ours
        theirs = sglang.HiCacheStorageConfig
        names = {entry.name for entry in fields(theirs)}
        return theirs(**{key: value for key, value in vars(ours).items() if key in names})

    def _opened(self) -> Any:
        if self._foreign is None:
            what = "is closed" if self._closed else "was not opened"
            raise UseAfterClose(f"backend {self.name!r} {what}")
        return self._foreign

    def _odd(self, method: str, answer: object) -> int:
        """Counts an answer that is not of the documented form, and answers 0 in its place."""
        with self._count_lock:
            self._odd_answers += 1
        message = f"backend {self.name!r}: {method} answered {type(answer).__name__}: a miss"
        log_once(_logger, logging.WARNING, message)
        return 0

    def _is_true(self, answer: object, method: str) -> bool:
        return answer if isinstance(answer, bool) else bool(self._odd(method, answer))

    def _bytes_of(self, answer: object, method: str) -> memoryview | None:
        if answer is None:
            return None
        if not isinstance(answer, torch.Tensor):
            self._odd(method, answer)
            return None
        flat = answer.detach().cpu().contiguous().flatten().view(torch.uint8)
        return flat.numpy().data

    @staticmethod
    def _empty(nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def _copy_of(self, page: Page) -> torch.Tensor:
        tensor = self._empty(nbytes_of(page))
        _gather(page, tensor.numpy().data)
        return tensor


class SGLangV1Backend(SGLangBackend):
    """A class for SGLang's ``interface_v1``: it reads and writes registered memory.

    Such a class knows one size only, so every object takes a slot of ``object_nbytes`` and eight
    bytes behind them that say how much of it is used::

        | object, then zeros up to object_nbytes | length, u64 little-endian |
    """

    _pool: StagingPool

    def open(self) -> None:
        # docstring inherited
        if self.context.object_nbytes <= 0:
            raise IncompatibleBackend(
                f"backend {self.name!r} with interface_v1 has slots of one size, and the context's"
                " object_nbytes is 0 (for the conformance kit: --max-object-nbytes)"
            )
        super().open()

    def _register(self, foreign: Any) -> None:
        # docstring inherited
        nbytes = self.context.object_nbytes + _LENGTH.size
        self._pool = StagingPool(nbytes, min(_MAX_SLOTS, max(1, _STAGING_NBYTES // nbytes)))
        foreign.register_mem_pool_host(self._pool)
        if callable(getattr(foreign, "on_host_pools_registered", None)):
            foreign.on_host_pools_registered()

    def get(self, key: str) -> Buffer | None:
        # docstring inherited
        found: list[bytes] = []

        def run(keys: list[str], _: Sequence[Page], slots: list[int]) -> Sequence[bool]:
            loaded = self._load(keys, slots)
            if loaded[0]:
                content = self._pool.bytes_of(slots[0])
                found.append(bytes(content[: self._length_in(slots[0])]))
            return loaded

        self._each_in_slots([key], [()], run)
        return found[0] if found else None

    def batch_get(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        # docstring inherited
        return self._in_slots(keys, pages, self._read)

    def batch_set(self, keys: Sequence[str], pages: Sequence[Page]) -> int:
        # docstring inherited
        return self._in_slots(keys, pages, self._write)

    def get_each(self, keys: Sequence[str], pages: Sequence[Page]) -> Sequence[bool]:
        # docstring inherited
        return self._each_in_slots(keys, pages, self._read)

    def set_each(self, keys: Sequence[str], pages: Sequence[Page]) -> Sequence[bool]:
        # docstring inherited
        return self._each_in_slots(keys, pages, self._write)

    def _read(self, keys: list[str], pages: Sequence[Page], slots: list[int]) -> Sequence[bool]:
        """Fills the pages of those objects that are as long as their page."""
        filled = []
        for is_loaded, slot, page in zip(self._load(keys, slots), slots, pages, strict=True):
            nbytes = nbytes_of(page)
            filled.append(is_loaded and self._length_in(slot) == nbytes)
            if filled[-1]:
                scatter(self._pool.bytes_of(slot)[:nbytes], page)
        return filled

    def _write(self, keys: list[str], pages: Sequence[Page], slots: list[int]) -> Sequence[bool]:
        """Stores the pages."""
        for slot, page in zip(slots, pages, strict=True):
            content = self._pool.bytes_of(slot)
            nbytes = _gather(page, content)
            content[nbytes : -_LENGTH.size] = bytes(len(content) - _LENGTH.size - nbytes)
            _LENGTH.pack_into(content, len(content) - _LENGTH.size, nbytes)
        answer = self._opened().batch_set_v1(keys, torch.tensor(slots), ExtraInfo())
        return self._flags(answer, len(keys), "batch_set_v1")

    def _each_in_slots(
        self, keys: Sequence[str], pages: Sequence[Page], run: _InSlots
    ) -> list[bool]:
        """Runs ``run`` on all pages that fit a slot, as many at a time as there are slots."""
        self._opened()
        limit, mask = self.context.object_nbytes, [False] * len(keys)
        fitting = [n for n, page in enumerate(pages) if nbytes_of(page) <= limit]
        for start in range(0, len(fitting), self._pool.n_slots):
            part = fitting[start : start + self._pool.n_slots]
            with self._pool.slots(len(part)) as slots:
                flags = run([_plain(keys[n]) for n in part], [pages[n] for n in part], slots)
            for n, flag in zip(part, flags, strict=True):
                mask[n] = flag
        return mask

    def _in_slots(self, keys: Sequence[str], pages: Sequence[Page], run: _InSlots) -> int:
        """Runs ``run`` on as many pages at a time as there are slots, until one is missing."""
        self._opened()
        sizes = [nbytes_of(page) <= self.context.object_nbytes for page in pages]
        n_fit = n_leading(sizes)
        done = 0
        while done < n_fit:
            n = min(self._pool.n_slots, n_fit - done)
            part = slice(done, done + n)
            with self._pool.slots(n) as slots:
                flags = run([_plain(key) for key in keys[part]], pages[part], slots)
            n_pages = n_leading(flags)
            done += n_pages
            if n_pages < n:
                break
        return done

    def _load(self, keys: list[str], slots: list[int]) -> Sequence[bool]:
        """Has the class fill the slots; what it says that it filled, if it touched it."""
        for slot in slots:
            content = self._pool.bytes_of(slot)
            _LENGTH.pack_into(content, len(content) - _LENGTH.size, _UNTOUCHED)
        answer = self._opened().batch_get_v1(keys, torch.tensor(slots), ExtraInfo())
        flags = self._flags(answer, len(keys), "batch_get_v1")
        limit = self.context.object_nbytes
        return [
            flag and self._length_in(slot) <= limit for flag, slot in zip(flags, slots, strict=True)
        ]

    def _length_in(self, slot: int) -> int:
        content = self._pool.bytes_of(slot)
        length: int = _LENGTH.unpack_from(content, len(content) - _LENGTH.size)[0]
        return length

    def _flags(self, answer: Any, n: int, method: str) -> list[bool]:
        is_list = isinstance(answer, (list, tuple)) and len(answer) == n
        if is_list and all(isinstance(one, bool) for one in answer):
            return list(answer)
        self._odd(method, answer)
        return [False] * n


def adapt(foreign_class: type, chosen: DynamicSettings) -> type[StorageBackend]:
    """A ``StorageBackend`` that drives ``foreign_class``, a class for SGLang's ``dynamic``.

    Raises:
        IncompatibleBackend: ``interface_v1`` is asked for and the class lacks its methods.
    """
    is_v1 = bool((chosen.model_extra or {}).get("interface_v1"))
    missing = [name for name in _V1_METHODS if not callable(getattr(foreign_class, name, None))]
    if is_v1 and missing:
        raise IncompatibleBackend(
            f"dynamic backend {chosen.backend_name!r}: interface_v1 is asked for, but"
            f" {chosen.class_name} lacks {', '.join(missing)}"
        )
    base = SGLangV1Backend if is_v1 else SGLangBackend
    make: Callable[..., Any] = foreign_class
    if has_three_methods_only(foreign_class):
        make = lambda config, _: ThreeMethods(foreign_class, config)  # noqa: E731
    own = {"name": chosen.backend_name, "foreign_class": staticmethod(make), "chosen": chosen}
    return type(f"{base.__name__}For{foreign_class.__name__}", (base,), own)


def _plain(key: str) -> str:
    """Our key as one word: such classes make file names of the hex hashes that SGLang gives."""
    return key.replace("/", "-")


def _gather(page: Page, target: memoryview) -> int:
    start = 0
    for segment in page:
        target[start : start + segment.nbytes] = segment
        start += segment.nbytes
    return start
