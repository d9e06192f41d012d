"""A buffer that the forward pass updates is updated once a step, whatever is recomputed."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import bwsk_fx
from bwsk_fx._state_watch import WRITES
from bwsk_fx.measure import saved_for_backward
from bwsk_fx.modes import apply
from bwsk_fx.passes.find_regions import REGION, FindRegions


class Net(nn.Module):
    def __init__(self, norm, layer, channels: int = 4) -> None:
        super().__init__()
        layers = (layer(channels), norm(channels), nn.GELU(), layer(channels), norm(channels), nn.Tanh())
        self.block, self.head = nn.Sequential(*layers), layer(channels)

    def forward(this, x: Tensor) -> Tensor:
        return this.head(x + this.block(x)).sin()


def _convolution(dimensions: int):
    kinds = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
    return lambda channels: kinds[dimensions](channels, channels, 1)


PLANS = [("exact", math.inf), ("rounded", math.inf)]
NORMS = {
    "1d": (nn.BatchNorm1d, 1),
    "2d": (nn.BatchNorm2d, 2),
    "3d": (nn.BatchNorm3d, 3),
    "cumulative": (lambda c: nn.BatchNorm2d(c, momentum=None), 2),
    "untracked": (lambda c: nn.BatchNorm2d(c, track_running_stats=False), 2),
    "synchronized": (nn.SyncBatchNorm, 2),
    "instance": (lambda c: nn.InstanceNorm2d(c, affine=True, track_running_stats=True), 2),
}


@pytest.mark.filterwarnings("ignore:node .* cannot be run on fake tensors")
@pytest.mark.parametrize("name", NORMS)
def test_statistics_are_those_of_eager(name, assert_as_eager):
    norm, dimensions = NORMS[name]
    x = torch.randn(3, 4, *[2] * dimensions, generator=torch.Generator().manual_seed(0))
    plans = [("exact", math.inf)] if dimensions != 1 else [("exact", 0.0), ("rounded", 0.1), ("rounded", math.inf)]
    model = assert_as_eager(lambda: Net(norm, _convolution(dimensions)), x, plans=plans)
    assert bwsk_fx.explain_saved(model).regions


def _regions_of_norms(model: nn.Module, x: Tensor) -> list[str]:
    graph = FindRegions("whole")(bwsk_fx.type_nodes(bwsk_fx.capture(model, x))).graph_module
    norms = [node for node in graph.graph.nodes if "norm" in str(node.target) or "block" in str(node.target)]
    return [str(node.target) for node in norms if REGION in node.meta]


@pytest.mark.parametrize(("name", "join"), [("2d", 2), ("cumulative", 0), ("synchronized", 0), ("instance", 0)])
def test_batch_norms_join_regions_where_their_statistics_are_functions(name, join):
    norm, dimensions = NORMS[name]
    model = Net(norm, _convolution(dimensions))
    found = _regions_of_norms(model, torch.randn(3, 4, 2, 2))
    assert [path for path in found if path in ("block.1", "block.4")] == ["block.1", "block.4"][:join]


class Twice(nn.Module):
    """The second use of a norm has to see what the first has written."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.norm(self.first(x)).tanh()).sin()).tanh()


def test_a_norm_that_is_used_twice_stays_outside(x, assert_as_eager):
    assert_as_eager(Twice, x, plans=PLANS)
    assert "norm" not in _regions_of_norms(Twice(), x)


def test_a_fused_graph_normalizes_by_running_statistics_in_eval_mode(x):
    torch.manual_seed(0)
    model = Net(nn.BatchNorm1d, lambda c: nn.Linear(c, c))
    fused = bwsk_fx.fuse_regions(bwsk_fx.capture(model, x))
    fused(x).sum().backward()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    fused.eval(), model.eval()
    assert torch.equal(fused(x), model(x))
    fused(x).sum().backward()
    assert before["block.1.num_batches_tracked"] == 1
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_a_convolutional_network_keeps_the_inputs_of_its_norms_alone():
    torch.manual_seed(0)
    layers = [layer for _ in range(3) for layer in (nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())]
    model, images = nn.Sequential(*layers), torch.randn(2, 8, 8, 8)
    eager = saved_for_backward(model, images)
    kept = saved_for_backward(apply(model, faith="exact", budget=0.0), images)
    activation = images.nbytes
    # Eager keeps inputs and outputs of the norms, of which the latter are cheap to make from the former.
    assert eager >= 6 * activation
    assert kept <= 4.5 * activation


class Functional(nn.Module):
    """Statistics that no version counter of PyTorch's tells of."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).tanh()
        y = functional.batch_norm(y, self.mean, self.var, training=self.training)
        return self.second(y.sin()).tanh()


def test_functional_batch_norm_writes_into_its_buffers(x, assert_as_eager):
    assert_as_eager(Functional, x, plans=PLANS)
    graph = bwsk_fx.capture(Functional(), x)
    (norm,) = [node for node in graph.graph.nodes if WRITES in node.meta]
    assert norm.target is functional.batch_norm and set(norm.meta[WRITES]) == {"mean", "var"}
    graph = bwsk_fx.capture(Functional().eval(), x)
    assert not any(WRITES in node.meta for node in graph.graph.nodes)


class OwnNorm(nn.Module):
    """A module without children that counts and averages."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.steps += 1
                self.mean.data.lerp_(x.mean(0), 0.1)
        return x - self.mean


def test_a_leaf_of_ones_own_writes_once(x, assert_as_eager, sandwich):
    assert assert_as_eager(lambda: sandwich(OwnNorm()), x, plans=PLANS)[2].steps == 2


class ReadsBefore(nn.Module):
    """What was computed from running statistics must not be recomputed from those of the next step."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(4, 4), nn.Sequential(nn.BatchNorm1d(4)), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x) - self.norm[0].running_mean
        return self.second(self.norm((y * y).tanh().sin()).sin()).tanh()


@pytest.mark.parametrize("granularity", ["block", "whole"])
def test_state_that_is_read_before_it_changes(x, assert_as_eager, granularity):
    assert_as_eager(ReadsBefore, x, granularity=granularity, plans=PLANS)


def test_running_backward_twice_updates_nothing(x):
    torch.manual_seed(0)
    model = apply(Net(nn.BatchNorm1d, lambda c: nn.Linear(c, c)), budget=math.inf, faith="exact")
    loss = model(x).sum()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for _ in range(2):
        loss.backward(retain_graph=True)
    assert before["block.1.num_batches_tracked"] == 1
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_a_forward_pass_alone_updates_once(x):
    torch.manual_seed(0)
    model = Net(nn.BatchNorm1d, lambda c: nn.Linear(c, c))
    twin = copy.deepcopy(model)
    apply(model, budget=math.inf)
    for candidate in (model, twin):
        candidate(x)
        with torch.no_grad():
            candidate(x)
    for (name, found), expected in zip(model.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(found, expected, msg=name)
    assert model.block[1].num_batches_tracked == 2
