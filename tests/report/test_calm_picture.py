"""The picture of the partitions: well-formed, self-contained, escaped, folded, and true to the report."""

import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest

import bwsk_fx
from bwsk_fx.report.calm import AxisFact, AxisReport, CalmReport, Coordination, NodeReport, behaviour_counts
from bwsk_fx.report.calm_picture import COLOURS, picture
from bwsk_fx.rules.axis import Behaviour

MAP, JOIN, REDUCE, BARRIER = Behaviour
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def report_of(make_vit, make_images):
    def report_of(layers: int) -> CalmReport:
        return bwsk_fx.analyze_calm(bwsk_fx.capture(make_vit(num_hidden_layers=layers), make_images()))

    return report_of


@pytest.fixture(scope="module")
def report(report_of):
    return report_of(3)


def _parsed(report: CalmReport) -> ElementTree.Element:
    return ElementTree.fromstring(picture(report))


def _texts(root: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in root.iter(f"{SVG}text")]


def _cells(root: ElementTree.Element) -> list[tuple[str, str]]:
    """The tooltip and the colour of every cell."""
    groups = root.iter(f"{SVG}g")
    return [(group.find(f"{SVG}title").text, group.find(f"{SVG}rect").get("fill")) for group in groups]


def _one_node(node: str, block: str = "", reason: str = "why") -> CalmReport:
    fact = AxisFact("batch", MAP, reason)
    axis = AxisReport("batch", 1, behaviour_counts([MAP]), ((node,),), (), ())
    return CalmReport((axis,), (NodeReport(node, "relu", (fact,), (), block),), ())


def test_it_is_a_file_of_its_own(report, tmp_path):
    path = tmp_path / "calm.svg"
    report.save_svg(path)
    text = path.read_text(encoding="utf-8")
    assert text == picture(report)
    assert ElementTree.fromstring(text).tag == f"{SVG}svg"
    # The name of the format is the only address in it.
    assert re.findall(r"https?://[^\"]+", text) == ["http://www.w3.org/2000/svg"]
    assert not re.search(r"href|url\(|<script|<style|<image", text)


def test_repeated_blocks_are_drawn_once(report, report_of):
    texts = _texts(_parsed(report))
    assert "vit.layers.0-2 (× 3)" in texts
    assert texts.count("attention_q_proj") == 1
    # The picture of a deeper model differs in the heading alone.
    deeper = picture(report_of(6))
    assert len(deeper) == pytest.approx(len(picture(report)), rel=0.01)
    assert "vit.layers.0-5 (× 6)" in deeper


def test_blocks_that_differ_are_all_drawn(report):
    nodes = [
        replace(node, target="CustomNorm") if node.node == "vit_layers_1_layernorm_before" else node
        for node in report.nodes
    ]
    texts = _texts(_parsed(replace(report, nodes=tuple(nodes))))
    assert texts.count("attention_q_proj") == 3
    assert {"vit.layers.0", "vit.layers.1", "vit.layers.2"} <= set(texts)


def test_every_axis_has_its_row_and_every_behaviour_its_words(report):
    texts = _texts(_parsed(report))
    assert [text for text in texts if text in {axis.axis for axis in report.axes}] == [
        axis.axis for axis in report.axes
    ]
    for behaviour in Behaviour:
        assert any(text.startswith(f"{behaviour}: ") for text in texts)


def test_cells_have_the_behaviour_of_their_nodes(report):
    cells = _cells(_parsed(report))
    shown = {title.split(":")[0]: colour for title, colour in cells}
    assert shown["cross_entropy (cross_entropy), batch"] == COLOURS[REDUCE]
    assert shown["cross_entropy (cross_entropy), class"] == COLOURS[BARRIER]
    assert shown["vit_layers_0_layernorm_before (LayerNorm), feature"] == COLOURS[BARRIER]
    assert shown["scaled_dot_product_attention (scaled_dot_product_attention), head"] == COLOURS[MAP]
    # A layer closes one partition of features and opens another.
    fc1 = [colour for title, colour in cells if title.startswith("vit_layers_0_mlp_fc1 (Linear), feature")]
    assert sorted(fc1) == sorted([COLOURS[REDUCE], COLOURS[MAP]])
    fc2 = [colour for title, colour in cells if title.startswith("vit_layers_0_mlp_fc2 (Linear), feature")]
    assert set(fc2) == {COLOURS[REDUCE], COLOURS[MAP]}


def test_all_points_of_coordination_that_are_drawn_can_be_seen(report):
    cells = _cells(_parsed(report))
    names = {title.split(" ")[0] for title, _ in cells}
    for axis in report.axes:
        for point in (*axis.barriers, *axis.reduces):
            if point.node in names:
                start = f"{point.node} ({point.target}), {axis.axis}: {point.behaviour}"
                assert any(title.startswith(start) for title, _ in cells), start


@pytest.mark.parametrize("layers", [2, 3])
def test_partitions_of_different_tokens_are_not_joined_across_attention(report_of, layers):
    """The second half of a block belongs with the first half of the next one, which lies to its left."""
    root = _parsed(report_of(layers))
    rows = {element.text: float(element.get("y")) for element in root.iter(f"{SVG}text")}
    bars = [line for line in root.iter(f"{SVG}line") if line.get("y1") == line.get("y2") and line.get("stroke-width")]
    token = sorted(
        (float(bar.get("x1")), float(bar.get("x2"))) for bar in bars if abs(float(bar.get("y1")) - rows["token"]) < 8
    )
    assert len(token) == 2
    assert token[0][1] < token[1][0]


@pytest.mark.parametrize("name", ['<b>"x"&amp;</b>', "a\x00b\x1b", "</text><script>1</script>"])
def test_names_cannot_break_out(name):
    for report in (_one_node(name), _one_node("n", block=f"{name}.0"), _one_node("n", reason=name)):
        root = _parsed(report)
        assert not list(root.iter(f"{SVG}script"))
        assert not list(root.iter(f"{SVG}b"))
    cleaned = re.sub("[\x00\x1b]", "\ufffd", name)
    assert cleaned in _texts(_parsed(_one_node(name)))


def test_an_empty_report_is_a_picture():
    assert _parsed(CalmReport((), (), ())).tag == f"{SVG}svg"


def test_a_barrier_crosses_its_row():
    point = Coordination("n", "softmax", BARRIER, "needs all", 4)
    axis = AxisReport("key", 1, behaviour_counts([BARRIER]), (), (point,), ())
    report = CalmReport((axis,), (NodeReport("n", "softmax", (AxisFact("key", BARRIER, "needs all"),)),), ())
    root = _parsed(report)
    (line,) = [line for line in root.iter(f"{SVG}line") if line.get("x1") == line.get("x2")]
    assert line.get("stroke") == COLOURS[BARRIER]
    assert _cells(root) == [("n (softmax), key: BARRIER, needs all", COLOURS[BARRIER])]
