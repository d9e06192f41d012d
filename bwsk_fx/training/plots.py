"""Plots of a run: training loss, validation accuracy, and memory of a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

Results = Mapping[str, Mapping[str, Any]]

_COLOURS = {"conventional": "#b4bdc4", "bwsk_analyzed": "#2a7fba", "bwsk_reversible": "#d1662b"}
# Modes often lie on top of each other; wider lines below show through.
_WIDTHS = {"conventional": 4.5, "bwsk_analyzed": 2.5, "bwsk_reversible": 1.2}
_LINES = {"finetune": "-", "scratch": "--"}
_SMOOTHING = 20


def draw_loss(results: Results, path: Path) -> None:
    """The training loss of every variant, as a running mean."""
    axes = _axes("training loss", "step")
    for folder, result in results.items():
        curve = result["loss_curve"]
        axes.plot(curve["step"], _running_mean(curve["loss"]), label=folder, **_style(result))
    _save(axes, path)


def draw_accuracy(results: Results, path: Path) -> None:
    """The validation accuracy of every variant."""
    axes = _axes("validation accuracy", "step")
    for folder, result in results.items():
        curve = result["accuracy_curve"]
        axes.plot(curve["step"], curve["accuracy"], marker=".", label=folder, **_style(result))
    _save(axes, path)


def draw_memory(results: Results, path: Path) -> None:
    """Bytes kept for the backward pass, and the peak of a step, side by side for every variant."""
    axes = _axes("MiB in one step", "")
    positions = range(len(results))
    saved = [result["saved_for_backward_bytes"] / 2**20 for result in results.values()]
    peak = [result["peak_memory_mb"] for result in results.values()]
    axes.bar(
        [position - 0.2 for position in positions], saved, 0.4, label="kept for the backward pass", color="#2a7fba"
    )
    axes.bar([position + 0.2 for position in positions], peak, 0.4, label="peak", color="#c9d3da")
    axes.set_xticks(list(positions), list(results), rotation=20, ha="right")
    _save(axes, path)


PLOTS: Mapping[str, Callable[[Results, Path], None]] = {
    "loss.png": draw_loss,
    "accuracy.png": draw_accuracy,
    "memory.png": draw_memory,
}


def _axes(y_label: str, x_label: str) -> Axes:
    # A figure of its own, not pyplot's: no global state and no display.
    axes = Figure(figsize=(7.5, 4.2), layout="constrained").add_subplot()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _save(axes: Axes, path: Path) -> None:
    axes.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    figure = axes.get_figure(root=True)
    assert figure is not None  # _axes made it
    figure.savefig(path, dpi=130)


def _style(result: Mapping[str, Any]) -> dict[str, Any]:
    mode = result["mode"]
    return {"color": _COLOURS[mode], "linewidth": _WIDTHS[mode], "linestyle": _LINES[result["experiment"]]}


def _running_mean(values: list[float]) -> list[float]:
    windows = (values[max(0, end - _SMOOTHING) : end] for end in range(1, len(values) + 1))
    return [sum(window) / len(window) for window in windows]
