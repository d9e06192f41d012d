"""What is read off a joint graph: passes, static values, needs; equal casts merged, random calls not."""

import pytest
import torch
from torch.nn import functional as F

from bwsk_fx.errors import PlanError
from bwsk_fx.planning.joint import is_constant, is_random, nbytes
from bwsk_fx.planning.trace import trace

aten = torch.ops.aten


def _names(nodes) -> set[str]:
    return {node.name for node in nodes}


def _count(joint, target) -> int:
    return len(joint.graph.find_nodes(op="call_function", target=target))


def test_nodes_belong_to_one_pass(planning, functions):
    joint = planning(functions.mlp, exact=True).joint
    forward = _names(node for node in joint.forward_nodes() if "witness_of" not in node.meta)
    assert forward - {"_unsafe_view"} == {"mm", "gelu", "mm_1", "t", "t_1", "t_2", "t_3"}
    assert {node.name for node in joint.tangents} <= _names(joint.backward)
    assert _names(joint.static) >= {"primals_2", "primals_3"}
    assert not _names(joint.static) & {"primals_1", "mm", "gelu", "mm_1"}
    assert [node.meta["input_name"] for node in joint.primals] == ["in0", "in1", "in2"]


def test_what_the_backward_pass_needs(planning, functions):
    joint = planning(functions.mlp, exact=True).joint
    roots = set()
    for node in joint.needed():
        while node.target in (aten.t.default, aten.view.default):
            node = node.args[0]
        roots.add(node.name)
    assert roots == {"primals_1", "primals_2", "primals_3", "mm", "gelu"}


def test_the_casts_of_one_input_are_merged(planning, functions):
    joint = planning(functions.attention, exact=True, dtype=torch.bfloat16).joint
    casts = [node for node in joint.forward_nodes() if node.target is aten._to_copy.default]
    sources = sorted(node.args[0].name for node in casts)
    # Eager casts the input three times, once for each of q, k and v.
    assert sources == ["primals_1", "primals_2", "primals_3", "primals_4"]


def _draws(draw):
    def function(x):
        return [x * draw(x) + x.sin() * draw(x)]

    return function


@pytest.mark.parametrize(
    "draw",
    [
        lambda x: torch.empty_like(x).exponential_(),
        lambda x: torch.empty_like(x).uniform_(),
        lambda x: torch.empty_like(x).normal_(),
        torch.rand_like,
        lambda x: F.dropout(x, 0.5),
    ],
    ids=["exponential", "uniform", "normal", "rand_like", "dropout"],
)
def test_equal_random_calls_are_not_merged(draw):
    joint = trace(_draws(draw), {"x": torch.randn(3, 4, requires_grad=True)}, [], "small").joint
    random = [node for node in joint.forward_nodes() if is_random(node)]
    assert len(random) == 2
    assert "occurrence" not in str([node.kwargs for node in joint.graph.nodes])


def test_fused_attention_is_random_with_dropout_only(planning, functions):
    joint = planning(functions.attention, exact=True).joint
    (fused,) = (node for node in joint.forward_nodes() if "scaled_dot_product" in str(node.target))
    assert isinstance(fused.meta["val"], tuple) and not is_random(fused)
    fused.args = (*fused.args[:3], 0.5)
    assert is_random(fused)


def test_copies_are_dropped_unless_they_are_returned():
    def function(x):
        return [x.sin().clone().cos(), x.exp().clone(), x.tanh().clone().t()]

    joint = trace(function, {"x": torch.randn(3, 4, requires_grad=True)}, [], "small").joint
    copied = joint.graph.find_nodes(op="call_function", target=aten.clone.default)
    assert [node.args[0].name for node in copied] == ["exp", "tanh"]


def test_sizes_and_constants(planning, functions):
    joint = planning(functions.mlp, exact=True).joint
    sizes = {node.name: nbytes(node) for node in joint.graph.nodes}
    assert (sizes["mm"], sizes["primals_2"], sizes["output"]) == (4 * 16 * 4, 8 * 16 * 4, 0)
    assert not any(map(is_constant, joint.graph.nodes))


def test_each_gradient_knows_its_tangents():
    def function(x, a, b):
        return [x @ a, (x @ b).argmax(-1), x @ b]

    inputs = {name: torch.randn(4, 4, requires_grad=True) for name in "xab"}
    joint = trace(function, inputs, [1, 2], "small").joint
    assert joint.tangents_read() == (frozenset({0, 1}), frozenset({0}), frozenset({1}))


def test_a_constant_tensor_is_refused():
    with pytest.raises(PlanError, match="a tensor that is neither an input nor a parameter of the region"):
        trace(
            lambda x: [x * torch.tensor([2.0, 3.0, 4.0, 5.0])],
            {"x": torch.randn(3, 4, requires_grad=True)},
            [],
            "small",
        )


def test_a_constant_number_is_made_anew():
    joint = trace(lambda x: [x * torch.tensor(2.5)], {"x": torch.randn(3, 4, requires_grad=True)}, [], "small").joint
    (made,) = joint.graph.find_nodes(op="call_function", target=torch.ops.aten.full.default)
    assert made.args == ([], 2.5) and made.kwargs["dtype"] is torch.float32
    assert not joint.graph.find_nodes(op="get_attr")
