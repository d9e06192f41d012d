"""The HTML page as a file: its data, its text, and what it leaves out. `test_html_browser.py` opens it."""

import json
import re
from base64 import b64decode
from hashlib import sha256

import pytest
import torch
from torch import nn

import bwsk_fx
from bwsk_fx.errors import BwskError, RuleError
from bwsk_fx.measure import measure
from bwsk_fx.report.html.opened import Opened
from bwsk_fx.report.html.page import page_data
from bwsk_fx.report.html.step import foresee_step

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def images(make_images):
    return make_images(3)


@pytest.fixture(scope="module")
def typed(make_vit, images):
    graph = bwsk_fx.capture(make_vit(), images)
    bwsk_fx.type_nodes(graph)
    return graph


@pytest.fixture(scope="module")
def fused(typed):
    return bwsk_fx.fuse_regions(typed, budget=0.1)


@pytest.fixture(scope="module")
def shown(fused, images):
    return page_data(fused, images, "vit")


def _text(graph, tmp_path, inputs=None, title="vit") -> str:
    bwsk_fx.save_html(graph, tmp_path / "page.html", inputs, title=title)
    return (tmp_path / "page.html").read_text(encoding="utf-8")


def _data(text: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


def _places(group: dict) -> list[int]:
    return [place for child in group["children"] for place in (_places(child) if isinstance(child, dict) else [child])]


def _groups(group: dict) -> list[dict]:
    return [group, *(inner for child in group["children"] if isinstance(child, dict) for inner in _groups(child))]


def test_counts_are_those_of_the_summary(typed, tmp_path):
    data, summary = _data(_text(typed, tmp_path)), bwsk_fx.summarize(typed)
    counts = {"S": summary.s, "K": summary.k, "GRAY": summary.gray}
    assert counts["S"] > 20
    assert counts["K"] > 3
    assert data["tree"]["counts"] == counts
    counted = [node["label"] for node in data["nodes"] if node["counted"]]
    assert {label: counted.count(label) for label in counts} == counts
    assert (data["summary"]["s"], data["summary"]["total"]) == (summary.s, summary.total)
    assert data["summary"]["erased_elements"] == summary.erased_elements
    blocks = {
        f"{block.section}.{block.index}": {"S": block.s, "K": block.k, "GRAY": block.gray} for block in summary.blocks
    }
    assert len(blocks) == 2
    assert {one["path"]: one["counts"] for one in _groups(data["tree"]) if one["path"] in blocks} == blocks


def test_nodes_are_folded_by_module_in_order(typed, shown):
    data = shown[0]
    assert _places(data["tree"]) == [*range(len(typed.graph.nodes))]
    assert data["tree"]["class"] == "ViTForImageClassification"
    groups = {group["path"]: group for group in _groups(data["tree"])}
    names = [data["nodes"][place]["name"] for place in _places(groups["vit.layers.0.mlp"])]
    assert names == [f"vit_layers_0_mlp_{part}" for part in ("fc1", "activation_fn", "fc2")]
    operators = {node["name"]: node["operator"] for node in data["nodes"]}
    words = [
        operators[name] for name in ("pixel_values", "vit_layernorm", "add", "transpose", "vit_embeddings_cls_token")
    ]
    assert words == ["input", "LayerNorm", "add", "transpose", "parameter or buffer"]
    # A leaf module is a node.
    assert "vit.layers.0.mlp.fc1" not in groups


class _Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.part = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.between = nn.Linear(4, 4)

    def forward(self, x):
        return self.part(self.between(self.part(x)))


def test_a_module_that_is_called_twice_has_two_groups():
    graph = bwsk_fx.capture(_Twice(), torch.randn(2, 4))
    bwsk_fx.type_nodes(graph)
    data, _ = page_data(graph, None, "twice")
    assert [group["path"] for group in _groups(data["tree"])] == ["", "part", "part"]


def test_a_rewritten_graph_shows_the_nodes_that_it_was_made_of(typed, fused):
    before, after = Opened.of(typed).nodes, Opened.of(fused).nodes
    position = {each.node.name: place for place, each in enumerate(after)}
    assert len(after) == len(before)
    for each in before:
        twin = after[position[each.node.name]]
        assert twin.node.meta["bwsk"] == each.node.meta["bwsk"]
        assert twin.operator == each.operator
        assert {after[place].node.name for place in twin.inputs} == {before[place].node.name for place in each.inputs}
    assert {each.region for each in after} == {"", "segment_0", "vit_layers_0", "vit_layers_1", "segment_1"}


def test_the_rewrite_says_which_nodes_became_which_region(fused, shown):
    data, _ = shown
    rewrite, regions = data["rewrite"], data["regions"]
    assert (rewrite["before"], rewrite["after"], rewrite["calls"]) == (len(data["nodes"]), len(fused.graph.nodes), 4)
    stayed = [place for step in rewrite["steps"] for place in step.get("nodes", ())]
    fused_nodes = [place for region in regions for place in region["nodes"]]
    assert sorted(stayed + fused_nodes) == [*range(len(data["nodes"]))]
    assert [step["region"] for step in rewrite["steps"] if "region" in step] == [0, 1, 2, 3]
    block = regions[2]
    assert block["name"] == "vit_layers_1"
    assert [data["nodes"][place]["name"] for place in block["outputs"]] == ["add_4"]
    assert "add_2" in [data["nodes"][place]["name"] for place in block["inputs"]]
    assert all(data["nodes"][place]["region"] == 2 for place in block["nodes"])


def test_plans_are_those_of_the_training_step(typed, images, shown):
    data, _ = shown
    trained = bwsk_fx.fuse_regions(typed, budget=0.1)
    trained(**images).loss.backward()
    report = bwsk_fx.explain_saved(trained)
    actions = [
        (entry.region, value.name, value.action, value.bytes) for entry in report.regions for value in entry.plan.values
    ]
    rows = [(data["regions"][row["region"]]["name"], row["name"], row["action"], row["bytes"]) for row in data["saved"]]
    assert rows == actions
    assert {row[2] for row in rows} >= {"keep", "recompute"}
    assert data["totals"]["kept_bytes"] == report.kept_bytes + data["totals"]["outside_bytes"]
    # Without inputs, what has run is shown.
    again, charts = page_data(trained, None, "vit")
    assert [row["bytes"] for row in again["saved"]] == [row["bytes"] for row in data["saved"]]
    assert charts == {}
    assert any("no inputs were given" in note for note in again["notes"])


def test_a_saved_value_names_the_node_of_its_own_region(shown):
    data, _ = shown
    places = {region["name"]: place for place, region in enumerate(data["regions"])}
    first, second = ([row for row in data["saved"] if row["region"] == places[f"vit_layers_{one}"]] for one in (0, 1))
    names = [[data["nodes"][row["node"]]["name"] for row in rows if row["node"] >= 0] for rows in (first, second)]
    assert "vit_layers_0_mlp_fc1" in names[0]
    assert "vit_layers_1_mlp_fc1" in names[1]
    assert not [name for name in names[1] if name.startswith("vit_layers_0_")]
    for region in data["regions"]:
        known = {*region["nodes"], *region["inputs"], -1}
        assert {row["node"] for row in data["saved"] if row["region"] == places[region["name"]]} <= known


class _Block(nn.Module):
    """The same for PyTorch with and without the identity, but not the same nodes."""

    def __init__(self, identity: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.identity = nn.Identity() if identity else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x).sin()
        return x + (y if self.identity is None else self.identity(y)).exp()


def test_equal_programs_of_different_nodes_name_their_own():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([_Block(False), _Block(True), _Block(False)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
            return x.sum()

    inputs = {"x": torch.randn(2, 4, 8)}
    fused = bwsk_fx.fuse_regions(bwsk_fx.type_nodes(bwsk_fx.capture(Model(), inputs)))
    data, _ = page_data(fused, inputs, "model")
    for region in range(3):
        named = {row["node"] for row in data["saved"] if row["region"] == region and row["node"] >= 0}
        own = {place for place, node in enumerate(data["nodes"]) if node["region"] == region}
        assert len(named & own) >= 3


def test_the_timeline_on_fake_tensors_is_that_of_the_step(typed, fused, images):
    # Gradients of an earlier step are no part of this one.
    typed(**images).loss.backward()
    step = foresee_step(fused, images)
    for graph, foreseen in ((typed, step.conventional), (fused, step.reversible)):
        measured = measure(graph, images)
        assert max(foreseen.live_bytes) == pytest.approx(measured.peak_activation_bytes, rel=0.01)
        kept = [line.live_bytes[line.forward_events - 1] for line in (foreseen, measured.timeline)]
        assert kept[0] == pytest.approx(kept[1], rel=0.01)
    assert max(step.reversible.live_bytes) < 0.8 * max(step.conventional.live_bytes)


def test_the_frontier_is_that_of_plan_frontier(typed, fused, images):
    assert foresee_step(fused, images).frontier == bwsk_fx.plan_frontier(typed, images)


def test_writing_a_page_leaves_the_graph_alone(typed, images, tmp_path):
    graph = bwsk_fx.fuse_regions(typed)
    before = [(node.name, dict(node.meta)) for node in graph.graph.nodes]
    gradients = [parameter.grad for parameter in graph.parameters()]
    bwsk_fx.save_html(graph, tmp_path / "page.html", images)
    regions = [module for module in graph.modules() if hasattr(module, "plans")]
    assert len(regions) == 4
    assert all(region.program is None and not region.plans() for region in regions)
    assert [(node.name, node.meta) for node in graph.graph.nodes] == before
    assert all(one is parameter.grad for one, parameter in zip(gradients, graph.parameters(), strict=True))
    assert graph.graph.owning_module is graph


def test_the_batch_axis_is_that_of_calm(typed, shown):
    data, _ = shown
    report = bwsk_fx.analyze_calm(typed).axis("batch")
    waiting = {node["name"]: node["axes"]["batch"]["behaviour"] for node in data["nodes"] if "batch" in node["axes"]}
    assert len(waiting) == report.nodes
    points = {point.node: str(point.behaviour) for point in (*report.barriers, *report.reduces)}
    assert points == {"cross_entropy": "REDUCE"}
    assert {name: kind for name, kind in waiting.items() if kind in ("REDUCE", "BARRIER")} == points


def test_sizes_are_for_the_batch_or_for_one_sample(typed, images):
    for inputs, batch in ((images, 3), (None, 1)):
        data, _ = page_data(typed, inputs, "vit")
        pixels = data["nodes"][0]
        assert pixels["results"] == [
            {"shape": ["B", "3", "16", "16"], "dtype": "float32", "bytes": batch * 3 * 256 * 4}
        ]
        assert data["batch"] == (batch if inputs else None)
        weight = next(node for node in data["nodes"] if node["name"] == "vit_embeddings_cls_token")
        assert weight["bytes"] == 32 * 4


def test_source_lines_name_no_environment(shown):
    data, _ = shown
    sources = {node["source"] for node in data["nodes"]} | {row["source"] for row in data["saved"]}
    assert any(re.fullmatch(r"transformers/models/vit/modeling_vit\.py:\d+", source) for source in sources)
    assert not [source for source in sources if "site-packages" in source]


def _rename_all(graph) -> None:
    for node in graph.graph.nodes:
        if node.op == "call_module":
            node.name = f"{HOSTILE}{node.name}"
            node.meta["nn_module_stack"] = {"": ("", nn.Module), f"a.{HOSTILE}": ("", type(HOSTILE, (), {}))}
            node.stack_trace = f'File "{HOSTILE}", line 3, in forward'


def test_text_cannot_leave_its_place(make_vit, images, tmp_path):
    graph = bwsk_fx.capture(make_vit(), images)
    bwsk_fx.type_nodes(graph)
    _rename_all(graph)
    text = _text(graph, tmp_path, title=f"{HOSTILE} & co")
    assert len(re.findall("<script", text)) == 2
    assert len(re.findall("</script", text)) == 2
    assert "<title>&lt;script&gt;" in text
    data = _data(text)
    assert data["title"] == f"{HOSTILE} & co"
    assert sum(node["name"].startswith(HOSTILE) for node in data["nodes"]) > 10
    assert f"a.{HOSTILE}" in [group["path"] for group in _groups(data["tree"])]


def test_the_file_needs_nothing_outside_itself(fused, images, tmp_path):
    text = _text(fused, tmp_path, images)
    assert text.count("<svg ") == 2
    assert not re.findall(r"""(?:src|href|action)=["'](?!#)""", text)
    assert "url(" not in text
    assert "@import" not in text
    policy = re.search(r'Content-Security-Policy" content="(.*?)">', text)[1].replace("&#39;", "'")
    assert policy.startswith("default-src 'none';")
    for kind, tag in (("style", "style"), ("script", "script")):
        body = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)[1]
        promised = re.search(rf"{kind}-src 'sha256-(.*?)'", policy)[1]
        assert b64decode(promised) == sha256(body.encode()).digest()


def test_what_there_is_no_data_for_is_left_out_and_named(typed, tmp_path):
    notes = bwsk_fx.save_html(typed, tmp_path / "typed.html")
    assert len(notes) == 1
    assert "not rewritten" in notes[0]
    text = (tmp_path / "typed.html").read_text(encoding="utf-8")
    assert _data(text)["notes"] == list(notes)
    assert "<svg " not in text
    assert _data(text)["rewrite"] is None
    notes = bwsk_fx.save_html(bwsk_fx.fuse_regions(typed), tmp_path / "fused.html")
    assert [note.partition(":")[0] for note in notes] == ["No memory over a step and no frontier", "No saved values"]


class _Weighted(nn.Module):
    """A region cannot hold the tensor that it makes of several numbers."""

    def forward(self, x):
        return x * torch.tensor([1.0, 2.0, 3.0, 4.0])


class _Unplannable(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Sequential(_Weighted(), nn.Linear(4, 4)) for _ in range(2)))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.blocks(x)).sum()


