"""Tensors that lie otherwise than traced are laid out again, in the first run and for good."""

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import bwsk_fx
from bwsk_fx.errors import PlanError
from bwsk_fx.planning.layouts import run
from bwsk_fx.reversible import ReversibleRegion
from bwsk_fx.rules.inverse import laid_out

aten = torch.ops.aten


class SoftplusOfNorm(nn.Module):
    """The fake kernel of softplus's gradient has its operand's strides, the real one those of the gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, 4)

    def forward(self, x):
        return F.softplus(self.norm(x.transpose(1, 2)).transpose(1, 2)).mean(1)


def test_gradients_are_right_where_fake_strides_are_wrong(train_step, assert_same_bits):
    torch.manual_seed(0)
    model, x = SoftplusOfNorm(), torch.randn(2, 3, 4)
    fused = bwsk_fx.fuse_regions(bwsk_fx.capture(model, x), faith="exact", granularity="whole")
    expected = train_step(model, [x])
    for _ in range(2):
        assert_same_bits(train_step(fused, [x]), expected)
    (region,) = (module for module in fused.modules() if isinstance(module, ReversibleRegion))
    copies = region.program.backward.graph.find_nodes(op="call_function", target=laid_out)
    assert [copy.args[0].target for copy in copies] == [aten.softplus_backward.default]


def _module(recorded: torch.Tensor) -> fx.GraphModule:
    graph = fx.Graph()
    first = graph.call_function(aten.sin.default, (graph.placeholder("x"),))
    first.meta["val"] = recorded
    graph.output((first, graph.call_function(aten.cos.default, (first,))))
    return fx.GraphModule(nn.Module(), graph)


def test_what_lies_as_recorded_gets_no_copy():
    module, x = _module(torch.empty(2, 3)), torch.randn(2, 3)
    found = run(module, x)
    assert torch.equal(found[1], x.sin().cos())
    assert not module.graph.find_nodes(op="call_function", target=laid_out)


@pytest.mark.parametrize("times", [1, 2])
def test_what_lies_otherwise_is_copied_in_every_run(times):
    module, x = _module(torch.empty(3, 2).t()), torch.randn(2, 3)
    for _ in range(times):
        sine, cosine = run(module, x)
        assert (sine.stride(), cosine.stride()) == ((1, 2), (1, 2))
        assert torch.equal(sine, x.sin()) and torch.equal(cosine, x.sin().cos())
    assert len(module.graph.find_nodes(op="call_function", target=laid_out)) == 1


def test_dimensions_of_one_index_lie_anywhere():
    module = _module(torch.empty_strided((2, 1), (1, 7)))
    run(module, torch.randn(2, 1))
    assert not module.graph.find_nodes(op="call_function", target=laid_out)


def test_other_sizes_are_refused():
    with pytest.raises(
        PlanError, match=r"^node sin_default \(aten.sin.default\) gave the sizes \(2, 3\), and was traced with"
    ):
        run(_module(torch.empty(3, 2)), torch.randn(2, 3))


@pytest.mark.parametrize("norm", [nn.LayerNorm(8), nn.GroupNorm(1, 3)])
def test_statistics_in_another_dtype_than_foreseen_are_taken(norm, train_step, assert_same_bits):
    """Fakes have them in bfloat16 where the weight is wider, kernels in float32."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), norm, nn.Tanh()), torch.randn(2, 3, 8)
    fused = bwsk_fx.fuse_regions(bwsk_fx.capture(model, x), granularity="whole", faith="exact")
    for _ in range(2):
        assert_same_bits(train_step(fused, [x], torch.bfloat16), train_step(model, [x], torch.bfloat16))


class Halves(nn.Module):
    """A CPU's GELU rounds a strided operand otherwise than a contiguous one."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x):
        left, right = self.linear(x).split([8, 8], -1)
        return torch.cat([F.gelu(right), left], -1)


def test_an_exact_plan_gives_a_kept_part_its_own_layout(train_step, assert_same_bits):
    torch.manual_seed(0)
    model, x = Halves(), torch.randn(64, 16)
    exact = bwsk_fx.fuse_regions(bwsk_fx.capture(model, x), faith="exact", granularity="whole")
    assert_same_bits(train_step(exact, [x]), train_step(model, [x]))
    (region,) = (module for module in exact.modules() if isinstance(module, ReversibleRegion))
    assert region.program.plan.kept_bytes == (64 * 16 + 64 * 8) * 4
    assert len(region.program.backward.graph.find_nodes(op="call_function", target=laid_out)) == 1


class Doubled(nn.Module):
    """No call of its backward pass takes the batch size as an argument, and no tensor there has it alone."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return torch.cat([x, x]).exp() * self.scale


@pytest.mark.parametrize("budget", [0.0, float("inf")])
def test_a_backward_pass_knows_the_symbols_in_its_sizes(budget):
    torch._dynamo.reset()
    model = Doubled()
    run = torch.compile(model, backend="bwsk_fx", options={"compiler": "eager", "budget": budget}, dynamic=True)
    for batch in (2, 5):
        x = torch.randn(batch, 3)
        (found,) = torch.autograd.grad(run(x).sum(1), model.scale, torch.ones(2 * batch))
        torch.testing.assert_close(found, 2 * x.exp().sum(0))
