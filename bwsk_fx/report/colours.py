"""One colour per label, of Okabe and Ito (2008, "Color Universal Design"), told apart in colour blindness, too."""

from __future__ import annotations

from collections.abc import Mapping

from bwsk_fx.verdict import Label

LABEL_COLOURS: Mapping[Label, str] = {Label.S: "#56b4e9", Label.K: "#e69f00", Label.GRAY: "#bbbbbb"}
# Of nodes that no summary counts: inputs, attributes, sizes, outputs.
UNCOUNTED = "#f2f2f2"
INK = "#222222"


def colour_of(label: Label, counted: bool) -> str:
    """Return the colour in which a node is drawn."""
    return LABEL_COLOURS[label] if counted else UNCOUNTED
