"""Typed graphs for other tools: what is written is what the graph has, and reads back."""

import json
import re
import xml.etree.ElementTree as ElementTree

import networkx as nx
import pytest
import torch
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutput

import bwsk_fx
from bwsk_fx.errors import BwskError, RuleError
from bwsk_fx.report.export import dot
from bwsk_fx.report.export.svg import to_svg
from bwsk_fx.verdict import Label


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block() for _ in range(2))

    def forward(self, x, shift):
        for block in self.blocks:
            x = block(x)
        return ImageClassifierOutput(loss=(x * x + shift).sum(), logits=x)


@pytest.fixture(scope="module")
def graph():
    inputs = {"x": torch.randn(2, 3, 4), "shift": torch.randn(2, 3, 4)}
    return bwsk_fx.type_nodes(bwsk_fx.capture(_Model(), inputs))


def test_networkx_nodes_have_plain_values(graph):
    network = bwsk_fx.to_networkx(graph)
    assert list(network) == [node.name for node in graph.graph.nodes]
    down = dict(network.nodes["blocks_0_down"])
    assert json.loads(json.dumps(down)) == down
    assert down.pop("line").rpartition(":")[0] == __file__
    (shape,) = down.pop("shapes")
    assert (isinstance(shape[0], str), shape[1:]) == (True, [3, 4])
    assert down.pop("rationale").startswith("affine.linear: 8 → 4 contracts")
    assert down == {
        "op": "call_module",
        "target": "blocks.0.down",
        "operator": "Linear",
        "verdict": "K",
        "witness": "",
        "confidence": 0.8,
        "counted": True,
        "erased_elements": 3 * 4,
        "erased_bits": None,
        "module": "blocks.0.down",
        "dtypes": ["float32"],
        "bytes": 3 * 4 * 4,
        "region": "",
    }
    (add,) = (values for name, values in network.nodes(data=True) if name == "add")
    assert (add["module"], add["verdict"], add["witness"]) == ("blocks.0", "S", "other operand: blocks_0_down")


def test_networkx_has_an_edge_per_value_read(graph):
    network = bwsk_fx.to_networkx(graph)
    product = next(node.name for node in graph.graph.nodes if "mul" in node.name)
    assert sorted(network.get_edge_data("add_1", product)) == ["0", "1"]
    assert nx.is_directed_acyclic_graph(network)
    assert nx.has_path(network, "x", "output")


def test_regions_are_in_the_export(graph):
    from bwsk_fx.passes.find_regions import FindRegions

    found = FindRegions().run(bwsk_fx.type_nodes(bwsk_fx.capture(_Model(), [torch.randn(2, 4)] * 2))).graph_module
    regions = nx.get_node_attributes(bwsk_fx.to_networkx(found), "region")
    assert regions["blocks_0_up"] == found.graph.find_nodes(op="call_module")[0].meta["region"] != ""


def test_graphml_reads_back(graph, tmp_path):
    bwsk_fx.save_graphml(graph, tmp_path / "graph.graphml")
    network, found = bwsk_fx.to_networkx(graph), nx.read_graphml(tmp_path / "graph.graphml", force_multigraph=True)
    assert (set(found.nodes), found.number_of_edges()) == (set(network.nodes), network.number_of_edges())
    for name, values in network.nodes(data=True):
        read = found.nodes[name]
        assert json.loads(read.pop("shapes")) == values["shapes"]
        assert json.loads(read.pop("dtypes")) == values["dtypes"]
        assert read == {key: value for key, value in values.items() if key in read}
        assert {key for key in values if key not in read} - {"shapes", "dtypes"} == {
            key for key, value in values.items() if value is None
        }


def test_a_file_that_cannot_be_written_is_named(graph, tmp_path):
    with pytest.raises(BwskError, match=r"no/graph\.graphml cannot be written: No such file"):
        bwsk_fx.save_graphml(graph, tmp_path / "no" / "graph.graphml")
    with pytest.raises(RuleError, match="has no verdict"):
        bwsk_fx.to_networkx(bwsk_fx.capture(nn.ReLU(), torch.randn(2, 3)))


def test_model_explorer_gets_a_value_and_a_colour_per_counted_node(graph):
    data = bwsk_fx.model_explorer_data(graph)["graph"]
    counted = {node.name: node.meta["bwsk"] for node in graph.graph.nodes if node.meta["bwsk"].counted}
    assert {name: result["value"] for name, result in data["results"].items()} == {
        name: str(verdict.label) for name, verdict in counted.items()
    }
    colours = {result["value"]: result["bgColor"] for result in data["results"].values()}
    assert len(set(colours.values())) == len(colours) == 2
    json.dumps(data)


