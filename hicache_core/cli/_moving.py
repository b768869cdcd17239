"""Which objects of a store a command moves: namespaces, or the prefixes of prompts."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import click

from hicache_core.cli._backend import BackendChoice
from hicache_core.cli._cache_choice import (
    CacheDescription,
    CacheRef,
    check_keys,
    choose,
    groups_of,
    summary,
)
from hicache_core.cli._prompt import Prompt, given_prompt, packed, prompts_in
from hicache_core.errors import ConfigError
from hicache_core.storage.base import StorageBackend
from hicache_core.storage.manifest import Manifest, read_manifest, read_manifests
from hicache_core.storage.moving.prompts import CacheOfPrompts, FoundPrompt, parts_of
from hicache_core.storage.moving.store import Part, count_keys
from hicache_core.types import BackendContext, Namespace

F = TypeVar("F", bound=Callable[..., None])
Known = Mapping[str, Manifest | None]

_UNNAMED = "0" * 16
_Folder = click.Path(exists=True, file_okay=False, path_type=Path)


@dataclass(frozen=True, slots=True)
class ObjectChoice:
    """The objects that a command line names.

    Attributes:
        namespaces: storage namespaces; empty for all.
        fingerprint: of the model, or its beginning; empty for every model.
        prompts: whose prefixes; None for everything.
        tokenizer: folder of the tokenizer of prompts that are texts.
        request: salt, key and adapter of the requests.
    """

    namespaces: tuple[str, ...] = ()
    fingerprint: str = ""
    prompts: Sequence[Prompt] | None = None
    tokenizer: Path | None = None
    request: Namespace = field(default_factory=Namespace)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is moved.

    Attributes:
        parts: the objects, by namespace.
        manifests: of these namespaces.
        found: what the store has of each prompt; empty without prompts.
        page_size: tokens in a page of the prompts; 0 without prompts.
    """

    parts: Sequence[Part]
    manifests: Known
    found: Sequence[FoundPrompt] = ()
    page_size: int = 0

    @property
    def context(self) -> BackendContext:
        """What the backends may know of the objects."""
        return context_of(
            {
                name: 0 if manifest is None else manifest.object_nbytes
                for name, manifest in self.manifests.items()
            }
        )

    def count(self, store: StorageBackend) -> int | None:
        """Number of objects, if somebody sees the progress: the store lists its keys for it."""
        return sum(count_keys(store, self.parts).values()) if sys.stderr.isatty() else None


def context_of(object_nbytes: Mapping[str, int]) -> BackendContext:
    """What a backend may know of objects; ``object_nbytes`` is their length by namespace, or 0."""
    sizes = list(object_nbytes.values())
    most, least = max(sizes), min(sizes)
    first = next(iter(object_nbytes))
    return BackendContext(first, most, least_nbytes=0 if least == most else least)


def names_objects(command: F) -> F:
    """Gives a command the options that name objects, as the keyword argument ``choice``."""

    @functools.wraps(command)
    def called(*args: Any, **options: Any) -> None:
        texts, file = options.pop("prompt"), options.pop("prompts")
        prompts = [*map(given_prompt, texts), *(prompts_in(file) if file else ())]
        request = Namespace(*(options.pop(name) for name in ("extra_key", "cache_salt", "lora_id")))
        choice = ObjectChoice(
            options.pop("namespace"),
            options.pop("model_fingerprint"),
            prompts if texts or file else None,
            options.pop("tokenizer"),
            request,
        )
        if choice.prompts is None and request != Namespace():
            raise click.UsageError("--extra-key, --cache-salt and --lora-id are of prompts")
        command(*args, **options, choice=choice)

    decorated: Any = called
    for option in reversed(_OPTIONS):
        decorated = option(decorated)
    return decorated  # type: ignore[no-any-return]  # click's decorators lose the type


