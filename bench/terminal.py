"""What the commands here put on a terminal; needs rich, and says so."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

try:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.table import Table
except ImportError:
    sys.exit("python -m bench needs the package rich: pip install '.[bench]' in the source tree.")

__all__ = ["Console", "Progress", "Table", "console", "progress_bar", "shown", "what_to_run"]


def what_to_run(made: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """The options that choose cases, and the group that others like them belong to."""
    what = made.add_argument_group("what to run")
    what.add_argument(
        "--only",
        action="extend",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="cases whose name contains or, with * and ?, equals PATTERN",
    )
    what.add_argument("--list", action="store_true", help="show the cases and stop")
    return what


def console() -> Console:
    """The terminal, or something wide enough where the output goes elsewhere."""
    out = Console()
    return out if out.is_terminal else Console(width=200)


def progress_bar(errors: Console) -> Progress:
    """A bar on the terminal that leaves no trace; nothing where there is no terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=errors,
        transient=True,
        disable=not errors.is_terminal,
    )


def shown(path: Path) -> str:
    """A path as the user would type it here."""
    path = path.resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
