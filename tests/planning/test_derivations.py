"""Every way to a value: forwards, backwards, and through views for nothing."""

import networkx as nx
import pytest
import torch

from bwsk_fx.planning.derivations import Kind, keepable
from bwsk_fx.planning.joint import is_random
from bwsk_fx.rules.inverse import registered_inverses

aten = torch.ops.aten


def _ways(hypergraph, name: str) -> set[tuple[str, str]]:
    return {(one.kind.value, one.rule) for one in hypergraph.derivations if one.head.name == name}


def test_sum_and_layer_norm_go_both_ways(planning, functions):
    hypergraph = planning(functions.residual, exact=False, dtype=torch.bfloat16).hypergraph
    assert _ways(hypergraph, "primals_1") == {("invert", "sum"), ("invert", "LayerNorm input from x̂")}
    assert ("invert", "LayerNorm output from x̂") in _ways(hypergraph, "getitem")


def test_exact_faith_has_no_rounding_inverse(planning, functions):
    for function in (functions.residual, functions.chain):
        graph = planning(function, exact=True, dtype=torch.bfloat16).hypergraph
        assert all(one.exact for one in graph.derivations)
        assert not {one.rule for one in graph.derivations} & {"sum", "scaling", "LayerNorm input from x̂"}


def test_random_values_are_drawn_once(planning, functions):
    graph = planning(functions.dropout, exact=True).hypergraph
    (draw,) = (value for value in graph.values if is_random(value))
    assert _ways(graph, draw.name) == {("invert", "packed mask"), ("invert", "replayed draw")}


def test_views_of_one_tensor_are_one_class(planning, functions):
    parts = planning(functions.views, exact=True)
    class_of = {value.name: first.name for value, first in parts.hypergraph.class_of.items()}
    assert {class_of[name] for name in ("t", "unsqueeze")} == {"mm"}
    assert class_of["permute"] == class_of["exp"] != "mm"
    assert all(one.seconds == 0.0 for one in parts.hypergraph.views)


@pytest.mark.parametrize("name", ["mlp", "residual", "attention", "dropout", "chain", "views"])
def test_recomputation_alone_has_no_circle(planning, functions, name):
    graph = planning(getattr(functions, name), exact=True).hypergraph
    edges = nx.DiGraph(
        (tail, one.head) for one in graph.derivations if one.kind is Kind.RECOMPUTE for tail in one.tails
    )
    assert nx.is_directed_acyclic_graph(edges)


def test_only_tensors_can_be_kept(planning, functions):
    values = planning(functions.attention, exact=True).hypergraph.values
    kept = {value for value in values if keepable(value)}
    assert {value.name for value in values if value not in kept} == {"_scaled_dot_product_flash_attention_for_cpu"}


def test_products_are_the_intensive_ones(planning, functions):
    graph = planning(functions.attention, exact=True).hypergraph
    assert {one.rule for one in graph.derivations if one.intensive} == {
        "mm",
        "_scaled_dot_product_flash_attention_for_cpu",
    }


def test_the_families_have_registered_their_inverses():
    assert {aten.add.Tensor, aten.native_layer_norm.default, aten.view.default, aten.bernoulli.p} <= set(
        registered_inverses()
    )


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["mlp", "residual", "chain", "views", "dropout"])
def test_every_inverse_rebuilds_its_value(planning, functions, inputs_of, name, dtype):
    """Run the forward graph, witnesses included, and each inverse on what it found."""
    function = getattr(functions, name)
    parts = planning(function, exact=False, dtype=dtype)
    at = dict(zip(parts.joint.primals, (tensor.detach() for tensor in inputs_of(function).values()), strict=True))
    torch.manual_seed(0)
    for node in parts.hypergraph.values:
        if node.op == "call_function":
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), at.__getitem__)
            at[node] = node.target(*args, **kwargs)
    inverses = [one for one in (*parts.hypergraph.derivations, *parts.hypergraph.views) if one.kind is Kind.INVERT]
    assert inverses
    for one in inverses:
        graph = torch.fx.Graph()
        places = [graph.placeholder(f"tail{index}") for index, _ in enumerate(one.tails)]
        graph.output(one.emit(graph, places))
        found = torch.fx.GraphModule(torch.nn.Module(), graph)(*(at[tail] for tail in one.tails))
        expected = at[one.head]
        assert (found.shape, found.dtype, found.stride()) == (expected.shape, expected.dtype, expected.stride())
        if one.exact:
            assert torch.equal(found, expected), one.rule
        else:
            tails = [at[tail] for tail in one.tails]
            # A difference is as exact as the larger of its operands.
            loose = 8 * max(torch.finfo(tail.dtype).eps for tail in tails if tail.is_floating_point())
            if one.rule.startswith("gelu"):
                # Far to the left, where its slope is zero, any operand will do.
                found, expected = found.clamp(min=-4.0), expected.clamp(min=-4.0)
                found = torch.where(expected == -4.0, expected, found)
            largest = max(tensor.abs().max().item() for tensor in (*tails, expected))
            torch.testing.assert_close(found, expected, rtol=loose, atol=loose * largest)
