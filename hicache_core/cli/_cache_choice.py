"""Which cache a command is about: its storage namespace, given or found in the store."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hicache_core.errors import ConfigError
from hicache_core.integrations.foreign.identity import BY_NAME
from hicache_core.kv.keys import describe_namespace
from hicache_core.kv.spec import KVSpec
from hicache_core.storage.manifest import Manifest
from hicache_core.storage.why import AskedGroup

DEFAULT_PAGE_SIZE, DEFAULT_LAYOUT = 64, "page_first"
_NAMESPACE = re.compile(r"[0-9a-f]{16}")
_COMMON = frozenset(
    ["engine", "format", "layout", "model_fingerprint", "object_nbytes", "page_size"]
)
_MAX_DETAIL_CHARS = 80


@dataclass(frozen=True, slots=True)
class CacheRef:
    """The cache whose keys a command looks up.

    Attributes:
        namespace: the first part of its keys, 16 hex digits.
        page_size: tokens in a page.
        manifest: what the namespace was made from; None if that is not known.
    """

    namespace: str
    page_size: int
    manifest: Manifest | None


@dataclass(frozen=True, slots=True)
class CacheDescription:
    """What the user said about the cache; None or empty where nothing was said.

    Attributes:
        namespace: its storage namespace.
        model: a folder with the model's ``config.json``.
        fingerprint: fingerprint of the model, or the beginning of it.
        dtype: dtype of the KV cache, if it differs from that of the weights.
        page_size: tokens in a page.
        layout: layout of the host pool.
    """

    namespace: str | None = None
    model: Path | None = None
    fingerprint: str = ""
    dtype: str | None = None
    page_size: int | None = None
    layout: str | None = None


def choose(named: CacheDescription, known: Mapping[str, Manifest | None]) -> CacheRef:
    """The one cache that ``named`` describes.

    Args:
        named: what the user said.
        known: the namespaces in the store, each with its manifest or None.

    Raises:
        ConfigError: no cache fits, or several do.
        SpecError: the model's config does not describe a KV cache that can be stored.
    """
    if named.namespace is not None:
        return _by_digest(named.namespace, named.page_size, known)
    manifests = [manifest for manifest in known.values() if manifest is not None]
    # Groups belong to the cache of their full pages, if it stores any.
    manifests = [one for one in manifests if not one.group] or manifests
    if named.model is not None:
        return _by_model(named, named.model, manifests)
    found = [manifest for manifest in manifests if _fits(named, manifest)]
    if len(found) == 1:
        return CacheRef(found[0].namespace, found[0].chain_page_size, found[0])
    said = "several caches fit" if found else "no cache fits"
    there = "; ".join(map(summary, found or manifests)) or "no manifest"
    raise ConfigError(
        f"{said}; the store has: {there}. Choose one with --namespace, or with "
        "--model-fingerprint, --page-size and --layout, or describe it with --model"
    )


def groups_of(cache: CacheRef, known: Mapping[str, Manifest | None]) -> tuple[AskedGroup, ...]:
    """The groups of layers that belong to a cache: windows, the shortest first, then states.

    Args:
        cache: the cache.
        known: the namespaces in the store, each with its manifest or None.
    """
    own = cache.manifest
    if own is None:
        return ()
    same = ("model_fingerprint", "layers", "layout")
    found = (
        AskedGroup(one.group, one.namespace, one.window)
        for one in known.values()
        if one is not None
        and one.group
        and one.chain_page_size == cache.page_size
        and all(one.fields.get(name) == own.fields.get(name) for name in same)
    )
    return tuple(sorted(found, key=lambda group: (not group.window, group.window, group.name)))


def check_keys(cache: CacheRef) -> None:
    """Checks that the keys of a cache follow from the tokens.

    Raises:
        ConfigError: they are hashes that only an engine computes.
    """
    manifest = cache.manifest
    engine = None if manifest is None else manifest.fields.get("engine")
    if manifest is not None and engine is not None and not manifest.told.get("token_chain"):
        raise ConfigError(
            f"{summary(manifest)}: {engine} names pages by hashes that only {engine} computes, so "
            "a prompt cannot be looked up here; ask its metrics, or check the stored pages with "
            "hicache scrub"
        )


def summary(manifest: Manifest) -> str:
    """A manifest in one line."""
    return f"{manifest.namespace} ({described(manifest)})"


def described(manifest: Manifest) -> str:
    """What a manifest says of its namespace, in words."""
    fields = manifest.fields
    said = [
        _model_words(fields.get("model_fingerprint")),
        f"page size {manifest.chain_page_size}",
        str(fields["layout"]),
    ]
    if manifest.group:
        kind = f"a window of {manifest.window}" if manifest.window else "a state"
        said.insert(1, f"group {manifest.group}: {kind}")
    if "engine" in fields:
        said.insert(0, _engine_words(manifest))
        nbytes = fields.get("object_nbytes")
        said.append(f"{nbytes:,} bytes a page" if nbytes else "pages of several lengths")
        said += [f"{name} {value}" for name, value in sorted(_details(manifest).items())]
    else:
        said.append("+".join(_dtypes(fields)))
        said += [f"layers {fields.get('layers')}", f"heads {fields.get('heads')}"]
    return ", ".join(said)


def _dtypes(fields: Mapping[str, Any]) -> list[str]:
    return sorted({str(component[2]) for component in fields.get("components", [])})


def _engine_words(manifest: Manifest) -> str:
    version = manifest.told.get("engine_version")
    return f"{manifest.fields['engine']} {version}" if version else str(manifest.fields["engine"])


def _model_words(identity: object) -> str:
    name = str(identity).removeprefix(BY_NAME)
    by_name = name != str(identity)
    return f"model {name!r} by its name, not its weights" if by_name else f"model {identity}"


def _details(manifest: Manifest) -> dict[str, object]:
    """What else an engine said of its pages, as far as it is short enough for one line."""
    said = {name: value for name, value in manifest.fields.items() if name not in _COMMON}
    return {name: value for name, value in said.items() if len(str(value)) <= _MAX_DETAIL_CHARS}


def _by_digest(
    namespace: str, page_size: int | None, known: Mapping[str, Manifest | None]
) -> CacheRef:
    if _NAMESPACE.fullmatch(namespace) is None:
        raise ConfigError(f"--namespace {namespace!r}: a storage namespace is 16 hex digits")
    manifest = known.get(namespace)
    own = None if manifest is None else manifest.chain_page_size
    return CacheRef(namespace, page_size or own or DEFAULT_PAGE_SIZE, manifest)


def _by_model(named: CacheDescription, folder: Path, manifests: list[Manifest]) -> CacheRef:
    fingerprints = {str(manifest.fields.get("model_fingerprint")) for manifest in manifests}
    fitting = sorted(text for text in fingerprints if text.startswith(named.fingerprint))
    if len(fitting) != 1 and not named.fingerprint:
        raise ConfigError(
            "--model gives the shape of a page, but not the weights: add --model-fingerprint; "
            f"the store has: {', '.join(fitting) or 'no manifest'}"
        )
    fingerprint = fitting[0] if len(fitting) == 1 else named.fingerprint
    spec = KVSpec.from_model_config(
        _model_config(folder), fingerprint=fingerprint, dtype=named.dtype
    )
    page_size = named.page_size or DEFAULT_PAGE_SIZE
    described = describe_namespace(spec.identity(), page_size, named.layout or DEFAULT_LAYOUT)
    manifest = Manifest.of(described)
    return CacheRef(manifest.namespace, page_size, manifest)


def _model_config(folder: Path) -> object:
    """The fields of ``config.json`` as attributes, read without transformers."""
    file = folder / "config.json"
    try:
        config = json.loads(
            file.read_text(encoding="utf-8"), object_hook=lambda fields: SimpleNamespace(**fields)
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"--model: cannot read {file} as a model's config: {error}") from None
    return config


def _fits(named: CacheDescription, manifest: Manifest) -> bool:
    fields = manifest.fields
    return (
        str(fields.get("model_fingerprint")).startswith(named.fingerprint)
        and named.page_size in (None, manifest.chain_page_size)
        and named.layout in (None, fields["layout"])
        and named.dtype in (None, fields.get("dtype"), *_dtypes(fields))
    )
