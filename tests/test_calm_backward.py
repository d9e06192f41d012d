"""The backward pass of each node, executed on shards: gradients are mapped or summed just as the report says."""

from collections import Counter

import pytest
import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

import bwsk_fx
from bwsk_fx.calm import Analysis
from bwsk_fx.rules.axis import Behaviour

MAP, JOIN, REDUCE, BARRIER = Behaviour
LAYERS, HIDDEN, WIDE, TOKENS, BATCH, FLOAT = 2, 32, 64, 17, 6, 4


@pytest.fixture(scope="module")
def graph(make_vit, make_images):
    return bwsk_fx.capture(make_vit(num_hidden_layers=LAYERS), make_images(BATCH)).double()


@pytest.fixture(scope="module")
def analysis(graph):
    return Analysis.of(graph)


@pytest.fixture(scope="module")
def report(analysis):
    return analysis.report()


def _report(module, *inputs, **options):
    return bwsk_fx.analyze_calm(bwsk_fx.capture(module, inputs, **options))


def _gradients(report, axis: str) -> dict[str, int]:
    return {each.gradient: each.bytes for each in report.axis(axis).gradients}


# -- what is reported -------------------------------------------------------------------------------------------------


def test_a_batch_parallel_step_sums_one_gradient_per_parameter(graph, report):
    batch = report.axis("batch")
    assert [(point.target, point.behaviour) for point in batch.reduces] == [("cross_entropy", REDUCE)]
    assert batch.barriers == ()
    assert Counter(each.gradient for each in batch.gradients) == Counter(name for name, _ in graph.named_parameters())
    sizes = {name: parameter.numel() * 8 for name, parameter in graph.named_parameters()}
    assert _gradients(report, "batch") == sizes
    assert batch.parameter_gradient_bytes == sum(sizes.values())
    assert batch.activation_gradient_bytes == 0
    assert batch.backward_verdict.startswith(f"batch, backward: 0 barriers, {len(sizes)} parameter gradients to sum (")


def test_the_loss_gives_every_shard_the_same_gradient(report):
    (fact,) = [fact for fact in report.node("cross_entropy").backward if fact.axis == "batch"]
    assert (fact.behaviour, fact.reason) == (MAP, "each shard takes the gradient of the sum as it is")


def test_column_parallel_layers_sum_the_gradient_of_their_operand(report):
    """Megatron's conjugate operators: what is free forward is an all-reduce backward, and the other way round."""
    found = _gradients(report, "feature")
    mine = {name: size for name, size in found.items() if name.startswith("vit_layers_0")}
    assert mine == {
        "vit_layers_0_layernorm_before": TOKENS * HIDDEN * FLOAT,
        "vit_layers_0_layernorm_after": TOKENS * HIDDEN * FLOAT,
        "vit_layers_0_mlp_activation_fn": TOKENS * WIDE * FLOAT,
    }
    uses = {each.gradient: each.nodes for each in report.axis("feature").gradients}
    # One sum serves q, k and v.
    assert uses["vit_layers_0_layernorm_before"] == tuple(f"vit_layers_0_attention_{name}_proj" for name in "qkv")
    behaviours = {fact.behaviour for fact in report.node("vit_layers_0_mlp_fc2").backward if fact.axis == "feature"}
    assert behaviours == {MAP, REDUCE}


def test_tokens_share_weights_and_have_positions_of_their_own(graph, report):
    summed = set(_gradients(report, "token"))
    assert "vit.layers.0.mlp.fc1.weight" in summed
    assert "vit.layers.0.layernorm_before.bias" in summed
    # The class token is behind an expanded parameter.
    assert "vit.embeddings.cls_token" in summed
    assert "vit.embeddings.position_embeddings" not in summed
    assert "classifier.weight" not in summed
    assert "vit.embeddings.cls_token" not in _gradients(report, "feature")
    assert report.axis("token").backward_counts[BARRIER] == LAYERS


def test_heads_need_nothing_in_either_direction(report):
    head = report.axis("head")
    assert head.gradients == ()
    assert head.backward_counts == {MAP: head.nodes - 3 * LAYERS, JOIN: 0, REDUCE: 0, BARRIER: 0}


