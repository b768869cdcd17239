"""The environments that ``make engines`` builds, and runners in them."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.engines.child import Child

ROOT = Path(__file__).parents[2]
SGLANG = ("sglang-0.5.23", "sglang-0.5.22")
VLLM = "vllm-0.32.0"

_CODE = (ROOT, *sorted(ROOT.glob("plugins/*/src")), ROOT / "tests/engines/runners")
_ALONE = {
    "HF_HUB_OFFLINE": "1",
    "DO_NOT_TRACK": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "default",
}
_ENGINE = {
    "dynamo": {"DYN_LOG": "warn"},
    "sglang": {
        "SGLANG_USE_CPU_ENGINE": "1",
    },
    "vllm": {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "LMCACHE_TRACK_USAGE": "false",
        "LMCACHE_DISABLE_BANNER": "1",
    },
}


def program(environment: str, name: str = "python") -> Path:
    """A program of an environment, which must have been built.

    Args:
        environment: as its list in ``tests/engines/requirements`` is called.
        name: of the program.
    """
    folder = Path(os.environ.get("HICACHE_ENGINES", ROOT / ".engines")) / environment
    assert (folder / ".ready").exists(), f"there is no {folder}; `make engines` builds it"
    return folder / "bin" / name


def site_packages(environment: str) -> Path:
    """Where the packages of an environment are installed."""
    (found,) = program(environment).parents[1].glob("lib/python3*/site-packages")
    return found


def variables(environment: str, extra: Mapping[str, str]) -> dict[str, str]:
    """What the processes of an engine find in ``os.environ``; code comes from this checkout."""
    engine = environment.partition("-")[0]
    path = [*_CODE, ROOT / f"tests/engines/{engine}_on_cpu"]
    return {
        **os.environ,
        **_ALONE,
        **_ENGINE[engine],
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        **extra,
    }


@contextlib.contextmanager
def running(
    environment: str,
    folder: Path,
    *arguments: Mapping[str, Any],
    variables_of: Mapping[str, str] = {},
) -> Iterator[tuple[Child, ...]]:
    """Engines, started at once and ready, one for each of ``arguments``; killed at the end.

    Args:
        environment: where; the part before its version names the runner.
        folder: gets a log for each engine.
        arguments: the runner's, as ``tests/engines/options.py`` makes them.
        variables_of: further environment variables.
    """
    module = f"run_{environment.partition('-')[0]}"
    with contextlib.ExitStack() as killed:
        children = []
        for n, each in enumerate(arguments):
            log = folder / f"{environment}-{len(list(folder.glob('*.log')))}-{n}.log"
            command = ["-P", "-m", module, json.dumps(each)]
            environ = variables(environment, variables_of)
            children.append(Child([program(environment), *command], environ, log))
            killed.callback(children[-1].kill)
        for child in children:
            child.wait_until_ready()
        yield tuple(children)
