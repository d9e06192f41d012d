"""In-place operators, gradients switched off, and what Python does beside the tensors."""

import random
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import bwsk_fx
from bwsk_fx.errors import CaptureError
from bwsk_fx.modes import apply

PLANS = [("exact", float("inf")), ("rounded", 0.1)]


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("ring", torch.zeros(3, 4))
        self.register_buffer("place", torch.zeros((), dtype=torch.long))
        self.register_buffer("average", torch.zeros(4))
        self.calls = 0


class Buffers(Base):
    """A ring of the last means with a pointer, and two moving averages."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).tanh()
        before = (y - self.average).square().sin()
        with torch.no_grad():
            self.average.mul_(0.9).add_(y.mean(0), alpha=0.1)
            self.ring.index_copy_(0, self.place[None], y.mean(0, keepdim=True))
            self.ring[0] += y.mean(0)
            self.place.add_(1).remainder_(3)
        z = (y - self.average) * self.ring.sum(0) + before
        return self.second((z * z).sin().tanh()).sin()


class ByData(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).tanh()
        self.average.data.mul_(0.9).add_(y.detach().mean(0))
        return self.second(y - self.average).sin()


class Activations(Base):
    """In-place functions, flags given by place, writes through indices and views."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu_(self.first(x)).sin()
        y += 1
        z = y.mul_(2).clone()
        z[:, 0] = 0
        z[:, 1].add_(y[:, 2])
        functional.dropout(z, 0.3, True, True)
        return functional.elu_(self.second(z)).sin().add_(2)


class AcrossBorders(Base):
    """A view that leaves a region, is written into there, and changes what a later region reads."""

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x).tanh().clone()
        view = z[:, 1]
        self.place.add_(1)
        w = x.sin().cos()
        view.add_(w[:, 2])
        self.place.add_(1)
        return self.second(z.sin()).sin()


class Switched(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).tanh()
        cut = y.detach().sin()
        with torch.no_grad():
            still = self.second(y).tanh()
        with torch.enable_grad():
            return self.second(cut * still).sin() + y.cos()


class DropPath(Base):
    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.second):
            x = x + layer(x).tanh() * torch.empty(x.shape[0], 1, dtype=x.dtype).bernoulli_(0.5)
        return x


@pytest.mark.parametrize("kind", [Buffers, ByData, Activations, AcrossBorders, Switched, DropPath])
def test_side_effects_are_those_of_eager(kind, x, assert_as_eager):
    assert_as_eager(kind, x, plans=PLANS)


class GradientInside(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 1
        (slope,) = torch.autograd.grad(y.pow(3).sum(), y, create_graph=True)
        return y - 0.1 * slope


def test_a_leaf_may_differentiate_inside(x, assert_as_eager, sandwich):
    assert_as_eager(lambda: sandwich(GradientInside()), x, plans=PLANS[:1])


class PythonNoise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * random.random()


def test_a_leaf_may_draw_from_python(x, assert_as_eager, sandwich):
    assert_as_eager(lambda: sandwich(PythonNoise()), x, plans=PLANS[:1])


class InTheOpen(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        (slope,) = torch.autograd.grad(y.pow(3).sum(), y, create_graph=True)
        return y - slope


class LayerDrop(Base):
    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.second):
            if random.random() < 0.5:
                continue
            x = layer(x)
        return x * 2


class NumpyDrop(Base):
    def forward(self, x: Tensor) -> Tensor:
        import numpy as np

        return self.second(x) if np.random.uniform() < 0.5 else self.first(x)


class Counts(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.first(x) * min(1.0, self.calls / 10)


class NewBuffer(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.average = x.detach().mean(0)
        return self.first(x - self.average)


class SetsData(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.average.data = x.detach().mean(0)
        return self.first(x - self.average)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (InTheOpen, r"create_graph=True\): torch.autograd.grad is called in the forward pass"),
        (LayerDrop, "random numbers were drawn from Python's random or numpy.random before this call"),
        (NumpyDrop, "random numbers were drawn from Python's random or numpy.random before this call"),
        (NewBuffer, "gives buffer 'average' a new tensor, which a graph cannot"),
        (SetsData, "a tensor's .data is set, which is not recorded; write into it with copy_"),
    ],
)
def test_what_would_be_lost_is_refused(kind, text, x):
    before = random.getstate()
    model = kind()
    with pytest.raises(CaptureError, match=text):
        apply(model)(x)
    assert random.getstate() == before and model.calls == 0


def test_a_counter_in_python_is_warned_of(x):
    with pytest.warns(
        UserWarning, match="Counts.forward changes the number 'calls' from 0 to 1, which a graph does in no"
    ):
        bwsk_fx.capture(Counts(), x)


def test_modes_may_change_after_apply(x):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 4))
    twin = bwsk_fx.apply(
        nn.Sequential(*[nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 4)])
    )
    twin.load_state_dict(model.state_dict())
    for training in (True, False, True):
        outputs = []
        for candidate in (model, twin):
            torch.manual_seed(1)
            outputs.append(candidate.train(training)(x))
        torch.testing.assert_close(*outputs)
    assert twin[2].num_batches_tracked == 2


class Remembers(nn.Module):
    """A leaf that changes what its attributes hold, and no attribute itself."""

    def __init__(self) -> None:
        super().__init__()
        self.means: list = []
        self.counts = {"calls": {"of forward": 0.0}}
        self.notes = SimpleNamespace(calls=0)
        self.total = [torch.zeros(())]

    def forward(self, x: Tensor) -> Tensor:
        self.means.append(x.detach().mean())
        self.counts["calls"]["of forward"] += 1.0
        self.notes.calls += 1
        self.total[0] += 1
        return x * self.counts["calls"]["of forward"] * self.notes.calls * self.total[0]


def test_a_leaf_may_change_what_its_attributes_hold(x, assert_as_eager, sandwich):
    model = assert_as_eager(lambda: sandwich(Remembers()), x, plans=PLANS[:1])
    assert [type(mean) for mean in model[2].means] == [Tensor, Tensor]
    assert model[2].total == [torch.tensor(2.0)]
