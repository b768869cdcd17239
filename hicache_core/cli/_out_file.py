"""The type of an option that names a file to write, checked before the work begins."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click


class OutFile(click.Path):
    """A file that can be written: its folder is there, and neither forbids it.

    Found out when the command line is read, not when the run is over.
    """

    def __init__(self) -> None:
        """A path that need not exist yet."""
        super().__init__(dir_okay=False, writable=True, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """The path; fails with one sentence if it cannot be written."""
        file = Path(os.fsdecode(super().convert(value, param, ctx)))
        folder = file.absolute().parent
        if not folder.is_dir():
            self.fail(f"cannot write {file}: there is no folder {folder}", param, ctx)
        if not file.exists() and not os.access(folder, os.W_OK):
            self.fail(f"cannot write {file}: the folder {folder} is read-only", param, ctx)
        return file
