"""Which cache a command speaks of: its storage namespace, named or found in the store."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from hicache_core.errors import ConfigError
from hicache_core.kv.keys import describe_namespace
from hicache_core.kv.spec import KVSpec
from hicache_core.storage.manifest import Manifest

DEFAULT_PAGE_SIZE, DEFAULT_LAYOUT = 64, "page_first"
_NAMESPACE = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True, slots=True)
class Whose:
    """A cache as far as its keys go.

    Attributes:
        namespace: the first part of its keys, 16 hex digits.
        page_size: tokens in a page.
        manifest: what the namespace stands for, if that is known.
    """

    namespace: str
    page_size: int
    manifest: Manifest | None


@dataclass(frozen=True, slots=True)
class Named:
    """What the user said of the cache; None or empty for what was left out.

    Attributes:
        namespace: its storage namespace.
        model: a folder with the model's ``config.json``.
        fingerprint: the model's, or how it starts.
        dtype: of the cache, if not that of the weights.
        page_size: tokens in a page.
        layout: of the host pool.
    """

    namespace: str | None = None
    model: Path | None = None
    fingerprint: str = ""
    dtype: str | None = None
    page_size: int | None = None
    layout: str | None = None


def choose(named: Named, known: Mapping[str, Manifest | None]) -> Whose:
    """The one cache that ``named`` means.

    Args:
        named: what the user said.
        known: the namespaces in the store, with their manifests where there is one.

    Raises:
        ConfigError: it means no cache, or several.
        SpecError: the model's config has no such KV cache.
    """
    if named.namespace is not None:
        return _by_digest(named.namespace, named.page_size, known)
    manifests = [manifest for manifest in known.values() if manifest is not None]
    if named.model is not None:
        return _by_model(named, named.model, manifests)
    found = [manifest for manifest in manifests if _fits(named, manifest)]
    if len(found) == 1:
        return Whose(found[0].namespace, found[0].page_size, found[0])
    said = "several caches" if found else "no cache that you describe"
    there = "; ".join(map(summary, found or manifests)) or "no manifest of any"
    raise ConfigError(
        f"the store knows {said}; there is: {there}. Choose with --namespace, or with "
        "--model-fingerprint, --page-size and --layout, or describe the cache with --model"
    )


def summary(manifest: Manifest) -> str:
    """A manifest in one line."""
    fields = manifest.fields
    components = fields.get("components", [])
    dtypes = "+".join(sorted({str(component[2]) for component in components}))
    return (
        f"{manifest.namespace} (model {fields.get('model_fingerprint')}, page size "
        f"{fields['page_size']}, {fields['layout']}, {dtypes}, layers {fields.get('layers')}, "
        f"heads {fields.get('heads')})"
    )


def _by_digest(
    namespace: str, page_size: int | None, known: Mapping[str, Manifest | None]
) -> Whose:
    if _NAMESPACE.fullmatch(namespace) is None:
        raise ConfigError(f"--namespace {namespace!r}: a storage namespace is 16 hex digits")
    manifest = known.get(namespace)
    own = None if manifest is None else manifest.page_size
    return Whose(namespace, page_size or own or DEFAULT_PAGE_SIZE, manifest)


def _by_model(named: Named, folder: Path, manifests: list[Manifest]) -> Whose:
    fingerprints = {str(manifest.fields.get("model_fingerprint")) for manifest in manifests}
    fitting = sorted(text for text in fingerprints if text.startswith(named.fingerprint))
    if len(fitting) != 1 and not named.fingerprint:
        raise ConfigError(
            "--model says how large a page is, but not of which weights: add --model-fingerprint; "
            f"the store has: {', '.join(fitting) or 'no manifest'}"
        )
    fingerprint = fitting[0] if len(fitting) == 1 else named.fingerprint
    spec = KVSpec.from_model_config(
        _model_config(folder), fingerprint=fingerprint, dtype=named.dtype
    )
    page_size = named.page_size or DEFAULT_PAGE_SIZE
    described = describe_namespace(spec.identity(), page_size, named.layout or DEFAULT_LAYOUT)
    manifest = Manifest.of(described)
    return Whose(manifest.namespace, page_size, manifest)


def _model_config(folder: Path) -> object:
    """The fields of ``config.json`` as attributes; no library is needed for that."""
    file = folder / "config.json"
    try:
        config = json.loads(
            file.read_text(encoding="utf-8"), object_hook=lambda fields: SimpleNamespace(**fields)
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"--model: {file} cannot be read as a model's config: {error}") from None
    return config


def _fits(named: Named, manifest: Manifest) -> bool:
    fields = manifest.fields
    return (
        str(fields.get("model_fingerprint")).startswith(named.fingerprint)
        and named.page_size in (None, fields["page_size"])
        and named.layout in (None, fields["layout"])
        and named.dtype in (None, *(component[2] for component in fields.get("components", [])))
    )
