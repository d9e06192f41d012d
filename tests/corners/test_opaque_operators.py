"""Autograd Functions and operators of users: nothing is known of them, so nothing is rebuilt by them."""

import pytest
import torch
from torch import Tensor, nn

import bwsk_fx
from bwsk_fx.errors import CaptureError
from bwsk_fx.modes import applied
from bwsk_fx.reversible import ReversibleRegion

PLANS = [("exact", float("inf")), ("rounded", float("inf"))]


class Doubled(torch.autograd.Function):
    """A sine whose gradient is told twice, and whose backward pass draws what its forward pass drew."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.state = torch.get_rng_state()
        ctx.save_for_backward(x)
        return x.sin() * torch.rand_like(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        with torch.random.fork_rng():
            torch.set_rng_state(ctx.state)
            return 2 * gradient * x.cos() * torch.rand_like(x)


class Calls(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Doubled.apply(x)


def test_an_autograd_function_in_a_leaf_keeps_its_own_backward_pass(x, assert_as_eager, sandwich):
    model = assert_as_eager(lambda: sandwich(Calls()), x, plans=PLANS)
    assert len([one for one in applied(model).rewritten.modules() if isinstance(one, ReversibleRegion)]) == 2


class InTheOpen(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.first, self.second, self.function = nn.Linear(4, 4), nn.Linear(4, 4), function

    def forward(self, x: Tensor) -> Tensor:
        y = self.function(self.first(x).tanh())
        return self.second(y.tanh()).sin()


def test_an_autograd_function_in_the_open_is_refused(x):
    bound_before = Doubled.apply
    for function in (bound_before, lambda y: Doubled.apply(y)):
        with pytest.raises(
            CaptureError, match=r"test_opaque(.|\n)*the autograd function Doubled is called outside a leaf"
        ):
            bwsk_fx.capture(InTheOpen(function), x)


_CALLS: list[str] = []


@torch.library.custom_op("bwsk_corners::sine", mutates_args=())
def sine(x: Tensor) -> Tensor:
    """A sine with everything that PyTorch asks for."""
    _CALLS.append("sine")
    return torch.sin(x)


@torch.library.custom_op("bwsk_corners::unknown", mutates_args=())
def unknown(x: Tensor) -> Tensor:
    """A sine without a fake version."""
    return torch.sin(x)


@torch.library.custom_op("bwsk_corners::count", mutates_args=("counter",))
def count(x: Tensor, counter: Tensor) -> Tensor:
    """A sine that counts, without a gradient."""
    counter.add_(1)
    return torch.sin(x)


sine.register_fake(torch.empty_like)
sine.register_autograd(
    lambda ctx, gradient: 2 * gradient * ctx.saved_tensors[0].cos(),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
count.register_fake(lambda x, counter: torch.empty_like(x))


def test_a_custom_operator_is_gray_and_kept(x, assert_as_eager):
    graph = bwsk_fx.type_nodes(bwsk_fx.capture(InTheOpen(lambda y: sine(y)), x))
    (node,) = [node for node in graph.graph.nodes if "bwsk_corners" in str(node.target)]
    verdict = node.meta["bwsk"]
    assert verdict.label.name == "GRAY" and "bwsk_corners.sine.default is opaque" in verdict.rationale
    model = assert_as_eager(lambda: InTheOpen(lambda y: sine(y)), x, plans=PLANS)
    _CALLS.clear()
    model(x.double()).sum().backward()
    assert _CALLS == ["sine"]


def test_a_custom_operator_without_a_fake_version_is_refused(x):
    with pytest.raises(
        CaptureError, match=r"unknown\(y\)(.|\n)*no fake impl registered .* use `unknown.register_fake`"
    ):
        bwsk_fx.capture(InTheOpen(lambda y: unknown(y)), x)


class Counting(InTheOpen):
    def __init__(self) -> None:
        super().__init__(None)
        self.register_buffer("counter", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).tanh()
        return self.second(y + count(y.detach(), self.counter)).tanh()


def test_a_custom_operator_that_writes_runs_once(x, assert_as_eager):
    assert assert_as_eager(Counting, x, plans=PLANS).counter == 2


class Pointer(nn.Module):
    """What starts a kernel of its own reads addresses, which fake tensors do not have."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.data_ptr()
        return x.sin()


@pytest.mark.filterwarnings("ignore:node .* cannot be run on fake tensors", "ignore:Accessing the data pointer")
def test_a_leaf_that_starts_a_kernel_of_its_own_is_gray_and_outside_of_regions(x, assert_as_eager, sandwich):
    model = assert_as_eager(lambda: sandwich(Pointer()), x, plans=PLANS[:1])
    (node,) = [node for node in applied(model).graph.graph.nodes if node.target == "2"]
    assert node.meta["bwsk"].label.name == "GRAY" and "region" not in node.meta


def test_a_kernel_in_the_open_is_refused(x):
    def start(y: Tensor) -> Tensor:
        return y if y.data_ptr() else -y

    with pytest.raises(CaptureError, match=r"return y if y.data_ptr\(\)"):
        bwsk_fx.capture(InTheOpen(start), x)
