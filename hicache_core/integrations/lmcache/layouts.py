"""Which bytes an LMCache chunk has, and under which keys a store holds it.

LMCache's key names the model, the shard of its KV, a group of layers, a salt and the hash of all
tokens so far. It does not say the dtype or the shape, on which the bytes depend. The namespace of
our keys has those, so that two servers with different dtypes neither read nor replace each other's
chunks. Formats that torch has no dtype of its own for, such as vLLM's fp8, are all ``uint8``: what
tells them apart is the setting ``variant``. A store or load has dtype and shape from its buffers. A
lookup has no buffers: what LMCache says of the layout there is a hint, and may be absent or that of
another form of the chunk. ``KnownLayouts`` says which layouts a lookup asks for.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from hashlib import sha256
from typing import NamedTuple, Protocol

from hicache_core.integrations.foreign.namespace import ForeignNamespace
from hicache_core.kv.keys import DIGEST_NBYTES

ENGINE = "lmcache"
N_INDEX_SLOTS = 8
INDEX_NBYTES = 1024
MAX_OWN_LAYOUTS = 4


class DType(Protocol):
    """What is used of a ``torch.dtype``."""

    @property
    def itemsize(self) -> int: ...


class Shard(NamedTuple):
    """What a key of LMCache says beside the hash of the tokens and the salt.

    Attributes:
        model_name: as the engine gave it.
        kv_rank: LMCache's number for world size and rank.
        object_group_id: index of a group of layers.
    """

    model_name: str
    kv_rank: int
    object_group_id: int


@dataclass(frozen=True, slots=True)
class Layout:
    """The form of a chunk.

    Attributes:
        dtypes: one for each tensor of the chunk, such as ``bfloat16``.
        shapes: of the tensors.
        nbytes: of the chunk.
    """

    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    nbytes: int

    @property
    def chunk_size(self) -> int:
        """Tokens of the chunk: the last dimension but one, in attention KV; 1 if there is none."""
        first = self.shapes[0] if self.shapes else ()
        return first[-2] if len(first) >= 3 else 1


@lru_cache(maxsize=1024)
def layout_of(
    shapes: tuple[Sequence[int], ...], dtypes: tuple[DType, ...], nbytes: int | None = None
) -> Layout:
    """Returns the layout of a chunk.

    Args:
        shapes: of its tensors.
        dtypes: of its tensors, as torch has them.
        nbytes: of the chunk, which a serialised one may use only in part; None for all of it.
    """
    if nbytes is None:
        nbytes = sum(math.prod(s) * d.itemsize for s, d in zip(shapes, dtypes, strict=True))
    return Layout(
        tuple(str(dtype).removeprefix("torch.") for dtype in dtypes),
        tuple(tuple(int(n) for n in shape) for shape in shapes),
        nbytes,
    )


class ChunkNames:
    """Names chunks in a store. Any thread."""

    def __init__(
        self, engine_version: str, identity: Callable[[str], str], serde: str, variant: str = ""
    ) -> None:
        """Stores its arguments.

        Args:
            engine_version: of LMCache.
            identity: returns that of a model's name: ``Models.identity``.
            serde: how the server transforms chunks before it stores them; empty if it does not.
            variant: what else decides their bytes; empty if nothing does.
        """
        self._engine_version = engine_version
        self._identity = identity
        self._settings = {"serde": serde} | ({"variant": variant} if variant else {})
        self.digest = lru_cache(maxsize=4096)(self._digest)
        """Returns the digest of ``namespace`` for the same arguments."""

    def namespace(self, shard: Shard, salt: str, layout: Layout) -> ForeignNamespace:
        """Returns the namespace of chunks.

        Args:
            shard: of their keys.
            salt: of their keys.
            layout: of the chunks.

        Returns:
            One whose ``object_nbytes`` is 0, since namespaces of other sizes share the store; the
            size is one of the details. So is a hash of the salt, since whoever reads the store
            should not learn the salt itself.
        """
        hashed = sha256(salt.encode()).hexdigest() if salt else ""
        details = {"cache_salt_sha256": hashed, **asdict(layout)}
        return self._described(shard, "chunk", layout.chunk_size, details)

    def index_namespace(self, shard: Shard) -> ForeignNamespace:
        """Returns the namespace in which the layouts of a shard are listed."""
        return self._described(shard, "index", 1, {})

    def index_keys(self, shard: Shard) -> list[str]:
        """Returns the keys under which the layouts of a shard are listed."""
        namespace = self.index_namespace(shard)
        return [namespace.key(f"slot {n}".encode()) for n in range(N_INDEX_SLOTS)]

    def _digest(self, shard: Shard, salt: str, layout: Layout) -> str:
        return self.namespace(shard, salt, layout).digest

    def _described(
        self, shard: Shard, kind: str, page_size: int, details: dict[str, object]
    ) -> ForeignNamespace:
        return ForeignNamespace(
            ENGINE,
            self._engine_version,
            self._identity(shard.model_name),
            kind,
            page_size,
            details={
                "kv_rank": shard.kv_rank,
                "object_group_id": shard.object_group_id,
                **self._settings,
                **details,
            },
        )


def chunk_key(digest: str, chunk_hash: bytes) -> str:
    """Returns the key of a chunk.

    Args:
        digest: of its namespace.
        chunk_hash: LMCache's. Taken as it is if it has 32 bytes, as its default has; else its
            SHA-256 is.
    """
    if len(chunk_hash) != DIGEST_NBYTES:
        chunk_hash = sha256(chunk_hash).digest()
    return f"{digest}/{chunk_hash.hex()}"


class KnownLayouts:
    """Which layouts the chunks of each shard may have. Any thread.

    *Own* layouts are those of buffers that this server stored from or loaded into; nothing else
    can be loaded here. *Listed* ones are those of the index: eight slots of a shard in the store,
    where every server leaves the layouts that it stores. The slot follows from the layout, so two
    layouts may share one; then one of them is not listed.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._own: dict[Shard, list[Layout]] = {}
        self._listed: dict[Shard, list[Layout]] = {}

    def add_own(self, shard: Shard, layout: Layout) -> None:
        """Tells the layout of a buffer."""
        own = self._own.get(shard, ())
        if own and own[-1] is layout:
            return  # without the lock: nearly always
        with self._lock:
            others = [one for one in self._own.get(shard, ()) if one != layout]
            self._own[shard] = [*others, layout][-MAX_OWN_LAYOUTS:]

    def add_listed(self, shard: Shard, layouts: Iterable[Layout]) -> None:
        """Tells what the index of a shard holds."""
        with self._lock:
            self._listed[shard] = list(layouts)

    def needs_index(self, shard: Shard) -> bool:
        """Returns whether a lookup should read the index first."""
        return shard not in self._own and shard not in self._listed

    def candidates(self, shard: Shard, hint: Layout | None) -> list[Layout]:
        """Returns the layouts that a lookup asks for.

        That is the hint alone if it is an own layout. If it is not, a ``serde`` gives the chunks
        another form, and the own layouts are asked for too; a server that has none yet asks for
        the listed ones.
        """
        known = self._own.get(shard) or self._listed.get(shard, [])
        if hint is None:
            return known
        if hint in self._own.get(shard, ()):
            return [hint]
        return [hint, *(layout for layout in known if layout != hint)]


def index_slot(layout: Layout) -> int:
    """Returns the slot of the index in which a layout is listed."""
    return sha256(encode(layout)).digest()[0] % N_INDEX_SLOTS


def encode(layout: Layout) -> bytes:
    """Returns the entry of the index for a layout, ``INDEX_NBYTES`` long or more."""
    return json.dumps(asdict(layout)).encode().ljust(INDEX_NBYTES)


def decode(entry: bytes | memoryview) -> Layout | None:
    """Returns the layout that ``encode`` was given; None if the entry is of another version."""
    try:
        fields = json.loads(bytes(entry))
        shapes = tuple(tuple(map(int, shape)) for shape in fields["shapes"])
        return Layout(tuple(map(str, fields["dtypes"])), shapes, int(fields["nbytes"]))
    except (ValueError, KeyError, TypeError):
        return None
