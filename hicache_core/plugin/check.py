"""Checks that installed backends load, in child processes, so that the caller imports none.

``python -m hicache_core.plugin.check KIND NAME`` is the child.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from hicache_core.config.redact import masked_text
from hicache_core.errors import PluginError
from hicache_core.plugin.manager import BackendInfo, backend_class, transfer_backend_class

_MARK = "hicache-plugin-check:"


def check_backends(infos: Sequence[BackendInfo], timeout_s: float = 30.0) -> list[BackendInfo]:
    """``infos`` with the status ``ok`` or ``broken``, in the same order.

    Each backend with status ``installed`` is loaded in a child process of its own, two at a time.
    One that raises, exits, crashes or hangs becomes ``broken`` and does not affect the others.
    """
    with ThreadPoolExecutor(max_workers=2) as threads:
        return list(threads.map(lambda info: _check(info, timeout_s), infos))


def _check(info: BackendInfo, timeout_s: float) -> BackendInfo:
    if info.status != "installed":
        return info
    path = os.pathsep.join(entry for entry in sys.path if entry)
    try:
        child = subprocess.run(
            [sys.executable, "-P", "-m", __name__, info.kind, info.name],
            env=os.environ | {"PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout_s,
            check=False,
            encoding="utf-8",
            errors="replace",
        )
    except subprocess.TimeoutExpired:
        return replace(info, status="broken", error=f"did not load within {timeout_s:g} s")
    answers = [line for line in child.stdout.splitlines() if line.startswith(_MARK)]
    if not answers:
        error = f"loading it ended the process (exit status {child.returncode})"
        return replace(info, status="broken", error=error)
    error = answers[0].removeprefix(_MARK).strip()
    return replace(info, status="broken" if error else "ok", error=error)


def main(kind: str, name: str) -> None:
    """Loads a backend and prints one marked line, with its error or empty."""
    error = ""
    with contextlib.redirect_stdout(sys.stderr):  # what a plugin prints is not our answer
        try:
            transfer_backend_class(name) if kind == "transfer" else backend_class(name)
        except PluginError as failure:
            error = masked_text(" ".join(str(failure).split()))
    print(_MARK, error, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
