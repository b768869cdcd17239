"""Read one stored object: its header in words, or its bytes into a file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import click

from hicache_core.cli._backend import BackendChoice, names_backend
from hicache_core.cli._cache_choice import described
from hicache_core.cli._out_file import OutFile
from hicache_core.storage.base import Buffer
from hicache_core.storage.manifest import MANIFEST_HASH, Manifest, decode
from hicache_core.storage.scrub import GOOD, UNKNOWN, classify
from hicache_core.storage.sealed import HEADER_NBYTES
from hicache_core.testing.recipe import NAMESPACE
from hicache_core.types import BackendContext

_VERDICTS = {
    GOOD: "good: header, key, length and checksum are right",
    "corrupt": "damaged: the checksum differs; hicache scrub removes it",
    "foreign": "sealed for another key: somebody copied or renamed it",
    "wrong_length": "cut short, or not as long as its header says",
    "wrong_version": "sealed by another version of HiCache",
    UNKNOWN: "none: it is not a page of HiCache",
}


@click.command("get")
@names_backend()
@click.argument("key")
@click.option("--out", "out_file", type=OutFile(), help="Write the object here, as it is stored.")
@click.option("--payload", is_flag=True, help="With --out: without the header of 64 bytes.")
@click.option(
    "--max-object-nbytes", default=0, help="Bytes of a stored page; some backends need it."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def command(
    ctx: click.Context,
    *,
    backend: BackendChoice,
    key: str,
    out_file: Path | None,
    payload: bool,
    max_object_nbytes: int,
    as_json: bool,
) -> None:
    """Read the object under KEY from the backend NAME, and say what it is.

    The exit status is 1 if there is no such object, or if its seal is wrong; it is written to --out
    all the same.
    """
    with backend.reading(BackendContext(NAMESPACE, object_nbytes=max_object_nbytes)) as store:
        value = store.get(key)
    verdict = classify(key, value)
    if value is None:
        click.echo(f"no object has the key {key}", err=True)
        ctx.exit(1)
    data = memoryview(value).cast("B")
    if out_file is not None:
        out_file.write_bytes(data[HEADER_NBYTES if payload else 0 :])
    manifest = _manifest(key, value) if verdict == GOOD else None
    if as_json:
        fields = None if manifest is None else {**manifest.fields, **manifest.told}
        said = {"key": key, "nbytes": data.nbytes, "seal": verdict, "manifest": fields}
        click.echo(json.dumps(said, indent=2))
    else:
        click.echo("\n".join(_lines(key, data.nbytes, verdict, manifest)))
    ctx.exit(0 if verdict == GOOD else 1)


def _manifest(key: str, value: Buffer) -> Manifest | None:
    """The manifest that a good object holds; None if it is a page."""
    namespace, _, name = key.partition("/")
    if name != MANIFEST_HASH:
        return None
    return decode(namespace, memoryview(value).cast("B")[HEADER_NBYTES:])


def _lines(key: str, nbytes: int, verdict: str, manifest: Manifest | None) -> Iterator[str]:
    namespace, _, name = key.partition("/")
    yield f"namespace  {namespace}"
    yield f"name       {name}"
    sealed = verdict != UNKNOWN and nbytes >= HEADER_NBYTES
    parts = f": header {HEADER_NBYTES}, payload {nbytes - HEADER_NBYTES:,}" if sealed else ""
    yield f"bytes      {nbytes:,}{parts}"
    yield f"seal       {_VERDICTS[verdict]}"
    if manifest is not None:
        yield f"manifest   {described(manifest)}"
