"""Explain why a prompt is a miss: what a store has of it, and why the next page is missing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from hicache_core.cli._backend import CONFIG_HELP, BackendChoice
from hicache_core.cli._cache_choice import (
    CacheDescription,
    CacheRef,
    check_keys,
    choose,
    groups_of,
    summary,
)
from hicache_core.cli._prompt import packed_prompt
from hicache_core.config.sources import read_inline
from hicache_core.storage.manifest import Manifest, read_manifest, read_manifests
from hicache_core.storage.why import Answer, Cause, GroupAnswer, Miss, Question, why
from hicache_core.types import BackendContext, Namespace

_UNNAMED = "0" * 16
_Folder = click.Path(exists=True, file_okay=False, path_type=Path)

_MEANING = {
    Cause.CORRUPT: "the object is damaged. A cache that reads it removes it and stores it again.",
    Cause.WRONG_VERSION: "another version of HiCache sealed the object.",
    Cause.WRONG_LENGTH: "the object is cut short, or its length differs from its header.",
    Cause.FOREIGN: "the object was sealed for another key: somebody copied or renamed it.",
    Cause.OTHER_REQUEST_NAMESPACE: "it is stored for requests with another salt, key or adapter.",
    Cause.OTHER_STORAGE_NAMESPACE: "it is stored by a cache whose pages are not interchangeable.",
    Cause.GONE: "later pages are stored, so it was evicted, expired, deleted, or its write failed.",
    Cause.NEVER_STORED: "it was never stored, or it and all later pages have been removed since.",
}


@click.command("why")
@click.argument("words", nargs=-1, required=True, metavar="NAME PROMPT")
@click.option("--backend", help="Name of the backend, in place of the argument NAME.")
@click.option("--config", default="{}", metavar="JSON|@FILE", help=CONFIG_HELP)
@click.option("--namespace", help="The cache's storage namespace, 16 hex digits.")
@click.option(
    "--model", type=_Folder, help="Folder of the model: its config.json describes the KV."
)
@click.option("--model-fingerprint", default="", help="Fingerprint of the model, or its beginning.")
@click.option("--dtype", help="dtype of the KV cache, if it differs from that of the weights.")
@click.option("--page-size", type=click.IntRange(1), help="Tokens in a page.")
@click.option("--layout", help="page_first, page_first_direct or layer_first.")
@click.option(
    "--tokenizer", type=_Folder, help="Folder of the tokenizer. Default: that of --model."
)
@click.option("--extra-key", help="The request's extra_key.")
@click.option("--cache-salt", help="The request's cache_salt.")
@click.option("--lora-id", help="The request's lora_id.")
@click.option(
    "--other-namespace",
    multiple=True,
    help="Also look into this storage namespace. May be repeated.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def command(
    ctx: click.Context,
    /,
    *,
    words: tuple[str, ...],
    backend: str | None,
    config: str,
    as_json: bool,
    **options: Any,
) -> None:
    """Print how many leading pages of PROMPT the backend NAME has, and why the next is missing.

    PROMPT is a list of token ids (1,2,3 or JSON), a text with --tokenizer, or @file. If the store
    can list its objects and holds pages of one cache only, the cache is found there; otherwise name
    it by options. Nothing is changed in the store. The exit status is 0 if all pages are there, 1
    if not (a prompt shorter than a page has none), and 2 on errors.
    """
    if len(words) != (1 if backend else 2):
        raise click.UsageError(
            "give the name of the backend and a prompt: hicache why NAME PROMPT"
            if not backend
            else "with --backend, give a prompt only"
        )
    choice = BackendChoice(backend or words[0], read_inline(config, what="--config: "))
    tokens = packed_prompt(words[-1], options["tokenizer"] or options["model"])
    answer = _answer(choice, tokens, options)
    click.echo(_as_json(answer) if as_json else "\n".join(_lines(answer)))
    ctx.exit(0 if answer.n_pages and answer.n_usable == answer.n_pages else 1)


def _answer(backend: BackendChoice, tokens: bytes, options: Mapping[str, Any]) -> Answer:
    names = ("namespace", "model", "dtype", "page_size", "layout")
    named = CacheDescription(
        fingerprint=options["model_fingerprint"], **{name: options[name] for name in names}
    )
    with backend.reading(BackendContext(options["namespace"] or _UNNAMED)) as store:
        known = dict(read_manifests(store))
        for name in (options["namespace"], *options["other_namespace"]):
            if name is not None and name not in known:
                known[name] = read_manifest(store, name)
        cache = choose(named, known)
        check_keys(cache)
        question = _question(tokens, cache, known, options)
        # Some stores keep a place for each namespace, or need to know the size of an object.
        with backend.reading(_context(cache, question, known)) as own:
            return why(own, question)


def _question(
    tokens: bytes,
    cache: CacheRef,
    known: Mapping[str, Manifest | None],
    options: Mapping[str, Any],
) -> Question:
    request = Namespace(options["extra_key"], options["cache_salt"], options["lora_id"])
    groups = groups_of(cache, known)
    others = {
        name: manifest
        for name, manifest in known.items()
        if name != cache.namespace and (manifest is None or not manifest.group)
    }
    return Question(
        tokens,
        cache.page_size,
        cache.namespace,
        request,
        cache.manifest,
        others,
        groups,
        has_full_pages=cache.manifest is None or not cache.manifest.group,
    )


def _context(
    cache: CacheRef, question: Question, known: Mapping[str, Manifest | None]
) -> BackendContext:
    manifests = [cache.manifest, *(known[group.storage_namespace] for group in question.groups)]
    sizes = [0 if manifest is None else manifest.object_nbytes for manifest in manifests]
    least_nbytes = min(sizes) if question.groups else 0
    return BackendContext(cache.namespace, max(sizes), least_nbytes=least_nbytes)


def _lines(answer: Answer) -> Iterator[str]:
    question = answer.question
    page_size = question.page_size
    n_tokens = len(question.tokens) // 4
    yield f"prompt      {n_tokens} tokens: {answer.n_pages} whole pages of {page_size} tokens"
    manifest = question.manifest
    name = question.storage_namespace
    yield f"cache       {name + ' (no manifest)' if manifest is None else summary(manifest)}"
    if question.request != Namespace():
        yield f"request     {_shown(question.request)}"
    if question.has_full_pages:
        yield f"stored      {answer.n_stored} leading pages, {answer.n_stored * page_size} tokens"
    if answer.n_present > answer.n_stored:
        n_behind = answer.n_present - answer.n_stored
        yield f"behind      {n_behind} more, useless until the gap is filled"
    if question.groups:
        yield from map(_group_line, answer.groups)
        yield f"usable      {answer.n_usable} leading pages, {answer.n_usable * page_size} tokens"
    if answer.n_pages == 0:
        yield "why         the prompt is shorter than a page, and only whole pages are stored"
        return
    if answer.cut_by:
        yield (
            f"why         cut by group {answer.cut_by}: the pages are stored, the units that it "
            "needs there are not"
        )
    elif answer.miss is None:
        yield "why         it is not a miss: every whole page is stored and verifies"
    if answer.miss is not None:
        yield from _miss_lines(answer.miss, question)


def _group_line(answer: GroupAnswer) -> str:
    group = answer.group
    kind = f"window of {group.window} tokens" if group.window else "state"
    said = f"{answer.n_units} units of the prompt are stored"
    if answer.missing:
        pages = ", ".join(map(str, answer.missing[:8])) + (", …" if len(answer.missing) > 8 else "")
        said += f"; missing or damaged: page {pages}"
    return f"group       {group.name}, {kind}: {said}"


def _miss_lines(miss: Miss, question: Question) -> Iterator[str]:
    first = miss.page * question.page_size
    yield f"page {miss.page:<7}tokens {first} to {first + question.page_size - 1}, key {miss.key}"
    yield f"why         {miss.cause.value.replace('_', ' ')}: {_MEANING[miss.cause]}"
    if miss.found_at:
        yield f"found       {miss.found_at}"
    if miss.request is not None:
        yield f"for         {_shown(miss.request)}"
    for difference in miss.differences:
        yield f"differs     {difference.name}: {difference.asked} asked, {difference.stored} stored"
    if miss.cause is Cause.OTHER_STORAGE_NAMESPACE and not miss.differences:
        yield "differs     unknown: one of the two has no manifest"
    if miss.cause is Cause.NEVER_STORED and not question.others:
        yield "note        the store may hold other caches: name one with --other-namespace"


def _shown(request: Namespace) -> str:
    fields = [(name, value) for name, value in asdict(request).items() if value is not None]
    return ", ".join(f"{name} {value!r}" for name, value in fields) or "no salt, key or adapter"


def _as_json(answer: Answer) -> str:
    question = answer.question
    return json.dumps(
        {
            "n_tokens": len(question.tokens) // 4,
            "page_size": question.page_size,
            "storage_namespace": question.storage_namespace,
            "request": asdict(question.request),
            "looked_into": sorted(question.others),
            "n_pages": answer.n_pages,
            "n_stored": answer.n_stored,
            "n_present": answer.n_present,
            "n_usable": answer.n_usable,
            "cut_by": answer.cut_by,
            "groups": [asdict(group) for group in answer.groups],
            "miss": None if answer.miss is None else asdict(answer.miss),
        },
        indent=2,
    )