def test_equal_sizes_are_not_taken_for_equal_axes():
    """Eight tokens of eight features: the weight has a dimension of eight, which is not that of the tokens."""
    report = _report(nn.Linear(8, 8), torch.randn(4, 8, 8))
    assert set(_gradients(report, "token")) == {"weight", "bias"}
    assert set(_gradients(report, "feature")) == set()


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.batch, self.layer = nn.BatchNorm1d(8), nn.LayerNorm(8)

    def forward(self, x):
        return self.layer(self.batch(x)).sum(-1)


def test_a_barrier_stays_one_and_its_weights_are_summed():
    report = _report(Norms().train(), torch.randn(4, 8))
    facts = [(fact.axis, fact.behaviour, fact.gradient) for fact in report.node("batch").backward]
    assert ("batch", BARRIER, "") in facts
    assert ("batch", REDUCE, "batch.weight") in facts
    assert not [fact for fact in facts if fact[0] != "batch" and fact[1] is REDUCE]
    layer = [(fact.axis, fact.behaviour, fact.gradient) for fact in report.node("layer").backward]
    assert ("feature", BARRIER, "") in layer
    assert ("feature", REDUCE, "layer.weight") not in layer
    assert ("batch", REDUCE, "layer.weight") in layer


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        y = self.linear(x)
        return (y * y.mean(1, keepdim=True)).amax(-1)


def test_a_broadcast_operand_gets_a_sum_and_ties_are_counted():
    report = _report(Scaled(), torch.randn(4, 6, 8))
    assert _gradients(report, "token")["mean"] == 8 * FLOAT
    (fact,) = [fact for fact in report.node("amax").backward if fact.axis == "feature"]
    assert (fact.behaviour, fact.bytes) == (REDUCE, 6 * FLOAT)
    # The mean sums forward, so that backward every token takes its gradient as it is.
    assert [fact.behaviour for fact in report.node("mean").backward if fact.axis == "token"] == [MAP]


def test_nothing_flows_through_frozen_layers_and_integers():
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8)).requires_grad_(False)
    model[1].bias.requires_grad_(True)
    report = _report(model, torch.randint(10, (4, 6)))
    assert report.node("_0").backward == ()
    assert _gradients(report, "batch") == {"1.bias": 8 * FLOAT}
    assert _gradients(report, "token") == {"1.bias": 8 * FLOAT}
    assert _gradients(report, "feature") == {}


def test_a_residual_on_a_layers_own_operand_is_no_reshape():
    """Input and output features are one axis here, and the gradient of the operand is summed over it all the same."""

    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            x = self.first(x)
            return x + self.second(x)

    assert _gradients(_report(Skip(), torch.randn(4, 8)), "feature") == {"first": 8 * FLOAT}


# -- executed ---------------------------------------------------------------------------------------------------------


class _Recorded(fx.Interpreter):
    def __init__(self, graph: fx.GraphModule, inputs) -> None:
        super().__init__(graph)
        self.values: dict[fx.Node, object] = {}
        with torch.no_grad():
            self.run(inputs["pixel_values"].double(), inputs["labels"])

    def run_node(self, node: fx.Node):
        self.values[node] = super().run_node(node)
        return self.values[node]


class _Node:
    """Runs forward and backward of one node, whole or on a shard."""

    def __init__(self, graph, values, analysis, operation, axis: str) -> None:
        self.graph, self.values, self.axes, self.step = graph, values, analysis.axes, operation.step
        self.axis = axis
        self.operands = {value.node: value for value in operation.step.inputs}

    def dim(self, value) -> int | None:
        names = [None if axis is None else self.axes.name(axis) for axis in value.layout]
        return names.index(self.axis) if self.axis in names else None

    def gradients(self, count: int, index: int) -> dict[str, torch.Tensor]:
        """Gradients of operands and parameters by name, of the part `index` of `count`."""
        node = self.step.node
        given = {operand: self._operand(operand, count, index) for operand in node.all_input_nodes}
        args, kwargs = (fx.node.map_arg(part, given.__getitem__) for part in (node.args, node.kwargs))
        out = self._part(self.step.results[0], self.values[node], count, index)
        if node.target in ("view", "reshape", "expand"):
            args, kwargs = (args[0], out.shape), {}
        result = self._call(node, args, kwargs)
        generator = torch.Generator().manual_seed(0)
        whole = torch.randn(self.values[node].shape, generator=generator, dtype=torch.float64)
        wanted = {name: value for name, value in self._named(given) if value.requires_grad}
        grads = torch.autograd.grad(
            result, list(wanted.values()), self._part(self.step.results[0], whole, count, index), allow_unused=True
        )
        return {name: grad for name, grad in zip(wanted, grads, strict=True) if grad is not None}

    def _named(self, given):
        yield from ((str(operand), value) for operand, value in given.items() if isinstance(value, torch.Tensor))
        if self.step.node.op == "call_module":
            module = self.graph.get_submodule(self.step.node.target)
            yield from ((f"{self.step.node.target}.{name}", value) for name, value in module.named_parameters())

    def _operand(self, operand: fx.Node, count: int, index: int):
        value = self.values[operand]
        if operand not in self.operands:
            return value
        part = self._part(self.operands[operand], value, count, index)
        return part.detach().requires_grad_(part.is_floating_point())

    def _part(self, value, tensor: torch.Tensor, count: int, index: int) -> torch.Tensor:
        dim = self.dim(value)
        return tensor if dim is None else tensor.tensor_split(count, dim)[index]

    def _call(self, node, args, kwargs):
        if node.op == "call_module":
            return self.graph.get_submodule(node.target)(*args, **kwargs)
        call = getattr(args[0], node.target) if node.op == "call_method" else node.target
        return call(*(args[1:] if node.op == "call_method" else args), **kwargs)


