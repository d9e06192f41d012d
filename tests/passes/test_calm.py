"""CALM on a small ViT: exact counts, the same report after fusing, and the claims executed on real data."""

import json
from collections import Counter
from io import StringIO

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import bwsk_fx
from bwsk_fx.axes import Step, follow_axes
from bwsk_fx.calm import analyze_calm
from bwsk_fx.passes.calm import Calm
from bwsk_fx.passes.fuse_regions import fuse_regions
from bwsk_fx.passes.pipeline import PassPipeline
from bwsk_fx.passes.type_nodes import type_nodes
from bwsk_fx.report.calm import AxisFact
from bwsk_fx.rules.axis import Behaviour, Value

MAP, JOIN, REDUCE, BARRIER = Behaviour
LAYERS, HIDDEN, WIDE, HEADS, TOKENS, LABELS, FLOAT = 2, 32, 64, 4, 17, 5, 4
BATCH = 6


def _vit(attention: str = "sdpa"):
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        image_size=32,
        patch_size=8,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=WIDE,
        num_labels=LABELS,
    )
    config._attn_implementation = attention
    return ViTForImageClassification(config).train()


def _inputs(batch: int = BATCH) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(batch, 3, 32, 32, generator=generator)
    return {"pixel_values": pixels, "labels": torch.arange(batch) % LABELS}


@pytest.fixture(scope="module")
def graph() -> fx.GraphModule:
    return bwsk_fx.capture(_vit(), _inputs())


@pytest.fixture(scope="module")
def eager() -> fx.GraphModule:
    return bwsk_fx.capture(_vit("eager"), _inputs())


@pytest.fixture(scope="module")
def report(graph):
    return analyze_calm(graph)


def _targets(points) -> Counter:
    return Counter(point.target for point in points)


# -- exact numbers ----------------------------------------------------------------------------------------------------


def test_batch_is_mapped_up_to_the_loss(report):
    batch = report.axis("batch")
    assert batch.counts == {MAP: batch.nodes - 1, JOIN: 0, REDUCE: 1, BARRIER: 0}
    assert [(point.node, point.bytes_per_sample) for point in batch.reduces] == [("cross_entropy", FLOAT)]
    (partition,) = batch.partitions
    assert len(partition) == batch.nodes
    assert batch.verdict == "batch: 1 partition, 0 barriers, 1 REDUCE (cross_entropy)"


def test_an_input_without_axes_is_none_of_their_business():
    class Scaled(nn.Module):
        def forward(self, x, scale):
            return x * scale

    graph = bwsk_fx.capture(Scaled(), {"x": torch.randn(4, 3), "scale": torch.tensor(2.0)})
    batch = bwsk_fx.analyze_calm(graph).axis("batch")
    assert (batch.counts[Behaviour.MAP], batch.barriers, batch.reduces) == (batch.nodes, (), ())


def test_tokens_wait_once_per_layer(report):
    token = report.axis("token")
    assert token.counts == {MAP: token.nodes - LAYERS, JOIN: 0, REDUCE: 0, BARRIER: LAYERS}
    assert _targets(token.barriers) == {"scaled_dot_product_attention": LAYERS}
    # Keys and values are gathered.
    assert {point.bytes_per_sample for point in token.barriers} == {2 * TOKENS * HIDDEN * FLOAT}
    assert len(token.partitions) == LAYERS + 1
    assert (token.partitions[0][0], token.partitions[-1][-1]) == ("flatten", "getitem")
    # Between two attentions lies the rest of one layer and the projections of the next.
    middle = token.partitions[1]
    assert "vit_layers_0_mlp_fc2" in middle and "vit_layers_1_attention_q_proj" in middle


