"""Plots of a run: training loss, validation accuracy, memory by kind, and live bytes over a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bwsk_fx.training.comparison import METRICS, Comparison, Metric, Results, Spread

COLOURS = {"conventional": "#8a959e", "bwsk_analyzed": "#2a7fba", "bwsk_reversible": "#d1662b"}
FORMATS = ("png", "svg")

# Modes often lie on top of each other; wider lines below show through.
_WIDTHS = {"conventional": 4.5, "bwsk_analyzed": 2.5, "bwsk_reversible": 1.2}
_LINES = {"finetune": "-", "scratch": "--"}
_SMOOTHING = 20
# From what is there all the time to what comes and goes: the peak of a step stands on the first two.
_KINDS = {
    "parameters and buffers": (("parameters", "buffers"), "#5b6770"),
    "optimizer": (("optimizer",), "#a3adb5"),
    "gradients": (("gradients",), "#e0b34a"),
    "weight copies": (("weight_copies",), "#7a5ba8"),
    "activations": (("activations",), "#2a7fba"),
}
_STANDING = 2
_MEAN_STYLE: Mapping[str, Any] = {"fmt": "D", "markersize": 4, "capsize": 3}


def draw_loss(results: Results) -> Figure:
    """The training loss of every variant, as a running mean."""
    axes = _one_panel("training loss", "step")
    for folder, result in results.items():
        curve = result["loss_curve"]
        axes.plot(curve["step"], _running_mean(curve["loss"]), label=folder, **_style(result))
    return _with_legend(axes)


def draw_accuracy(results: Results) -> Figure:
    """The validation accuracy of every variant."""
    axes = _one_panel("validation accuracy", "step")
    for folder, result in results.items():
        curve = result["accuracy_curve"]
        axes.plot(curve["step"], curve["accuracy"], marker=".", label=folder, **_style(result))
    return _with_legend(axes)


def draw_memory(results: Results) -> Figure:
    """What training holds by kind, and beside it the peak of a step on top of parameters and optimizer."""
    axes = _one_panel("MiB", "")
    places = range(len(results))
    heights = [[_mebibytes(result, kinds) for result in results.values()] for kinds, _ in _KINDS.values()]
    tops = [[0.0] * len(results), *accumulate(heights, _added)]
    for (name, (_, colour)), height, bottom in zip(_KINDS.items(), heights, tops, strict=False):
        axes.bar([place - 0.2 for place in places], height, 0.36, bottom=bottom, label=name, color=colour)
    axes.bar(
        [place + 0.2 for place in places],
        [result["peak_memory_mb"] for result in results.values()],
        0.36,
        bottom=tops[_STANDING],
        label="peak of a step, above the first two",
        color="#d9e0e5",
        edgecolor="#8a959e",
    )
    axes.set_xticks(list(places), [f"{one['experiment']}\n{label_of(one['mode'])}" for one in results.values()])
    return _with_legend(axes, columns=3)


def draw_timeline(results: Results) -> Figure:
    """Live bytes over one training step, a panel for each experiment; a dot marks where the backward pass begins."""
    experiments = list(dict.fromkeys(result["experiment"] for result in results.values()))
    panels = _panels(1, len(experiments), width=7.5, height=4.2)
    for axes, experiment in zip(panels, experiments, strict=True):
        for result in results.values():
            if result["experiment"] == experiment:
                _draw_step(axes, result)
        axes.set_title(experiment, fontsize=10)
        axes.set_xlabel("allocations and releases")
        axes.sharey(panels[0])
    panels[0].plot([], [], "o", color="#5b6770", label="backward pass begins")
    panels[0].set_ylabel("MiB above the start of the step")
    return _with_shared_legend(panels)


def draw_comparison(comparison: Comparison) -> Figure:
    """A panel for every metric: a dot for each seed, joined across modes, and mean and standard deviation beside."""
    panels = _panels(2, 3, width=9.5, height=6.0)
    for axes, metric in zip(panels, METRICS, strict=True):
        start, ticks = 0, {}
        for experiment, metrics in comparison.experiments.items():
            modes = metrics[metric.name].modes
            _draw_seeds(axes, modes, metric, start)
            _draw_means(axes, modes, metric, start)
            ticks[experiment] = start + (len(modes) - 1) / 2
            start += len(modes) + 1
        axes.set_xticks(list(ticks.values()), list(ticks))
        axes.set_xlim(-0.8, start - 1.2)
        axes.set_title(metric.heading, fontsize=10)
        axes.ticklabel_format(axis="y", useOffset=False)
    panels[0].errorbar([], [], yerr=[], color="#5b6770", label="mean ± standard deviation", **_MEAN_STYLE)
    return _with_shared_legend(panels)


PLOTS: Mapping[str, Callable[[Results], Figure]] = {
    "loss": draw_loss,
    "accuracy": draw_accuracy,
    "memory": draw_memory,
    "timeline": draw_timeline,
}


def save(figure: Figure, path: Path) -> None:
    """Writes a figure in the format that the suffix names; equal figures give equal files."""
    metadata = {"Date": None} if path.suffix == ".svg" else None
    with rc_context({"svg.hashsalt": "bwsk-fx"}):
        figure.savefig(path, dpi=130, metadata=metadata)


def pictures(figures: Mapping[str, Figure]) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """The name of every file that figures become, and what writes it to a path."""
    for name, figure in figures.items():
        for suffix in FORMATS:
            yield f"{name}.{suffix}", partial(save, figure)


def label_of(mode: str) -> str:
    """A mode's name in legends."""
    return mode.removeprefix("bwsk_")


