"""Writing what is exported."""

from __future__ import annotations

from pathlib import Path

from bwsk_fx.errors import BwskError


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in UTF-8.

    Raises:
        BwskError: The file cannot be written.
    """
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise BwskError(f"{path} cannot be written: {error.strerror}; name a file in a folder that exists") from error
