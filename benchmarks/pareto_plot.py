"""Draw a result of `pareto.py`: memory over step time, kept bytes on the left and the peak on the right.

Drawing alone:

python benchmarks/pareto_plot.py benchmarks/results/pareto-cpu.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke

matplotlib.use("Agg")
from matplotlib import pyplot

PANELS = {"kept MiB": "kept for the backward pass (MiB)", "peak MiB": "peak of forward and backward pass (MiB)"}


@dataclass(frozen=True)
class Style:
    """How the points of a method look, and on which side of the mark their labels are."""

    colour: str
    marker: str
    side: str = "right"


STYLES = {
    "eager": Style("black", "*"),
    "bwsk-fx": Style("tab:red", "o", "left"),
    "bwsk-fx without inverses": Style("tab:orange", "s"),
    "bwsk-fx by Inductor": Style("tab:pink", "X", "left"),
    "bwsk-fx backend": Style("tab:brown", "h", "above"),
    "checkpoint per block": Style("tab:blue", "^"),
    "selective checkpoint": Style("tab:cyan", "v"),
    "torch.compile": Style("tab:green", "D", "above"),
    "memory sharing": Style("tab:purple", "P"),
}
PLACES = {"left": ((-7, -3), "right"), "right": ((7, -3), "left"), "above": ((0, 7), "center")}
HALO = [withStroke(linewidth=2.5, foreground="white")]
# Gradients that are further from float64 than this, in distances of eager's, are approximations.
APPROXIMATE = 2.0


def plot(path: Path) -> Path:
    """Draw the result file `path` to a PNG file beside it, and return the latter."""
    result = json.loads(path.read_text(encoding="utf-8"))
    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(14, 6.5), layout="constrained")
    for panel, (column, title) in zip(axes, PANELS.items(), strict=True):
        _draw(panel, result["rows"], column)
        panel.set(xlabel="step time / eager's (median; thin bars are as long as the interquartile range)", ylabel=title)
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(_title(result), fontsize=10)
    target = path.with_suffix(".png")
    partial = path.with_suffix(".partial.png")
    figure.savefig(partial, dpi=130)
    pyplot.close(figure)
    partial.rename(target)
    return target


def _draw(panel: Axes, rows: Sequence[dict[str, Any]], column: str) -> None:
    for method, style in STYLES.items():
        timed = [row for row in rows if row["method"] == method and row["ratio"] is not None]
        points = [row for row in timed if row[column] is not None]
        if points:
            _draw_method(panel, points, column, style)
    missing = {row["method"] for row in rows if row["ratio"] is None or row[column] is None}
    if missing:
        text = f"not known here: {', '.join(sorted(missing))}"
        panel.text(0.01, 0.01, text, transform=panel.transAxes, fontsize=8, color="grey")


def _draw_method(panel: Axes, points: Sequence[dict[str, Any]], column: str, style: Style) -> None:
    x, y = [row["ratio"] for row in points], [row[column] for row in points]
    spread = [row["ratio IQR"] / 2 for row in points]
    panel.errorbar(x, y, xerr=spread, color=style.colour, elinewidth=0.6, alpha=0.4, linestyle="none")
    panel.plot(x, y, color=style.colour, marker=style.marker, linewidth=1.2, label=points[0]["method"])
    offset, alignment = PLACES[style.side]
    place: dict[str, Any] = {"textcoords": "offset points", "xytext": offset, "ha": alignment}
    look: dict[str, Any] = {"color": style.colour, "fontsize": 8, "path_effects": HALO}
    for row in points:
        panel.annotate(_label(row), (row["ratio"], row[column]), **place, **look)


def _label(row: dict[str, Any]) -> str:
    if row["error"] <= APPROXIMATE:
        return row["setting"]
    return f"{row['setting']} (gradient error {row['error']:.0f} × eager's)"


def _title(result: dict[str, Any]) -> str:
    settings = result["settings"]
    shape = "{layers} layers, width {hidden}, batch {batch}, {image} px, {precision}".format(**settings)
    return f"ViT training step: {shape}; {result['device']}; torch {result['torch']}; {settings['rounds']} rounds"


if __name__ == "__main__":
    print(plot(Path(sys.argv[1])))
