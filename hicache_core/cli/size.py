"""Calculate what a model's KV takes: bytes a token, and what a size of the host tier holds."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from hicache_core.cli._columns import columns
from hicache_core.cli._stored import size_words
from hicache_core.engine.user_cache import user_cache
from hicache_core.errors import ConfigError, PluginError
from hicache_core.kv.model_config import read_model_config, spec_of_config, spec_of_numbers
from hicache_core.kv.spec import DTYPE_NBYTES, Group, GroupKind, KVSpec
from hicache_core.plugin.manager import backend_class, list_backends
from hicache_core.storage.sealed import HEADER_NBYTES

GB = 10**9
_POSITIVE = click.IntRange(min=1)


@dataclass(frozen=True, slots=True)
class Part:
    """The full pages of a model, or one of its groups.

    Attributes:
        name: ``full`` or the name of the group.
        kind: what it is, in words.
        n_layers: layers that keep it.
        token_nbytes: bytes a token; 0 for a state.
        unit_nbytes: bytes of a page, or of a snapshot.
        n_needed: units that a conversation needs to be continued.
    """

    name: str
    kind: str
    n_layers: int
    token_nbytes: int
    unit_nbytes: int
    n_needed: int

    @property
    def object_nbytes(self) -> int:
        """Bytes of a stored unit, header included."""
        return HEADER_NBYTES + self.unit_nbytes

    @property
    def needed_nbytes(self) -> int:
        """Bytes that a conversation needs of it to be continued."""
        return self.n_needed * self.unit_nbytes


@click.command("size")
@click.option(
    "--model",
    metavar="FOLDER|NAME",
    help="Folder of a model, its config.json, or ORG/NAME in the cache of a hub.",
)
@click.option("--layers", type=_POSITIVE, help="Without --model: layers that keep KV.")
@click.option("--kv-heads", type=_POSITIVE, help="Without --model: heads of keys and values.")
@click.option("--head-dim", type=_POSITIVE, help="Without --model: width of a head.")
@click.option("--window", type=_POSITIVE, help="Without --model: tokens of a window.")
@click.option("--window-layers", type=_POSITIVE, help="Without --model: layers that have it.")
@click.option(
    "--dtype",
    type=click.Choice(list(DTYPE_NBYTES)),
    help="dtype of the KV. Default: that of the weights, or bfloat16 without --model.",
)
@click.option("--state-nbytes", type=_POSITIVE, help="Bytes of a snapshot of all states.")
@click.option(
    "--page-size", type=_POSITIVE, default=64, show_default=True, help="Tokens in a page."
)
@click.option(
    "--tp", type=_POSITIVE, default=1, show_default=True, help="Ranks that share the KV heads."
)
@click.option(
    "--hicache-size",
    "size_gb",
    type=click.FloatRange(min=0, min_open=True),
    help="Size of the host tier in GB (10^9 bytes), of each rank.",
)
@click.option(
    "--length",
    type=_POSITIVE,
    default=4096,
    show_default=True,
    help="Tokens of a conversation.",
)
@click.option(
    "--backend",
    "backends",
    multiple=True,
    metavar="NAME",
    help="What a page costs there. May be repeated. Default: all that are installed.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    *,
    page_size: int,
    size_gb: float | None,
    length: int,
    backends: tuple[str, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Calculate bytes a token, what the host tier holds, and what a page costs in each backend.

    The model is a folder with a config.json, or a few numbers; no weights are read. Numbers are of
    one rank. The device tier and the host tier hold the same bytes a token, storage has 64 more for
    each page.
    """
    spec = _spec(options)
    parts = _parts(spec, page_size, length)
    costs = _costs(parts, backends)
    if as_json:
        click.echo(json.dumps(_as_json(parts, costs, page_size, length, size_gb), indent=2))
    else:
        click.echo("\n".join(_lines(parts, costs, page_size, length, size_gb)))