@pytest.mark.parametrize(("axis", "at_least"), [("batch", 55), ("token", 45), ("head", 12)])
def test_gradients_of_shards_are_mapped_or_summed_as_reported(graph, analysis, make_images, axis, at_least):
    values = _Recorded(graph, make_images(BATCH)).values
    names = {id(parameter): name for name, parameter in graph.named_parameters()}
    aliases = {node.name: names[id(values[node])] for node in graph.graph.nodes if node.op == "get_attr"}
    checked = 0
    for operation in analysis.operations:
        claims = [claim for claim in operation.step.claims if analysis.axes.name(claim.axis) == axis]
        through = [claim for claim in claims if claim.consumed and claim.produced]
        if not (operation.learns and through and all(claim.behaviour is MAP for claim in claims)):
            continue
        node = _Node(graph, values, analysis, operation, axis)
        whole, shards = node.gradients(1, 0), [node.gradients(3, index) for index in range(3)]
        facts = [fact for fact in analysis.backward.facts(operation) if fact.axis == axis]
        summed = {fact.gradient for fact in facts if fact.behaviour is REDUCE}
        dims = {str(value.node): node.dim(value) for value in operation.step.inputs}
        for name, gradient in whole.items():
            parts = [shard[name] for shard in shards]
            if aliases.get(name, name) in summed:
                torch.testing.assert_close(sum(parts), gradient, msg=lambda text, name=name: f"{name}: {text}")
                assert not torch.allclose(parts[0], gradient)
            elif dims.get(name) is not None:
                torch.testing.assert_close(torch.cat(parts, dims[name]), gradient)
            else:
                raise AssertionError(f"{operation.name}: nothing is said of the gradient of {name} along {axis}")
        checked += 1
    assert checked >= at_least


def test_output_features_of_a_layer_are_summed_in_its_operands_gradient(graph, analysis, make_images):
    values = _Recorded(graph, make_images(BATCH)).values
    checked = 0
    for operation in analysis.operations:
        if operation.step.target != "Linear":
            continue
        module, x = graph.get_submodule(operation.step.node.target), values[operation.step.node.args[0]]
        x = x.detach().requires_grad_()
        out = torch.randn(values[operation.step.node].shape, dtype=torch.float64)
        (whole,) = torch.autograd.grad(module(x), x, out)
        weights, outs = module.weight.tensor_split(3, 0), out.tensor_split(3, -1)
        parts = [part @ weight for part, weight in zip(outs, weights, strict=True)]
        torch.testing.assert_close(sum(parts), whole)
        source = operation.step.inputs[0].node.name
        summed = {fact.gradient for fact in analysis.backward.facts(operation) if fact.behaviour is REDUCE}
        assert source in summed
        checked += 1
    assert checked == 6 * LAYERS + 1


def test_all_is_said_of_differentiable_nodes_only(analysis):
    for operation in analysis.operations:
        tensors = [leaf for leaf in pytree.tree_leaves(operation.step.node.meta["val"]) if torch.is_tensor(leaf)]
        floats = any(tensor.is_floating_point() for tensor in tensors)
        assert bool(analysis.backward.facts(operation)) == (operation.learns and floats)