_OPTIONS = (
    click.option(
        "--namespace",
        multiple=True,
        help="Only this storage namespace, with its windows and states. May be repeated.",
    ),
    click.option(
        "--model-fingerprint",
        default="",
        help="Only caches of this model: its fingerprint, or the beginning.",
    ),
    click.option(
        "--prompt",
        multiple=True,
        help="Only the prefix of this prompt: token ids, a text, or @file. May be repeated.",
    ),
    click.option(
        "--prompts",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="Only the prefixes of the prompts in this file, one a line, as text or JSON.",
    ),
    click.option("--tokenizer", type=_Folder, help="Folder of the tokenizer, for texts."),
    click.option("--extra-key", help="The extra_key of the prompts' requests."),
    click.option("--cache-salt", help="The cache_salt of the prompts' requests."),
    click.option("--lora-id", help="The lora_id of the prompts' requests."),
)


@contextlib.contextmanager
def planned(source: BackendChoice, choice: ObjectChoice) -> Iterator[tuple[StorageBackend, Plan]]:
    """The open source, and what is moved out of it.

    Args:
        source: where from.
        choice: what the user asked for.

    Raises:
        ConfigError: no cache fits, or several do.
        BackendError: the store cannot be read.
    """
    first = choice.namespaces[0] if choice.namespaces else _UNNAMED
    with source.reading(BackendContext(first)) as store:
        known = dict(read_manifests(store))
        for name in choice.namespaces:
            if name not in known and (manifest := read_manifest(store, name)):
                known[name] = manifest
        plan = _of_caches(choice, known) if choice.prompts is None else None
        plan = plan or _of_prompts(store, choice, choice.prompts or (), known)
    # Some backends need to know the length of an object, or keep a place for each namespace.
    with source.reading(plan.context) as store:
        yield store, plan


def _of_caches(choice: ObjectChoice, known: Known) -> Plan:
    chosen: dict[str, Manifest | None] = {}
    for name in choice.namespaces or known:
        if name not in known:
            raise ConfigError(f"the store has nothing of namespace {name}; {_what_is_in(known)}")
        manifest = known[name]
        if _is_of(choice.fingerprint, manifest):
            chosen |= {name: manifest, **_groups(name, known)}
    if not chosen:
        asked = f" of model {choice.fingerprint}" if choice.fingerprint else ""
        raise ConfigError(f"the store has no cache{asked}; {_what_is_in(known)}")
    return Plan([Part(name) for name in chosen], chosen)


def _of_prompts(
    store: StorageBackend, choice: ObjectChoice, prompts: Sequence[Prompt], known: Known
) -> Plan:
    if len(choice.namespaces) > 1:
        raise ConfigError("prompts are of one cache: give --namespace once")
    name = choice.namespaces[0] if choice.namespaces else None
    cache = choose(CacheDescription(namespace=name, fingerprint=choice.fingerprint), known)
    check_keys(cache)
    groups = [group.storage_namespace for group in groups_of(cache, known)]
    has_full = cache.manifest is None or not cache.manifest.group
    asked = CacheOfPrompts(
        cache.namespace if has_full else "", groups, cache.page_size, choice.request
    )
    tokens = [packed(prompt, choice.tokenizer) for prompt in prompts]
    parts, found = parts_of(store, asked, tokens)
    manifests = {part.namespace: known.get(part.namespace) for part in parts}
    return Plan(parts, manifests, found, cache.page_size)


def _groups(name: str, known: Known) -> dict[str, Manifest | None]:
    """The windows and states that belong to a cache."""
    manifest = known[name]
    if manifest is None or manifest.group:
        return {}
    cache = CacheRef(name, manifest.chain_page_size, manifest)
    groups = [group.storage_namespace for group in groups_of(cache, known)]
    return {group: known[group] for group in groups}


def _is_of(fingerprint: str, manifest: Manifest | None) -> bool:
    if not fingerprint:
        return True
    own = None if manifest is None else manifest.fields.get("model_fingerprint")
    return own is not None and str(own).startswith(fingerprint)


def refusing_other_models(fingerprint: str) -> Callable[[str, Manifest | None], str]:
    """What refuses pages of models whose fingerprint does not begin with ``fingerprint``."""

    def refuses(_namespace: str, manifest: Manifest | None) -> str:
        if _is_of(fingerprint, manifest):
            return ""
        own = "unknown" if manifest is None else manifest.fields.get("model_fingerprint")
        return f"its model is {own}, not {fingerprint}"

    return refuses


def _what_is_in(known: Known) -> str:
    said = [name if manifest is None else summary(manifest) for name, manifest in known.items()]
    return f"it has: {'; '.join(said)}" if said else "it has none"