def _spec(options: Mapping[str, Any]) -> KVSpec:
    """The spec that the options describe.

    Raises:
        ConfigError: there are both a model and numbers, or neither.
        SpecError: they do not describe a model's KV.
    """
    names = ("layers", "kv_heads", "head_dim")
    given = [name for name in names if options[name]]
    if bool(options["model"]) == bool(given) or len(given) not in (0, len(names)):
        raise ConfigError("give --model, or --layers, --kv-heads and --head-dim")
    if options["model"]:
        spec = spec_of_config(
            read_model_config(_found(options["model"])),
            dtype=options["dtype"],
            state_nbytes=options["state_nbytes"],
        )
    else:
        spec = spec_of_numbers(
            layers=options["layers"],
            kv_heads=options["kv_heads"],
            head_dim=options["head_dim"],
            dtype=options["dtype"] or "bfloat16",
            window=options["window"] or 0,
            window_layers=options["window_layers"] or 0,
        )
    first, end, n_heads = spec.heads
    tp = options["tp"]
    if tp == 1 or n_heads == 1:  # one head, or a latent, is on every rank
        return spec
    if (end - first) % tp:
        raise ConfigError(f"--tp {tp}: the {n_heads} KV heads cannot be divided by it")
    return spec.shard(heads=(0, n_heads // tp))


def _found(model: str) -> Path:
    """The path of a model's config: as given, or in the cache of the hub.

    Raises:
        ConfigError: there is none.
    """
    path = Path(model).expanduser()
    if path.exists():
        return path
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    hub = Path(os.environ.get("HF_HUB_CACHE", home / "hub")).expanduser()
    folder = hub / f"models--{model.replace('/', '--')}" / "snapshots"
    newest = sorted(folder.glob("*/config.json"), key=lambda file: file.stat().st_mtime)
    if not newest:
        kept = user_cache("models")
        raise ConfigError(
            f"--model {model}: there is no such folder, nor such a model in {hub}; of a GGUF file "
            f"or packaged weights give the folder that serving them leaves in {kept}, or numbers"
        )
    return newest[-1]


def _parts(spec: KVSpec, page_size: int, length: int) -> list[Part]:
    """The full pages, if there are any, and the groups."""
    n_pages = length // page_size
    parts = []
    if spec.components:
        n_layers = _n_layers(spec)
        nbytes = spec.page_nbytes(page_size)
        parts = [Part("full", "all tokens", n_layers, spec.token_nbytes, nbytes, n_pages)]
    return parts + [_part_of(group, page_size, n_pages) for group in spec.groups]


def _part_of(group: Group, page_size: int, n_pages: int) -> Part:
    is_state = group.kind is GroupKind.STATE
    return Part(
        group.name,
        "a state" if is_state else f"a window of {group.window}",
        _n_layers(group.spec),
        0 if is_state else group.spec.token_nbytes,
        group.spec.page_nbytes(group.page_size(page_size)),
        n_pages - group.first_needed(n_pages, page_size),
    )


def _n_layers(spec: KVSpec) -> int:
    return len({layer for one in spec.components for layer in spec.layers_of(one)})


def _costs(parts: Sequence[Part], names: Sequence[str]) -> dict[str, list[int]]:
    """The bytes that each backend takes for an object of each part, by name.

    Raises:
        PluginError: a backend that was named is not installed or does not load.
    """
    found = {}
    for name in names or [info.name for info in list_backends()]:
        try:
            cls = backend_class(name)
        except PluginError:
            if names:
                raise
            continue
        found[name] = [cls.taken_nbytes(part.object_nbytes) for part in parts]
    return found


def _lines(
    parts: Sequence[Part],
    costs: Mapping[str, Sequence[int]],
    page_size: int,
    length: int,
    size_gb: float | None,
) -> Iterator[str]:
    header = ("GROUP", "WHAT", "LAYERS", "BYTES A TOKEN", "BYTES A UNIT", f"FOR {length:,} TOKENS")
    rows = [
        (
            part.name,
            part.kind,
            f"{part.n_layers}",
            f"{part.token_nbytes:,}" if part.token_nbytes else "–",
            f"{part.unit_nbytes:,}",
            f"{part.n_needed:,} units, {size_words(part.needed_nbytes)}",
        )
        for part in parts
    ]
    yield columns([header, *rows])
    yield f"A unit is a page of {page_size} tokens, or one snapshot of a state."
    needed = sum(part.needed_nbytes for part in parts)
    yield f"To go on with a conversation of {length:,} tokens takes {size_words(needed)}."
    if size_gb is not None and needed:
        n = int(size_gb * GB) // needed
        yield (
            f"A host tier of {size_gb:g} GB holds {_tokens(parts, size_gb, page_size, length):,} "
            f"tokens: {n:,} such conversations."
        )
    yield ""
    yield columns(
        [
            ("BACKEND", *(f"{part.name.upper()}, STORED" for part in parts)),
            *_cost_rows(parts, costs),
        ]
    )


def _cost_rows(
    parts: Sequence[Part], costs: Mapping[str, Sequence[int]]
) -> Iterator[Sequence[str]]:
    for name, taken in costs.items():
        yield (
            name,
            *(
                f"{n:,} ({n / max(part.unit_nbytes, 1):.3g} ×)"
                for n, part in zip(taken, parts, strict=True)
            ),
        )


def _tokens(parts: Sequence[Part], size_gb: float, page_size: int, length: int) -> int:
    """Tokens that a host tier holds: whole pages, or of models with groups whole conversations."""
    if len(parts) == 1 and parts[0].token_nbytes:
        return int(size_gb * GB) // parts[0].unit_nbytes * page_size
    return int(size_gb * GB) // sum(part.needed_nbytes for part in parts) * length


def _as_json(
    parts: Sequence[Part],
    costs: Mapping[str, Sequence[int]],
    page_size: int,
    length: int,
    size_gb: float | None,
) -> dict[str, object]:
    needed = sum(part.needed_nbytes for part in parts)
    said: dict[str, object] = {
        "page_size": page_size,
        "groups": {
            part.name: {
                "what": part.kind,
                "layers": part.n_layers,
                "token_nbytes": part.token_nbytes,
                "unit_nbytes": part.unit_nbytes,
                "object_nbytes": part.object_nbytes,
                "units": part.n_needed,
            }
            for part in parts
        },
        "conversation": {"tokens": length, "nbytes": needed},
        "stored_nbytes": {
            name: dict(zip((part.name for part in parts), taken, strict=True))
            for name, taken in costs.items()
        },
    }
    if size_gb is not None and needed:
        said["host"] = {
            "nbytes": int(size_gb * GB),
            "tokens": _tokens(parts, size_gb, page_size, length),
            "conversations": int(size_gb * GB) // needed,
        }
    return said
