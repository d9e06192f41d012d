"""The comparison over seeds as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from bwsk_fx.training import card
from bwsk_fx.training.comparison import Comparison

# What fits into 80 columns.
_ESSENTIAL = ("variant", "test accuracy (%)", "step time (ms)", "kept (MiB)", "peak (MiB)")


def comparison_tables(comparison: Comparison, width: int) -> Iterator[Table]:
    """Means over the seeds, then a table for every variant that has a conventional one beside it.

    Args:
        comparison: what the tables show.
        width: columns of the terminal; where not everything fits, only essential means are shown.
    """
    rows = card.seed_rows(comparison)
    seeds = ", ".join(map(str, comparison.seeds))
    title = f"means over seeds {seeds}" if len(comparison.seeds) > 1 else f"seed {seeds}"
    whole = _table(title, card.SEED_HEADINGS, rows)
    yield whole if _width(whole) <= width else _table(title, card.SEED_HEADINGS, rows, _ESSENTIAL)
    for variant, group in groupby(card.paired_rows(comparison), key=lambda row: row[0]):
        baseline = variant.split("-")[0] + "-conventional"
        yield _table(f"{variant} minus {baseline}, paired", card.PAIRED_HEADINGS[1:], [row[1:] for row in group])


def _table(
    title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], shown: Sequence[str] | None = None
) -> Table:
    shown = headings if shown is None else shown
    padding = (0, int(shown is headings), 0, 0)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=padding)
    table.title, table.title_justify = Text(title), "left"
    for heading in shown:
        text = heading if heading == "metric" else heading.replace(" ", "\n")
        table.add_column(text, justify="left" if heading == headings[0] else "right", no_wrap=True)
    for row in rows:
        cells = dict(zip(headings, row, strict=True))
        table.add_row(*(cells[heading] for heading in shown))
    return table


def _width(table: Table) -> int:
    console = Console(width=1000)
    return Measurement.get(console, console.options, table).maximum
