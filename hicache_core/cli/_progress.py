"""Progress of a command, for those who watch it."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import Progress, ProgressColumn


def watched(*columns: ProgressColumn) -> Progress:
    """Progress on stderr, which goes when it ends; nothing unless stderr is a terminal.

    Args:
        columns: what it shows.
    """
    return Progress(
        *columns,
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=sys.stdout.isatty(),  # what is piped goes on to its pipe
        disable=not sys.stderr.isatty(),
    )
