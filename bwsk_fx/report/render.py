"""Reports outside of a terminal: as plain text, and as HTML for notebooks."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from io import StringIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

COLUMNS = 100
# Without code's own colours, so that a notebook's theme decides; wide tables scroll.
_HTML = '<pre style="white-space:pre;overflow-x:auto;line-height:1.2">{code}</pre>\n'


class Printable:
    """A report that prints with `rich`, with `print` in 100 columns, and in notebooks."""

    def __str__(self) -> str:
        return as_text(self)

    def _repr_html_(self) -> str:
        return as_html(self)


def wrapped(lines: Iterable[str]) -> str:
    """Return lines of text, those of more than 100 columns broken at spaces."""
    return "\n".join(part for line in lines for part in textwrap.wrap(line, COLUMNS, subsequent_indent="  ") or [line])


def as_text(renderable: Any) -> str:
    """Return what a terminal of 100 columns without colours would show."""
    return "\n".join(line.rstrip() for line in _printed(renderable).export_text().splitlines())


def as_html(renderable: Any) -> str:
    """Return the same as an HTML element, with what HTML reads as markup escaped."""
    return _printed(renderable).export_html(inline_styles=True, code_format=_HTML)


def _printed(renderable: Any) -> Console:
    from rich.console import Console

    console = Console(file=StringIO(), width=COLUMNS, record=True, highlight=False, force_jupyter=False)
    console.print(renderable)
    return console
