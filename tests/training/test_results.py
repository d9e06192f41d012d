"""What is written down about memory, from recorded steps."""

import json

from bwsk_fx.measure import Timeline
from bwsk_fx.training.results import CURVE_POINTS, memory_timeline


def test_a_short_timeline_is_written_whole():
    written = memory_timeline(Timeline((8, 12, 4, 0), forward_events=2))
    assert written == {"event": [1, 2, 3, 4], "live_bytes": [8, 12, 4, 0], "events": 4, "forward_events": 2}


def test_thinning_keeps_the_maximum_of_each_stretch():
    live = [0] * 3500
    live[1234], live[2000] = 70, 99  # one stretch is four events
    written = memory_timeline(Timeline(tuple(live), forward_events=1700))
    assert len(written["event"]) == len(written["live_bytes"]) == 875 <= CURVE_POINTS
    assert {event: size for event, size in zip(written["event"], written["live_bytes"], strict=True) if size} == {
        1235: 70,
        2001: 99,
    }
    assert written["events"] == 3500


def test_an_empty_timeline_is_an_empty_curve():
    assert memory_timeline(Timeline((), forward_events=0))["live_bytes"] == []


def test_every_variant_says_where_its_memory_is(six_variants):
    for folder in six_variants.results:
        result = json.loads((six_variants.output / folder / "training_results.json").read_text())
        parts = result["memory_breakdown_bytes"]
        assert list(parts) == ["parameters", "buffers", "gradients", "optimizer", "activations", "weight_copies"]
        assert {type(size) for size in parts.values()} == {int}
        assert parts["parameters"] + parts["buffers"] == result["static_bytes"]
        assert parts["gradients"] == parts["parameters"]
        assert parts["activations"] + parts["weight_copies"] == result["saved_for_backward_bytes"]
        assert parts["weight_copies"] == 0  # trained in fp32
        # AdamW: two averages of each parameter, and a step counter for each tensor of the 200 thousand weights.
        steps = parts["optimizer"] - 2 * parts["parameters"]
        assert steps % 4 == 0
        assert 60 < steps / 4 < 80


def test_the_timeline_reaches_the_peak(six_variants):
    for result in six_variants.results.values():
        timeline = result["memory_timeline"]
        assert 0 < timeline["forward_events"] < timeline["events"]
        assert max(timeline["live_bytes"]) / 2**20 == result["peak_memory_mb"]
