"""What an engine's pages are, so that pages of different engines never answer for each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256

from hicache_core.errors import ConfigError
from hicache_core.kv.keys import DIGEST_NBYTES, describe_namespace, namespace_digest
from hicache_core.storage.manifest import Manifest, encode, manifest_key

TOKEN_CHAIN_ENGINES = frozenset(["sglang"])
"""Engines whose page hashes are the chain over token ids of docs/key-spec.md, so that a prompt can
be looked up without the engine."""

_OWN_FIELDS = frozenset(["engine", "model_fingerprint", "object_nbytes"])


@dataclass(frozen=True, slots=True)
class ForeignNamespace:
    """Everything that decides the bytes of an engine's page.

    Two pages may be exchanged if and only if all fields but ``engine_version`` are equal.

    Attributes:
        engine: such as ``sglang``.
        engine_version: of the engine that opened the store; told in the manifest, and not part of
            the key: another version with the same layout finds the pages.
        model: what ``model_identity`` returns.
        layout: the engine's name of the order of bytes in a page.
        page_size: tokens in a page.
        object_nbytes: bytes of every page; 0 if they differ or are not known yet.
        details: whatever else the bytes depend on, JSON values only: dtype, heads, layers, ranks,
            pool, adapter, salt.
        digest: the first part of every key, 16 hex digits; made from the others.
    """

    engine: str
    engine_version: str
    model: str
    layout: str
    page_size: int
    object_nbytes: int = 0
    details: Mapping[str, object] = field(default_factory=dict)
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        taken = _OWN_FIELDS & self.details.keys()
        if taken:
            raise ConfigError(
                f"details of a namespace may not have {', '.join(sorted(taken))}: these are fields "
                "of their own"
            )
        object.__setattr__(self, "digest", namespace_digest(self.described))

    @property
    def described(self) -> str:
        """The text whose digest is the first part of every key (``describe_namespace``)."""
        identity = {
            "engine": self.engine,
            "model_fingerprint": self.model,
            "object_nbytes": self.object_nbytes,
            **self.details,
        }
        return describe_namespace(identity, self.page_size, self.layout)

    @property
    def manifest(self) -> tuple[str, memoryview]:
        """The key and the payload of the object that explains ``digest``."""
        manifest = Manifest(self.digest, self.described, self.told)
        return manifest_key(self.digest), memoryview(encode(manifest, self.object_nbytes))

    @property
    def told(self) -> dict[str, object]:
        """What the manifest says besides: the version of the engine, and whose hashes it uses."""
        return {
            "engine_version": self.engine_version,
            "token_chain": self.engine in TOKEN_CHAIN_ENGINES,
        }

    def key(self, page_hash: bytes) -> str:
        """Returns the key of a page.

        Args:
            page_hash: the engine's. Taken as it is if it has 32 bytes, else its SHA-256 is.
        """
        if len(page_hash) != DIGEST_NBYTES:
            page_hash = sha256(page_hash).digest()
        return f"{self.digest}/{page_hash.hex()}"
