"""What the commands of the command line share: where they print, and how their failures look."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import typer

from bwsk_fx.errors import BwskError

# Rich is imported where it is used, so that --help is quick.
if TYPE_CHECKING:
    from rich.console import Console

_FILE_WIDTH = 120


@contextmanager
def errors_as_lines() -> Iterator[None]:
    """Turns the library's errors into one line on stderr and exit code 2."""
    try:
        yield
    except BwskError as error:
        message = " ".join(str(error).split())
        typer.secho("error: ", fg=typer.colors.RED, bold=True, err=True, nl=False)
        typer.echo(message, err=True)
        raise typer.Exit(2) from error


@contextmanager
def status(label: str) -> Iterator[None]:
    """Shows on stderr what goes on during the block, where stderr is a terminal."""
    from bwsk_fx.training.processes import heard

    with make_console(stderr=True).status(label) if heard() else nullcontext():
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """Silences other libraries, and keeps them from asking the Hub where there is no network."""
    from bwsk_fx.training import quiet as manners

    manners.use_cache_when_offline()
    with manners.quiet():
        yield


def make_console(stderr: bool = False, columns: int = _FILE_WIDTH) -> Console:
    """A console of rich; in a file it has at least so many columns, by default enough for every table."""
    from rich.console import Console

    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        # Of a narrow table in a file little could be read.
        console.width = max(console.width, columns)
    return console
