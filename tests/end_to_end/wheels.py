"""Virtual environments made of our wheels, without the repository on any path."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PLUGINS = sorted(path.parent for path in ROOT.glob("plugins/*/pyproject.toml"))
CONSTRAINTS = ROOT / "constraints.txt"


@dataclass(frozen=True)
class Installed:
    """A virtual environment and the folder with our wheels."""

    venv: Path
    wheels: Path

    def environ(self, folder: Path) -> dict[str, str]:
        """The environment of a shell in it; pip finds our wheels, and versions are those of CI."""
        kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and "HICACHE" not in k}
        return kept | {
            "PATH": f"{self.venv / 'bin'}:{os.environ['PATH']}",
            "PIP_FIND_LINKS": str(self.wheels),
            "PIP_CONSTRAINT": str(CONSTRAINTS),
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PIP_QUIET": "1",
            "PYTHONWARNINGS": "error::DeprecationWarning:__main__",
            "TMPDIR": str(folder),
        }

    def run(self, command: str, *arguments: str | Path, cwd: Path) -> str:
        """Runs a command of the environment; what it printed on stdout."""
        result = subprocess.run(
            [self.venv / "bin" / command, *map(str, arguments)],
            cwd=cwd,
            env=self.environ(cwd),
            capture_output=True,
            text=True,
            check=False,
            timeout=280,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    def install(self, *what: str | Path) -> None:
        """``pip install`` into it."""
        self.run("python", "-m", "pip", "install", *what, cwd=self.venv)


def built(folder: Path) -> Path:
    """A folder with the wheels of the core and of every plugin."""
    wheels = folder / "dist"
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "wheel"]
    build = [*pip, "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels)]
    subprocess.run([*build, ROOT, *PLUGINS], cwd=folder, check=True, timeout=280)
    assert len(list(wheels.glob("hicache_*.whl"))) == 1 + len(PLUGINS)
    return wheels


def environment(folder: Path, wheels: Path) -> Installed:
    """A fresh virtual environment in ``folder``, with nothing installed yet."""
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True, timeout=280)
    return Installed(folder / "venv", wheels)
