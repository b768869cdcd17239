"""The type of an option that names an output file; it is checked before the work begins."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click


class OutFile(click.Path):
    """A path that can be written: its folder exists, and folder and file are writable.

    This is checked when the command line is parsed, not after the run.
    """

    def __init__(self) -> None:
        """The file itself need not exist yet."""
        super().__init__(dir_okay=False, writable=True, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        # docstring inherited; a path that cannot be written is a usage error
        file = Path(os.fsdecode(super().convert(value, param, ctx)))
        folder = file.absolute().parent
        if not folder.is_dir():
            self.fail(f"cannot write {file}: there is no folder {folder}", param, ctx)
        if not file.exists() and not os.access(folder, os.W_OK):
            self.fail(f"cannot write {file}: the folder {folder} is read-only", param, ctx)
        return file