def test_model_explorer_gets_amounts_with_thresholds_up_to_the_largest(graph):
    data = bwsk_fx.model_explorer_data(graph, "erased_elements", graph_id="mine")["mine"]
    values = {name: result["value"] for name, result in data["results"].items()}
    assert values["blocks_0_down"] == values["blocks_1_down"] == 12
    assert "blocks_0_up" not in values
    limits = [threshold["value"] for threshold in data["thresholds"]]
    assert limits == sorted(limits)
    assert limits[-1] == max(values.values())
    with pytest.raises(RuleError, match="no node data 'bytes'"):
        bwsk_fx.model_explorer_data(graph, "bytes")


def _boxes(text: str) -> dict[str, str]:
    return dict(re.findall(r'n\d+ \[label="([^"]*)"(.*)\];', text))


def test_dot_folds_modules_and_stripes_their_labels(graph):
    boxes = _boxes(bwsk_fx.to_dot(graph, depth=2))
    names = [label.split("\\n")[0] for label in boxes]
    assert names == ["x", "shift", "blocks.0", "blocks.1", "(top level)", "output"]
    ((label, style),) = ((label, style) for label, style in boxes.items() if label.startswith("blocks.0"))
    counts = {name: sum(_label(graph, name, node) for node in graph.graph.nodes) for name in ("S", "K")}
    assert label.split("\\n")[1] == f"{counts['S']} S, {counts['K']} K"
    assert f"#56b4e9;{counts['S'] / sum(counts.values()):.4f}:#e69f00" in style


def _label(graph, label: str, node) -> bool:
    inside = "blocks.0" in (node.meta.get("nn_module_stack") or {}) or node.name.startswith("blocks_0")
    return inside and node.meta["bwsk"].counted and node.meta["bwsk"].label is Label(label)


def test_dot_edges_reach_the_output_through_what_packs_it(graph):
    text = bwsk_fx.to_dot(graph, depth=2)
    edges = set(re.findall(r"n(\d+) -> n(\d+);", text))
    # x, shift, two blocks, top level, output; x is returned from the second block as well.
    assert edges == {("0", "2"), ("2", "3"), ("3", "4"), ("1", "4"), ("4", "5"), ("3", "5")}


def test_dot_without_a_depth_has_every_dynamic_node(graph):
    dynamic = [node for node in graph.graph.nodes if node.op in ("placeholder", "output") or node.meta["bwsk"].counted]
    assert len(re.findall(r"n\d+ \[label=", bwsk_fx.to_dot(graph))) == len(dynamic)
    with pytest.raises(RuleError, match="depth is -1"):
        bwsk_fx.to_dot(graph, -1)


def test_dot_escapes_quotes():
    assert dot._escaped('a "b" \\ c\nd') == 'a \\"b\\" \\\\ c d'


def test_svg_is_well_formed_and_shows_each_box_inside(graph, tmp_path):
    root = ElementTree.fromstring(to_svg(graph, depth=2))
    space = "{http://www.w3.org/2000/svg}"
    titles = [text.text for text in root.iter(f"{space}text") if text.get("font-weight") == "bold"]
    assert titles == ["x", "shift", "blocks.0", "blocks.1", "(top level)", "output"]
    assert len(list(root.iter(f"{space}path"))) == 6
    width, height = float(root.get("width")), float(root.get("height"))
    for box in root.iter(f"{space}rect"):
        assert float(box.get("x", 0)) + float(box.get("width")) <= width
        assert float(box.get("y", 0)) + float(box.get("height")) <= height
    bwsk_fx.save_svg(graph, tmp_path / "graph.svg", depth=0)
    assert (tmp_path / "graph.svg").read_text(encoding="utf-8") == to_svg(graph, depth=0)


def test_svg_boxes_do_not_overlap(graph):
    root = ElementTree.fromstring(to_svg(graph, depth=9))
    boxes = [(float(box.get("x")), float(box.get("y"))) for box in root.iter() if box.get("rx") == "3"]
    assert len(boxes) == len(set(boxes)) > 8


def test_drawing_without_pydot_says_what_to_do(graph, monkeypatch):
    from torch.fx.passes import graph_drawer

    monkeypatch.setattr(graph_drawer, "HAS_PYDOT", False)
    with pytest.raises(BwskError, match="draw needs pydot"):
        dot.draw(graph)


def test_a_drawing_of_pytorchs_has_the_colours_of_verdicts(graph):
    pytest.importorskip("pydot")
    drawing = dot.draw(graph)
    colours = {name: drawing.get_node(name)[0].get("fillcolor") for name in ("blocks_0_up", "blocks_0_down", "x")}
    assert colours == {"blocks_0_up": '"#56b4e9"', "blocks_0_down": '"#e69f00"', "x": '"#f2f2f2"'}
