"""Plots are looked at as matplotlib's objects and as files."""

import pytest

from bwsk_fx.training import plots

MIB = 2**20


def _result(mode: str, experiment: str = "scratch") -> dict:
    kinds = ("parameters", "buffers", "gradients", "optimizer", "activations", "weight_copies")
    return {
        "experiment": experiment,
        "mode": mode,
        "peak_memory_mb": 50.0,
        "memory_breakdown_bytes": {kind: 2**place * MIB for place, kind in enumerate(kinds)},
        "loss_curve": {"step": [1, 2, 3], "loss": [3.0, 2.0, 1.0]},
        "accuracy_curve": {"step": [2, 3], "accuracy": [0.5, 0.75]},
        "memory_timeline": {
            "event": [1, 3, 5],
            "live_bytes": [MIB, 4 * MIB, 2 * MIB],
            "events": 5,
            "forward_events": 3,
        },
    }


@pytest.fixture
def results() -> dict:
    modes = {"conventional": "conventional", "bwsk-analyzed": "bwsk_analyzed", "bwsk-reversible": "bwsk_reversible"}
    return {
        f"{experiment}-{folder}": _result(mode, experiment)
        for experiment in ("finetune", "scratch")
        for folder, mode in modes.items()
    }


def _legend(figure) -> list[str]:
    legends = [axes.get_legend() for axes in figure.axes if axes.get_legend()] + figure.legends
    return [text.get_text() for legend in legends for text in legend.get_texts()]


def test_memory_is_stacked_and_the_peak_stands_on_what_is_there_before(results):
    figure = plots.draw_memory(results)
    first = {bars.get_label(): bars.patches[0] for bars in figure.axes[0].containers}
    assert {label: (bar.get_y(), bar.get_height()) for label, bar in first.items()} == {
        "parameters and buffers": (0, 1 + 2),
        "optimizer": (3, 8),
        "gradients": (11, 4),
        "weight copies": (15, 32),
        "activations": (47, 16),
        "peak of a step, above the first two": (11, 50),
    }
    assert _legend(figure) == list(first)
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert labels[:2] == ["finetune\nconventional", "finetune\nanalyzed"]


def test_the_timeline_has_a_panel_for_each_experiment_and_marks_the_backward_pass(results):
    figure = plots.draw_timeline(results)
    assert [axes.get_title() for axes in figure.axes] == ["finetune", "scratch"]
    assert _legend(figure) == ["conventional", "analyzed", "reversible", "backward pass begins"]
    assert len(figure.axes[1].get_lines()) == 2 * 3  # a curve and a mark for each mode
    curve, mark = figure.axes[1].get_lines()[:2]
    assert curve.get_xydata().tolist() == [[1, 1], [3, 4], [5, 2]]
    assert mark.get_xydata().tolist() == [[3, 4]]


def test_every_plot_has_every_variant_in_its_legend(results):
    for draw in (plots.draw_loss, plots.draw_accuracy):
        assert _legend(draw(results)) == list(results)


@pytest.mark.parametrize("name", plots.PLOTS)
def test_a_plot_becomes_a_picture_and_the_same_svg_every_time(name, results, tmp_path):
    from PIL import Image

    for attempt in ("a", "b"):
        (tmp_path / attempt).mkdir()
        for file, fill in plots.pictures({name: plots.PLOTS[name](results)}):
            fill(tmp_path / attempt / file)
    assert {path.name for path in (tmp_path / "a").iterdir()} == {f"{name}.png", f"{name}.svg"}
    with Image.open(tmp_path / "a" / f"{name}.png") as picture:
        assert picture.width > 600
        assert len(set(picture.convert("RGB").reduce(8).get_flattened_data())) > 20
    drawn = [(tmp_path / attempt / f"{name}.svg").read_text(encoding="utf-8") for attempt in ("a", "b")]
    assert drawn[0] == drawn[1]
    assert "<svg " in drawn[0]
    assert "dc:date" not in drawn[0]
