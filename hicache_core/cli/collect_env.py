"""Print what a bug report needs: versions, plugins, the machine, environment variables."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import Any

import click

from hicache_core.cli._columns import columns
from hicache_core.cli.version import NATIVE, implementation
from hicache_core.config.redact import MASK, looks_secret, masked, masked_text
from hicache_core.plugin.check import check_backends
from hicache_core.plugin.manager import list_backends, list_transfer_backends
from hicache_core.pools.limits import memory_limits

PACKAGES = """
    hicache-core pluggy pydantic click xxhash numpy torch triton transformers accelerate gguf
    fastapi starlette uvicorn httpx prometheus-client pyzmq msgpack opentelemetry-api
    sglang vllm lmcache redis hiredis boto3 obstore
    mooncake-transfer-engine mooncake-transfer-engine-non-cuda
""".split()  # noqa: SIM905 - a list of this length reads better as text
ENGINE_GROUPS = ("sglang.srt.plugins", "vllm.general_plugins")
PREFIXES = tuple(
    """
    HICACHE_ SGLANG_ VLLM_ LMCACHE_ MOONCAKE_ MC_ AWS_ REDIS_ CUDA_ NVIDIA_ NCCL_ GLOO_ TORCH
    PYTORCH_ OMP_ MKL_ OPENBLAS_ HF_ TRANSFORMERS_ OTEL_ PROMETHEUS_ MALLOC_ PYTHON LD_
    """.split()  # noqa: SIM905 - likewise
)
_TORCH_TIMEOUT_S = 120.0
_TORCH = """
import json, torch
gpus = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
print(json.dumps({"version": torch.__version__, "cuda": torch.version.cuda,
    "threads": torch.get_num_threads(), "gpus": gpus}))
"""


@click.command("collect-env")
@click.option(
    "--check/--no-check",
    default=True,
    show_default=True,
    help="Load each plugin and torch in a child process. --no-check only reads package metadata.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(*, check: bool, as_json: bool) -> None:
    """Print versions, plugins with their entry points, the machine and environment variables.

    Only variables that concern HiCache, engines, stores and GPUs are shown. Values that look secret
    are masked, and so are the passwords of URLs and of JSON in a value.
    """
    report = _report(check=check)
    click.echo(json.dumps(report, indent=2) if as_json else "\n\n".join(_sections(report)))


def _report(*, check: bool) -> dict[str, Any]:
    infos = [*list_backends(), *list_transfer_backends()]
    if check:
        infos = check_backends(infos)
    return {
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "platform": platform.platform(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory": _memory(),
        "torch": _torch() if check else {},
        "native": {part: implementation(module) for part, module in NATIVE.items()},
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "plugins": [masked(asdict(info)) for info in infos],
        "engine_plugins": [
            {"group": group, "name": point.name, "entry_point": point.value}
            for group in ENGINE_GROUPS
            for point in entry_points(group=group)
        ],
        "environment": shown_environment(os.environ),
    }


def _memory() -> dict[str, object]:
    """The tightest limit on memory and what is left of it; empty if none can be read."""
    limits = memory_limits()
    return asdict(min(limits, key=lambda limit: limit.available_nbytes)) if limits else {}


def shown_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that matter to HiCache, by name, without secrets."""
    names = sorted(name for name in environ if name.startswith(PREFIXES))
    return {name: _shown(name, environ[name]) for name in names}


def _shown(name: str, value: str) -> str:
    if looks_secret(name) or "HEADERS" in name:  # OTEL_EXPORTER_OTLP_HEADERS holds credentials
        return MASK
    if value.lstrip()[:1] not in ("{", "["):
        # Several words may be the options of a command, with a password among them.
        return MASK if len(value.split()) > 1 else masked_text(value)
    try:
        return json.dumps(masked(json.loads(value)))
    except ValueError:  # what cannot be read cannot be masked in part
        return MASK


def _torch() -> dict[str, object]:
    """What torch says of itself and of the GPUs, in a child: it may not load, or hang."""
    try:
        child = subprocess.run(
            [sys.executable, "-c", _TORCH],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_TORCH_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"it did not load within {_TORCH_TIMEOUT_S:.0f} s"}
    if child.returncode:
        last = child.stderr.strip().splitlines()[-1:] or [f"exit status {child.returncode}"]
        return {"error": masked_text(last[0])}
    found: dict[str, object] = json.loads(child.stdout.splitlines()[-1])
    return found


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _sections(report: Mapping[str, Any]) -> Iterator[str]:
    """The report as text: a table for each part."""
    facts = [("python", report["python"]), ("platform", report["platform"])]
    facts.append(("cpus", str(report["cpus"])))
    if memory := report["memory"]:
        left = f"{memory['available_nbytes'] / 1e9:.1f} GB left ({memory['name']})"
        facts.append(("memory", left))
    facts += [(f"torch {key}", _text(value)) for key, value in report["torch"].items()]
    facts += report["native"].items()
    yield columns(facts)
    yield columns([("PACKAGE", "VERSION"), *report["packages"].items()])
    keys = ("name", "kind", "distribution", "version", "module", "status", "error")
    rows = [[str(plugin[key]) for key in keys] for plugin in report["plugins"]]
    yield columns([("BACKEND", *(key.upper() for key in keys[1:])), *rows])
    engines = [list(plugin.values()) for plugin in report["engine_plugins"]]
    if engines:
        yield columns([("ENGINE PLUGIN OF", "NAME", "ENTRY POINT"), *engines])
    yield columns([("VARIABLE", "VALUE"), *report["environment"].items()])


def _text(value: object) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