def _with_heads(graph: fx.GraphModule) -> int:
    """Count the nodes per layer whose result is split into heads, and the reshape that merges them."""
    shapes = (node.meta["val"].shape for node in graph.graph.nodes if isinstance(node.meta.get("val"), torch.Tensor))
    return sum(HIDDEN // HEADS in shape[3:] and HEADS in shape for shape in shapes) // LAYERS + 1


def test_heads_live_between_the_view_and_the_reshape(graph, report):
    # One reshape more or less, depending on the release of transformers.
    head, per_layer = report.axis("head"), _with_heads(graph)
    assert per_layer in (10, 11)
    assert (head.nodes, head.counts[MAP]) == (per_layer * LAYERS, per_layer * LAYERS)
    assert [len(partition) for partition in head.partitions] == [per_layer] * LAYERS
    assert head.partitions[0][0] == "view"
    assert head.partitions[0][-1].startswith("reshape")


def test_features_are_summed_by_linear_maps_and_awaited_by_norms(report):
    feature = report.axis("feature")
    assert _targets(feature.barriers) == {"LayerNorm": 2 * LAYERS + 1}
    assert _targets(feature.reduces) == {"Linear": 6 * LAYERS + 1, "scaled_dot_product_attention": LAYERS}
    moved = {point.node: point.bytes_per_sample for point in (*feature.barriers, *feature.reduces)}
    assert moved["vit_layers_0_mlp_fc1"] == TOKENS * WIDE * FLOAT
    assert moved["vit_layers_0_layernorm_before"] == TOKENS * HIDDEN * FLOAT
    assert moved["scaled_dot_product_attention"] == HEADS * TOKENS * TOKENS * FLOAT
    assert feature.bytes_per_sample == sum(moved.values())


def test_the_hidden_features_of_an_mlp_are_one_partition(report):
    """Column-parallel, then row-parallel: the plan that tensor parallelism writes by hand."""
    mlp = ("vit_layers_0_mlp_fc1", "vit_layers_0_mlp_activation_fn", "vit_layers_0_mlp_fc2")
    assert mlp in report.axis("feature").partitions


def test_pixels_and_classes(report):
    assert [axis.axis for axis in report.axes] == [
        "batch", "channel", "height", "width", "feature", "window", "token", "head", "class",
    ]  # fmt: skip
    assert [point.target for point in report.axis("channel").reduces] == ["Conv2d"]
    assert report.axis("height").counts[MAP] == report.axis("height").nodes == 3
    assert [point.target for point in report.axis("class").barriers] == ["cross_entropy"]
    assert report.unknown == ()


def test_every_tensor_node_is_reported(graph, report):
    tensors = [
        node.name
        for node in graph.graph.nodes
        if isinstance(node.meta.get("val"), torch.Tensor) and node.op != "get_attr"
    ]
    assert [node.node for node in report.nodes] == tensors


def test_eager_attention_shows_its_parts(eager, report):
    split = analyze_calm(eager)
    for name in ("batch", "height", "width", "channel", "class", "head"):
        assert split.axis(name).counts[BARRIER] == report.axis(name).counts[BARRIER]
        assert split.axis(name).counts[REDUCE] == report.axis(name).counts[REDUCE]
    key = split.axis("key")
    assert (_targets(key.barriers), _targets(key.reduces)) == ({"softmax": LAYERS}, {"matmul": LAYERS})
    # One product gathers the keys, the other the values: together what fused attention gathers.
    assert _targets(split.axis("token").barriers) == {"matmul": 2 * LAYERS}
    assert split.axis("token").bytes_per_sample == report.axis("token").bytes_per_sample
    assert split.axis("feature").bytes_per_sample == report.axis("feature").bytes_per_sample


# -- report, pass, regions --------------------------------------------------------------------------------------------


def test_the_report_prints_and_serialises(report):
    contents = json.loads(json.dumps(report.to_json()))
    assert contents["axes"][0]["verdict"] == report.axis("batch").verdict
    mapped = report.axis("batch").nodes - 1
    assert contents["axes"][0]["counts"] == {"MAP": mapped, "JOIN": 0, "REDUCE": 1, "BARRIER": 0}
    assert "published_score" not in contents
    assert len(contents["nodes"]) == len(report.nodes)
    assert str(report).splitlines()[0] == report.axis("batch").verdict
    with pytest.raises(KeyError, match="no axis 'expert'; the graph has batch"):
        report.axis("expert")


def test_the_table_names_every_axis(report):
    from rich.console import Console

    console = Console(width=100, file=StringIO())
    console.print(report)
    rows = [line.split() for line in console.file.getvalue().splitlines()]
    token, head = str(report.axis("token").nodes), str(report.axis("head").nodes)
    assert ["token", token, str(int(token) - 2), "0", "0", "2", "3", "8.5", "KiB"] in rows
    assert ["head", head, head, "0", "0", "0", "2", "0"] in rows


def test_tables_of_any_model_fit_a_hundred_columns(report):
    from rich.console import Console

    for shown in (report, report.axis("feature"), report.axis("class")):
        console = Console(width=100, file=StringIO())
        console.print(shown)
        assert max(map(len, console.file.getvalue().splitlines())) <= 100


def test_the_backward_table_counts_gradients(graph, report):
    from rich.console import Console

    console = Console(width=100, file=StringIO())
    console.print(report)
    _, backward = console.file.getvalue().split("Backward")
    rows = [line.split() for line in backward.splitlines()]
    parameters = len(list(graph.parameters()))
    size = sum(parameter.numel() for parameter in graph.parameters()) * FLOAT
    moved = [f"{size / 1024:.1f}", "KiB", "0", "0"]
    mapped, reduced, _ = (str(report.axis("batch").backward_counts[each]) for each in (MAP, REDUCE, BARRIER))
    assert ["batch", mapped, reduced, "0", str(parameters), *moved] in rows
    assert report.axis("batch").backward_verdict in " ".join(str(report).split())


def test_the_json_has_backward_order_and_blocks(report):
    contents = json.loads(json.dumps(report.to_json()))
    nodes = {node["node"]: node for node in contents["nodes"]}
    assert nodes["vit_layers_1_mlp_fc1"]["block"] == "vit.layers.1"
    assert nodes["classifier"]["block"] == ""
    behaviours = [(fact["axis"], fact["behaviour"]) for fact in nodes["classifier"]["backward"] if not fact["gradient"]]
    assert behaviours == [("batch", "MAP"), ("feature", "MAP")]
    assert contents["axes"][0]["parameter_gradient_bytes"] == report.axis("batch").parameter_gradient_bytes
    assert contents["axes"][0]["gradients"][0]["parameter"] is True
    assert contents["order"]["flops"] == report.order.flops
    assert "problem" not in contents


def test_the_pass_stores_facts_and_report(report):
    graph = bwsk_fx.capture(_vit(), _inputs())
    code = graph.code
    result = PassPipeline([Calm()])(graph)
    assert result.meta["calm"] == report
    assert result.code == code
    facts = {node.name: node.meta.get("calm") for node in result.graph.nodes}
    assert all(isinstance(fact, AxisFact) for fact in facts["classifier"])
    assert facts["classifier"] == report.node("classifier").facts


@pytest.mark.parametrize("granularity", ["block", "whole"])
def test_a_fused_graph_has_the_same_report(graph, report, granularity):
    fused = fuse_regions(graph, granularity=granularity)
    assert len(fused.graph.nodes) < len(graph.graph.nodes)
    assert Calm()(fused).graph_module.meta["calm"] == report


def test_fused_runs_change_the_order_of_nodes_only(graph, report):
    found = analyze_calm(fuse_regions(graph, granularity="s-run"))
    assert Counter((node.target, node.facts) for node in found.nodes) == Counter(
        (node.target, node.facts) for node in report.nodes
    )
    assert {axis.verdict for axis in found.axes} == {axis.verdict for axis in report.axes}


def test_the_published_score_needs_the_published_ruleset():
    graph = bwsk_fx.capture(_vit(), _inputs())
    assert analyze_calm(type_nodes(graph, "sound")).published_score is None
    report = analyze_calm(type_nodes(graph, "published"))
    assert report.published_score == (8 * LAYERS + 2) / (11 * LAYERS + 4)
    assert report.to_json()["published_score"] == report.published_score
    assert "published CALM score (S-ratio): 69.2%" in str(report)


# -- the claims, executed ---------------------------------------------------------------------------------------------


class _Recorded(fx.Interpreter):
    """Runs a graph and remembers every value."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.values: dict[fx.Node, object] = {}

    def run_node(self, node: fx.Node):
        self.values[node] = super().run_node(node)
        return self.values[node]


class _Shards:
    """Runs single nodes of a graph on shards of their operands."""

    def __init__(self, graph: fx.GraphModule) -> None:
        self.graph = graph
        self.steps, self.axes = follow_axes(graph)
        recorded = _Recorded(graph)
        with torch.no_grad():
            recorded.run(*_inputs().values())
        self.values = recorded.values

    def dim(self, value: Value, name: str) -> int | None:
        names = [self.axes.name(axis) if axis is not None else None for axis in value.layout]
        return names.index(name) if name in names else None

    def run(self, step: Step, name: str, count: int) -> list[torch.Tensor]:
        return [self._run_shard(step, name, count, index) for index in range(count)]

    def _run_shard(self, step: Step, name: str, count: int, index: int) -> torch.Tensor:
        node, operands = step.node, {value.node: value for value in step.inputs}

        def shard(operand: fx.Node):
            value = self.values[operand]
            dim = self.dim(operands[operand], name) if operand in operands else None
            return value if dim is None else value.tensor_split(count, dim)[index]

        args, kwargs = (fx.node.map_arg(arguments, shard) for arguments in (node.args, node.kwargs))
        if node.target in ("view", "reshape", "expand"):
            # These name the whole size; a shard has its own.
            out = self.values[node].tensor_split(count, self.dim(step.results[0], name))[index]
            return getattr(args[0], node.target)(out.shape)
        if node.op == "call_module":
            return self.graph.get_submodule(node.target)(*args, **kwargs)
        return (
            getattr(args[0], node.target)(*args[1:], **kwargs)
            if node.op == "call_method"
            else node.target(*args, **kwargs)
        )

    def mapped(self, name: str) -> list[Step]:
        """Steps that carry the axis from an operand to the result, and claim nothing but MAP of it."""
        return [step for step in self.steps if step.inputs and self._maps(step, name)]

    def _maps(self, step: Step, name: str) -> bool:
        said = [claim for claim in step.claims if self.axes.name(claim.axis) == name]
        through = any(claim.consumed and claim.produced for claim in said)
        return through and all(claim.behaviour is MAP for claim in said)


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def shards(request) -> _Shards:
    return _Shards(bwsk_fx.capture(_vit(request.param), _inputs()))


@pytest.mark.parametrize(("name", "at_least"), [("batch", 55), ("token", 45), ("head", 12), ("key", 0)])
@pytest.mark.parametrize("count", [2, 3])
def test_mapped_nodes_run_on_shards(shards, name, at_least, count):
    """f(x1 ⊎ x2) = f(x1) ⊎ f(x2) for every node that claims it."""
    steps = shards.mapped(name)
    assert len(steps) >= at_least
    with torch.no_grad():
        for step in steps:
            whole, dim = shards.values[step.node], shards.dim(step.results[0], name)
            parts = torch.cat(shards.run(step, name, count), dim)
            torch.testing.assert_close(
                parts, whole, rtol=1e-5, atol=1e-6, msg=lambda text, step=step: f"{step.node}: {text}"
            )


def test_barriers_cannot_run_on_shards(shards):
    """A barrier that could run on shards would be a rule that asks for too much."""
    alone = {"LayerNorm": lambda x: F.layer_norm(x, x.shape[-1:]), "softmax": lambda x: x.softmax(-1)}
    checked: Counter = Counter()
    for step in shards.steps:
        if step.target in alone:
            x = shards.values[step.node.args[0]]
            parts = torch.cat([alone[step.target](part) for part in x.tensor_split(2, -1)], -1)
            assert not torch.allclose(parts, shards.values[step.node], rtol=1e-3)
            checked[step.target] += 1
    assert checked["LayerNorm"] == 2 * LAYERS + 1


def test_linear_maps_sum_their_partial_products(shards):
    checked = 0
    for step in shards.steps:
        if step.target == "Linear":
            module = shards.graph.get_submodule(step.node.target)
            x = shards.values[step.node.args[0]]
            parts = [
                F.linear(part, weight)
                for part, weight in zip(x.tensor_split(3, -1), module.weight.tensor_split(3, 1), strict=True)
            ]
            torch.testing.assert_close(sum(parts) + module.bias, shards.values[step.node], rtol=1e-5, atol=1e-6)
            checked += 1
    assert checked == 6 * LAYERS + 1


def test_the_loss_reduces_sums_and_counts(shards):
    (step,) = [step for step in shards.steps if step.target == "cross_entropy"]
    losses, counts = shards.run(step, "batch", 3), [BATCH // 3] * 3
    mean = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / BATCH
    torch.testing.assert_close(mean, shards.values[step.node])


def test_attention_maps_queries_over_all_keys_and_merges_nothing_else():
    shards = _Shards(bwsk_fx.capture(_vit(), _inputs()))
    for step in shards.steps:
        if step.target == "scaled_dot_product_attention":
            query, key, value = (shards.values[operand] for operand in step.node.args)
            whole = shards.values[step.node]
            parts = [F.scaled_dot_product_attention(part, key, value) for part in query.tensor_split(3, -2)]
            torch.testing.assert_close(torch.cat(parts, -2), whole, rtol=1e-5, atol=1e-6)
            partial = F.scaled_dot_product_attention(query, key[..., :8, :], value[..., :8, :])
            assert not torch.allclose(partial, whole, rtol=1e-3)


def test_the_class_token_joins_the_patches_and_leaves_alone(shards):
    """Where tokens are born and selected the axis changes, so those two nodes are checked by hand."""
    steps = {step.node.name: step for step in shards.steps}
    cls, patches = (shards.values[operand] for operand in steps["cat"].node.args[0])
    first, second = patches.tensor_split(2, 1)
    assert torch.equal(torch.cat((torch.cat((cls, first), 1), second), 1), shards.values[steps["cat"].node])
    tokens = shards.values[steps["getitem"].node.args[0]]
    assert torch.equal(tokens.tensor_split(3, 1)[0][:, 0, :], shards.values[steps["getitem"].node])


def test_patches_are_convolved_where_they_are(shards):
    (step,) = [step for step in shards.steps if step.target == "Conv2d"]
    module, image = shards.graph.get_submodule(step.node.target), shards.values[step.node.args[0]]
    rows = [module(part) for part in image.tensor_split(2, 2)]
    torch.testing.assert_close(torch.cat(rows, 2), shards.values[step.node], rtol=1e-5, atol=1e-6)
    kernels = module.weight.tensor_split(3, 1)
    sums = sum(F.conv2d(part, kernel, stride=8) for part, kernel in zip(image.split(1, 1), kernels, strict=True))
    torch.testing.assert_close(sums + module.bias.view(-1, 1, 1), shards.values[step.node], rtol=1e-5, atol=1e-5)


def test_all_claims_are_about_tensors_of_the_graph(shards):
    for step in shards.steps:
        tensors = pytree.tree_leaves(step.node.meta["val"])
        assert [value.rank for value in step.results] == [tensor.dim() for tensor in tensors]
