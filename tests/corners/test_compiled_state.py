"""Under torch.compile, the backward pass sees the buffers that the forward pass saw, whatever changed them since."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import bwsk_fx
from bwsk_fx.errors import PlanError

PLANS = [("exact", 0.0), ("rounded", 0.1), ("exact", math.inf), ("rounded", math.inf)]


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


class Stateful(nn.Module):
    """A model around a step that reads and writes buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("mean", torch.full((4,), 0.5))
        self.register_buffer("ring", torch.ones(4, 4) + torch.eye(4))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x).tanh()).sin()).sigmoid()


class NormReadBefore(Stateful):
    def middle(self, x):
        return self.norm((x - self.norm.running_mean).exp()).tanh()


class NormReadAfter(Stateful):
    def middle(self, x):
        return (self.norm(x.exp()).tanh() / self.norm.running_var.add(1e-5).sqrt()).tanh()


class Norm2d(Stateful):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def middle(self, x):
        x = x[:, :, None, None].expand(-1, -1, 2, 1)
        scaled = x * self.norm.running_var[:, None, None].clone()
        return self.norm(scaled.tanh()).mean((2, 3))


class Average(Stateful):
    """Scales by the average before and after, as running normalizations do."""

    def middle(self, x):
        x = (x * self.mean.clone()).tanh()
        with torch.no_grad():
            self.mean.lerp_(x.mean(0), 0.25)
        return (x * self.mean.clone()).tanh()


class Ring(Stateful):
    """A queue written by index, and read through views that have no inverse."""

    def middle(self, x):
        x = (x * self.ring.clone().diagonal()).tanh() @ self.ring.clone().unfold(0, 4, 1)[0]
        self.ring.index_copy_(0, self.steps[None] % 4, x.detach().mean(0, keepdim=True))
        self.steps += 1
        return x.exp().sin()


class Counter(Stateful):
    def middle(self, x):
        self.steps += 1
        x = (x / self.steps.clone()).tanh()
        self.steps += 1
        return (x * self.steps.clone().sqrt()).tanh()


class ShrinkingWeight(Stateful):
    """A parameter that the forward pass moves."""

    def middle(self, x):
        with torch.no_grad():
            self.last.weight.mul_(0.9)
        return self.last(x).tanh()


class BrokenAtNorm(Stateful):
    def middle(self, x):
        return self.norm((self.last(x) - self.norm.running_mean).sin().cos())


class Parts(Stateful):
    """Returns parts of a copy of what changes afterwards."""

    def middle(self, x):
        return x

    def forward(self, x):
        parts = self.ring.clone().split(2)
        corner = self.ring.clone().diagonal()
        self.ring.mul_(2.0)
        return super().forward(x), parts[0], corner, self.ring.clone()


MODELS = {kind.__name__: kind for kind in Stateful.__subclasses__()}


def assert_close(found, expected) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: name + text)


