"""Rich renderables as plain text."""

from __future__ import annotations

from io import StringIO
from typing import Any

_WIDTH = 160


def as_text(renderable: Any) -> str:
    """Return what a terminal of 160 columns without colours would show."""
    from rich.console import Console

    console = Console(file=StringIO(), width=_WIDTH, color_system=None)
    console.print(renderable)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())  # type: ignore[attr-defined]