def test_a_step_that_cannot_be_planned_is_named(tmp_path):
    inputs = {"x": torch.randn(3, 4, requires_grad=True)}
    graph = bwsk_fx.capture(_Unplannable(), inputs)
    bwsk_fx.type_nodes(graph)
    (note,) = bwsk_fx.save_html(bwsk_fx.fuse_regions(graph), tmp_path / "page.html", inputs)
    assert note.startswith("No plans for these inputs, no memory over a step and no frontier: region blocks_")
    assert _data((tmp_path / "page.html").read_text(encoding="utf-8"))["saved"] == []


def test_a_graph_without_labels_is_refused(make_vit, images, tmp_path):
    graph = bwsk_fx.capture(make_vit(), images)
    with pytest.raises(RuleError, match=r"call bwsk_fx\.type_nodes"):
        bwsk_fx.save_html(graph, tmp_path / "page.html")
    assert not list(tmp_path.iterdir())


def test_a_page_that_cannot_be_written_is_one_sentence_and_leaves_nothing(typed, tmp_path):
    with pytest.raises(BwskError, match=r"cannot be written to .*nowhere/page\.html: No such file or directory"):
        bwsk_fx.save_html(typed, tmp_path / "nowhere" / "page.html")
    (tmp_path / "page.html").mkdir()
    with pytest.raises(BwskError, match="cannot be written"):
        bwsk_fx.save_html(typed, tmp_path / "page.html")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