def double(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().double().train()


def compiled(model: nn.Module, dynamic: bool = False, **options) -> nn.Module:
    model = copy.deepcopy(model)
    model.compile(backend="bwsk_fx", options={"compiler": "eager"} | options, dynamic=dynamic, fullgraph=True)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_gradients_and_buffers_are_eagers(name, x, train, assert_same_bits):
    model = double(MODELS[name])
    expected = train(copy.deepcopy(model), [x.double()])
    for faith, budget in PLANS:
        found = train(compiled(model, faith=faith, budget=budget), [x.double()])
        if faith == "exact":
            assert_same_bits(found, expected)
        assert_close(found, expected)


@pytest.mark.parametrize("name", ["NormReadBefore", "Ring", "Counter"])
def test_any_batch_size_sees_the_old_buffers(name, train):
    model, run = double(MODELS[name]), compiled(double(MODELS[name]), dynamic=True, budget=math.inf)
    for size in (3, 5):
        x = torch.randn(size, 4, dtype=torch.float64)
        assert_close(train(run, [x]), train(model, [x]))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def twice(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Two passes forward before the one backward: the second changes what the first has read, and left behind."""
    sum(model(x * scale).square().sum() for scale in (1.0, 2.0)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("name", ["NormReadBefore", "NormReadAfter", "Average", "Ring", "Counter"])
def test_each_of_two_passes_sees_its_own_buffers(name, x):
    model = double(MODELS[name])
    for budget in (0.0, math.inf):
        assert_close(twice(compiled(model, budget=budget), x.double()), twice(copy.deepcopy(model), x.double()))


@pytest.mark.slow
@pytest.mark.parametrize("route", ["backend", "partitioner"])
@pytest.mark.parametrize("name", ["NormReadBefore", "Ring"])
def test_generated_code_sees_the_old_buffers_and_writes_the_new(name, route, x, train):
    model = double(MODELS[name])
    expected = train(copy.deepcopy(model), [x.double()]) | twice(copy.deepcopy(model), x.double())
    partitioner = bwsk_fx.compile.Partitioner(math.inf) if route == "partitioner" else None
    options = {} if partitioner else {"backend": "bwsk_fx", "options": {"budget": math.inf}}
    changes = {"custom_partitioner_fn": partitioner, "force_disable_caches": True}
    runs = copy.deepcopy(model), copy.deepcopy(model)
    with torch._inductor.config.patch(changes):
        for run in runs:
            run.compile(**options, fullgraph=True)
        assert_close(train(runs[0], [x.double()]) | twice(runs[1], x.double()), expected)


def changes_arguments(h: Tensor, cache: Tensor, weight: Tensor) -> Tensor:
    """Writes into one argument that has a gradient, and into one that has none."""
    found = (h.clone() * cache.clone() @ weight).exp()
    h.mul_(2.0)
    cache[1:] += found.detach()[1:]
    return (found * h.clone() * cache.clone()).tanh()


@pytest.mark.parametrize("budget", [0.0, math.inf])
def test_arguments_that_change_are_seen_as_they_were(x, budget):
    def gradients(function) -> list[Tensor]:
        leaves = [x.double().requires_grad_(), x.double().cos().requires_grad_()]
        h, cache = leaves[0] * 1.0, torch.ones(4, 4, dtype=torch.float64)
        loss = sum((function(h, cache, leaves[1]) / 4).square().sum() for _ in range(2)) + h.sum()
        return [*torch.autograd.grad(loss, leaves), h.detach(), cache]

    options = {"compiler": "eager", "faith": "exact", "budget": budget}
    run = torch.compile(changes_arguments, backend="bwsk_fx", options=options, fullgraph=True)
    for found, expected in zip(gradients(run), gradients(changes_arguments), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_statistics_that_change_outside_of_the_graph_are_seen_as_they_were(x, train):
    """PyTorch's own batch norm changes them without a new version, so that autograd would not tell."""
    model = double(BrokenAtNorm)
    expected = train(copy.deepcopy(model), [x.double()])
    model.norm.forward = torch.compiler.disable(model.norm.forward)
    model.compile(backend="bwsk_fx", options={"compiler": "eager", "budget": math.inf})
    assert_close(train(model, [x.double()]), expected)


@pytest.mark.slow
def test_so_are_they_by_inductors_partitioner(x, train):
    model = double(BrokenAtNorm)
    expected = train(copy.deepcopy(model), [x.double()])
    model.norm.forward = torch.compiler.disable(model.norm.forward)
    changes = {"custom_partitioner_fn": bwsk_fx.compile.Partitioner(math.inf), "force_disable_caches": True}
    with torch._inductor.config.patch(changes):
        model.compile()
        assert_close(train(model, [x.double()]), expected)


def test_what_changes_is_kept_as_a_copy_and_what_stays_is_not_kept(x):
    compiled(double(NormReadBefore), budget=math.inf)(x.double())
    report = bwsk_fx.compile.last_report()
    _, kept = report.forward.graph.output_node().args[0]
    means = [node for node in kept if node.meta["val"].shape == (4,)]
    assert [(str(node.target), node.args[0].op) for node in means] == [("aten.clone.default", "placeholder")]
    # The other is the input; nothing is kept of the statistics that running the norm again does not read.
    assert len(kept) == 2


class CountsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, count):
        ctx.count = count
        return x.sin()

    @staticmethod
    def backward(ctx, gradient):
        ctx.count.add_(1.0)
        return gradient, None


class Counted(Stateful):
    def middle(self, x):
        return CountsBackward.apply(x, self.mean)


def test_a_backward_pass_that_writes_is_refused(x):
    with pytest.raises(Exception, match="the backward pass writes into primals_") as caught:
        compiled(double(Counted))(x.double()).sum().backward()
    assert isinstance(caught.value.inner_exception, PlanError)
