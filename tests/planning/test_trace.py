"""Tracing, and dropout drawn bit for bit as eager execution draws it."""

import pytest
import torch
from torch.nn import functional as F

from bwsk_fx.errors import PlanError
from bwsk_fx.planning.trace import cpu_dropout, cpu_dropout_backward, trace

LAYOUTS = {
    "contiguous": lambda: torch.randn(7, 9),
    "transposed": lambda: torch.randn(9, 7).t(),
    "sliced": lambda: torch.randn(7, 18)[:, ::2],
    "expanded": lambda: torch.randn(7, 1).expand(7, 9),
    "channels last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "permuted": lambda: torch.randn(3, 4, 5).permute(2, 0, 1),
    "scalar": lambda: torch.randn(()),
    "empty": lambda: torch.randn(0, 3),
}


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_dropout_is_eager_dropout(p, dtype, layout):
    torch.manual_seed(0)
    x = layout().to(dtype).requires_grad_()
    tangent = torch.randn_like(x)
    torch.manual_seed(1)
    expected = F.dropout(x, p)
    state = torch.get_rng_state()
    (gradient,) = torch.autograd.grad(expected, x, tangent)
    torch.manual_seed(1)
    found, mask = cpu_dropout(x.detach(), p, True)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(found, expected)
    # With p = 0 eager returns its operand.
    assert p == 0.0 or found.stride() == expected.stride()
    scale = 0.0 if p == 1.0 else 1.0 / (1.0 - p)
    assert torch.equal(cpu_dropout_backward(tangent, mask, scale), gradient)


def test_dropout_in_eval_mode_draws_nothing():
    x, state = torch.randn(3, 4), torch.get_rng_state()
    found, mask = cpu_dropout(x, 0.5, False)
    assert torch.equal(found, x) and bool(mask.all())
    assert torch.equal(torch.get_rng_state(), state)


def test_outputs_without_gradients_have_no_tangent():
    def function(x):
        return [x.argmax(-1), x.sin(), x.detach().exp()]

    traced = trace(function, {"x": torch.randn(3, 4, requires_grad=True)}, [], "small")
    assert traced.differentiable == (False, True, False)
    assert len(traced.joint.tangents) == 1


def test_autocast_is_explicit_and_the_backward_pass_runs_without(planning, functions):
    joint = planning(functions.mlp, exact=True, dtype=torch.float16).joint
    products = joint.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)
    assert len(products) == 6
    assert {node.meta["val"].dtype for node in products} == {torch.float16}
    assert [gradient.meta["val"].dtype for gradient in joint.gradients] == [torch.float32] * 3


def test_tracing_leaves_inputs_and_random_state_alone():
    x, state = torch.randn(3, 4, requires_grad=True), torch.get_rng_state()
    trace(lambda x: [F.dropout(x, 0.5) * 2], {"x": x}, [], "small")
    assert x.grad is None and x.is_leaf
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("function", "cause"),
    [
        (lambda x: [x.mul_(2)], "received a mutation"),
        (lambda x: [x[x > 0]], "DynamicOutputShape"),
        (lambda x: [x * float(x.detach().sum())], "DataDependentOutput"),
        (lambda x: [x.no_such_method()], "no_such_method"),
    ],
    ids=["mutation", "dynamic shape", "branch on data", "user error"],
)
def test_what_cannot_be_traced_is_named(function, cause):
    with pytest.raises(PlanError, match=rf"^region small cannot be traced with its backward pass \(.*({cause})"):
        trace(function, {"x": torch.randn(3, 4, requires_grad=True)}, [], "small")
