"""Draw a result of `train_vit.py`: loss curves on the left, peak over step time on the right.

Drawing alone:

python benchmarks/train_vit_plot.py benchmarks/results/train-vit-cpu.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

SMOOTHING = 20
COLOURS = {"conventional": "black", "analyzed": "tab:blue", "checkpoint per block": "tab:green"}


def plot(path: Path) -> Path:
    """Draw the result file `path` to a PNG file beside it, and return the latter."""
    result = json.loads(path.read_text(encoding="utf-8"))
    figure = Figure(figsize=(14, 5.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    colours = _colours(result["rows"])
    _draw_losses(left, result["rows"], colours)
    _draw_costs(right, result["rows"], colours)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    settings = result["settings"]
    figure.suptitle(
        f"ViT of {settings['layers']} layers × {settings['hidden']}, batch {settings['batch']}, {settings['image']} "
        f"pixels, {settings['precision']}, from scratch on the enlarged digits; {result['device']}, "
        f"torch {result['torch']}",
        fontsize=10,
    )
    target, partial = path.with_suffix(".png"), path.with_suffix(".partial.png")
    figure.savefig(partial, dpi=130)
    partial.rename(target)
    return target


def running_mean(values: Sequence[float]) -> list[float]:
    """Return the mean of each value and those before it, of so many as make a curve readable."""
    windows = (values[max(0, end - SMOOTHING) : end] for end in range(1, len(values) + 1))
    return [sum(window) / len(window) for window in windows]


def _colours(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    reversible = [row["variant"] for row in rows if row["variant"] not in COLOURS]
    shades = colormaps["autumn"]
    return COLOURS | {name: shades(0.7 * place / max(1, len(reversible) - 1)) for place, name in enumerate(reversible)}


def _draw_losses(axes: Axes, rows: Sequence[dict[str, Any]], colours: dict[str, Any]) -> None:
    for place, row in enumerate(rows):
        # The curves lie on top of each other; wider lines below show through.
        width = 1.0 + 0.9 * (len(rows) - 1 - place)
        axes.plot(running_mean(row["losses"]), color=colours[row["variant"]], linewidth=width, label=row["variant"])
    axes.set(xlabel="step", ylabel=f"training loss (mean of {SMOOTHING} steps)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)


def _draw_costs(axes: Axes, rows: Sequence[dict[str, Any]], colours: dict[str, Any]) -> None:
    for row in rows:
        axes.errorbar(
            row["step"], row["peak MiB"], xerr=row["step IQR"] / 2, fmt="o", color=colours[row["variant"]], capsize=2
        )
    axes.set(xlabel="step time / conventional (median, interquartile range)", ylabel="peak of a step (MiB)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(f"drawn to {plot(Path(name)).name}")