def bare(axes: Axes) -> Axes:
    """Axes with a quiet frame and horizontal lines."""
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _draw_step(axes: Axes, result: Mapping[str, Any]) -> None:
    timeline, mode = result["memory_timeline"], result["mode"]
    events, live = timeline["event"], [size / 2**20 for size in timeline["live_bytes"]]
    axes.plot(events, live, label=label_of(mode), color=COLOURS[mode], linewidth=_WIDTHS[mode])
    turn = next((place for place, event in enumerate(events) if event >= timeline["forward_events"]), None)
    if turn is not None:
        axes.plot(events[turn], live[turn], "o", color=COLOURS[mode], markersize=6, markeredgecolor="white")


def _draw_seeds(axes: Axes, modes: Mapping[str, Spread], metric: Metric, start: int) -> None:
    """The values of one metric of one experiment; those that are not finite are left out."""
    for seed in next(iter(modes.values())).by_seed:
        values = [spread.by_seed[seed] for spread in modes.values()]
        shown = [math.nan if value is None else value * metric.scale for value in values]
        axes.plot(range(start, start + len(shown)), shown, color="#c9d3da", linewidth=1, zorder=1)
        for place, (mode, value) in enumerate(zip(modes, shown, strict=True), start):
            axes.plot(place, value, ".", color=COLOURS[mode], markersize=9, label=label_of(mode))


def _draw_means(axes: Axes, modes: Mapping[str, Spread], metric: Metric, start: int) -> None:
    for place, (mode, spread) in enumerate(modes.items(), start):
        if spread.mean is not None:
            deviation = (spread.standard_deviation or 0) * metric.scale
            style = {"color": COLOURS[mode], **_MEAN_STYLE}
            axes.errorbar(place + 0.25, spread.mean * metric.scale, yerr=deviation, **style)


def _one_panel(y_label: str, x_label: str) -> Axes:
    (axes,) = _panels(1, 1, width=7.5, height=4.2)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    return axes


def _panels(rows: int, columns: int, width: float, height: float) -> list[Axes]:
    # A figure of its own, not pyplot's: no global state and no display.
    figure = Figure(figsize=(width, height), layout="constrained")
    return [bare(axes) for axes in figure.subplots(rows, columns, squeeze=False).flat]


def _with_legend(axes: Axes, columns: int = 2) -> Figure:
    axes.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=columns)
    return _figure_of(axes)


def _with_shared_legend(panels: Sequence[Axes]) -> Figure:
    """One legend for panels that show the same things."""
    entries = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure = _figure_of(panels[0])
    figure.legend(entries.values(), entries.keys(), frameon=False, fontsize=8, loc="outside upper center", ncols=4)
    return figure


def _figure_of(axes: Axes) -> Figure:
    figure = axes.get_figure(root=True)
    assert figure is not None  # _panels made it
    return figure


def _mebibytes(result: Mapping[str, Any], kinds: tuple[str, ...]) -> float:
    return sum(result["memory_breakdown_bytes"][kind] for kind in kinds) / 2**20


def _added(left: list[float], right: list[float]) -> list[float]:
    return [one + other for one, other in zip(left, right, strict=True)]


def _style(result: Mapping[str, Any]) -> dict[str, Any]:
    mode = result["mode"]
    return {"color": COLOURS[mode], "linewidth": _WIDTHS[mode], "linestyle": _LINES[result["experiment"]]}


def _running_mean(values: list[float]) -> list[float]:
    windows = (values[max(0, end - _SMOOTHING) : end] for end in range(1, len(values) + 1))
    return [sum(window) / len(window) for window in windows]
