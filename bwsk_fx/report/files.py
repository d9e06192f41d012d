"""Writing what is exported."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from bwsk_fx.errors import BwskError


def replace_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8 under a temporary name, and rename it, so that no half of it is left.

    Raises:
        OSError: The file cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError:
        with suppress(OSError):
            partial.unlink()
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all.

    Raises:
        BwskError: The file cannot be written.
    """
    try:
        replace_text(Path(path), text)
    except OSError as error:
        raise BwskError(f"{path} cannot be written: {error.strerror}; name a file in a folder that exists") from error
