"""The look of tables of nodes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def plain_table(title: str, headings: Sequence[str], left: Collection[str]) -> Table:
    """Return an empty table with narrow gaps.

    Args:
        title: What is above it.
        headings: Its columns.
        left: Those that hold words; the others hold numbers.
    """
    from rich import box
    from rich.table import Table

    gaps = (0, 1, 0, 0)
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=gaps)
    for heading in headings:
        table.add_column(heading, justify="left" if heading in left else "right", overflow="fold")
    return table


def amount(value: float | None) -> str:
    """Return a number in words; nothing for None and for zero."""
    return f"{value:,.0f}" if value else ""


def place(module: str, what: str, source: str = "") -> str:
    """Return what is called in which module, and below that the line of the model's code, without its folder."""
    words = " ".join(part for part in (module, what) if part)
    # Side by side they would not fit 100 columns.
    return f"{words}\n  {Path(source).name}" if source else words
