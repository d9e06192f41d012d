"""The recorder on small models, one trap each: what it must get right, and what it must refuse."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

import bwsk_fx
from bwsk_fx.errors import CaptureError


class Calls(nn.Module):
    """A module whose forward pass is a function of the module and its inputs."""

    def __init__(self, forward, **parts) -> None:
        super().__init__()
        self.function = forward
        self.linear = nn.Linear(4, 4)
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x, y=None):
        return self.function(self, x) if y is None else self.function(self, x, y)


X = torch.linspace(-1, 1, 12).reshape(3, 4)


def _leaves(graph: torch.fx.GraphModule) -> list[str]:
    return [node.target for node in graph.graph.find_nodes(op="call_module")]


def _agree(model: nn.Module, *sizes: int):
    graph = bwsk_fx.capture(model, X)
    for size in sizes or (3, 5):
        x = torch.randn(size, 4)
        results = []
        for module in (model, graph):
            leaf = x.clone().requires_grad_()
            torch.manual_seed(0)
            output = module(leaf)
            results.append((output, *torch.autograd.grad(output.square().sum(), leaf)))
        for eager, captured in zip(*results, strict=True):
            assert torch.equal(eager, captured)
    return graph


def test_tied_parameters_stay_tied():
    model = Calls(lambda self, x: self.other(self.linear(x)), other=nn.Linear(4, 4))
    model.other.weight = model.linear.weight
    graph = _agree(model)
    assert graph.other.weight is graph.linear.weight is model.linear.weight
    assert list(graph.state_dict()) == list(model.state_dict())


def test_non_persistent_buffers_and_loose_tensors_stay_out_of_the_state():
    model = Calls(lambda self, x: self.linear(x) * self.scale + self.shift + self.loose, loose=torch.arange(4.0))
    model.register_buffer("scale", torch.full((4,), 2.0), persistent=False)
    model.register_buffer("shift", torch.full((4,), 3.0))
    graph = _agree(model)
    assert list(graph.state_dict()) == list(model.state_dict()) == ["shift", "linear.weight", "linear.bias"]
    assert graph.scale is model.scale


def test_buffers_that_the_model_writes_are_written_by_the_graph_only_when_it_runs():
    def forward(self, x):
        with torch.no_grad():
            self.count.add_(1)
            self.mean.copy_(x.mean(0))
        return self.linear(x) + self.mean

    model = Calls(forward)
    model.register_buffer("count", torch.zeros((), dtype=torch.long))
    model.register_buffer("mean", torch.zeros(4))
    graph = bwsk_fx.capture(model, X)
    assert model.count == 0
    graph(X)
    assert model.count == 1
    assert torch.equal(model.mean, X.mean(0))
    assert not model.mean.requires_grad


def test_parts_without_gradient_stay_so_and_the_callers_mode_comes_back():
    def forward(self, x):
        with torch.no_grad():
            frozen = self.linear(x) * 2
        return self.linear(x) + frozen

    graph = _agree(Calls(forward))
    with torch.no_grad():
        assert not graph(X).requires_grad
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


def test_attributes_that_a_run_leaves_behind_are_taken_away():
    def forward(self, x):
        self.runs += 1
        self.seen = self.linear(x)
        return self.seen * 2

    model = Calls(forward, runs=0)
    _ = bwsk_fx.capture(model, X)
    assert model.runs == 0
    assert not hasattr(model, "seen")


def test_in_place_operators_keep_their_order():
    def forward(self, x):
        y = self.linear(x)
        y[:, 0] = 0.0
        y += x
        z = y * 3
        y.mul_(2)
        return z + y

    _agree(Calls(forward))


def test_sizes_are_computed_from_the_inputs():
    def forward(self, x):
        batch = x.shape[0]
        doubled = torch.cat([x, x])
        return self.linear(doubled).reshape(2 * batch, 2, 2).sum((1, 2)) / (batch + 1)

    graph = _agree(Calls(forward), 1, 3, 6)
    assert "size(0)" in graph.code


def test_a_shape_is_an_argument():
    _agree(Calls(lambda self, x: self.linear(x).reshape((*x.size()[:-1], 2, 2)).flatten(1).expand(x.shape)))


def test_results_with_parts():
    model = Calls(lambda self, x: (self.linear(x).max(dim=1), {"halves": x.split(2, 1)}, None, 3))
    eager, captured = model(X), bwsk_fx.capture(model, X)(X)
    assert torch.equal(eager[0].values, captured[0][0])
    assert torch.equal(eager[0].indices, captured[0][1])
    assert all(map(torch.equal, eager[1]["halves"], captured[1]["halves"]))
    assert captured[2:] == (None, 3)


def test_a_batch_of_one_beside_larger_ones_is_broadcast():
    model = Calls(lambda self, x, y: self.linear(x) + y)
    graph = bwsk_fx.capture(model, {"x": X, "y": torch.ones(1, 4)})
    assert graph.graph.find_nodes(op="placeholder")[1].meta["val"].shape == (1, 4)
    assert torch.equal(graph(X, torch.ones(1, 4)), model(X, torch.ones(1, 4)))


def test_leaves_can_be_chosen():
    inner = Calls(lambda self, x: torch.relu(self.linear(x)))
    model = Calls(lambda self, x: self.inner(self.linear(x)), inner=inner)
    assert _leaves(bwsk_fx.capture(model, X)) == ["linear", "inner.linear"]
    assert _leaves(bwsk_fx.capture(model, X, is_leaf=lambda module: isinstance(module, (Calls, nn.Linear)))) == [
        "linear",
        "inner",
    ]


# -- what cannot be captured --------------------------------------------------------------------------------------


class Doubling(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 3


def _branches_on_data(self, x):
    if x.sum() > 0:
        return self.linear(x)
    return x


def _reads_a_number(self, x):
    return x * x.max().item()


def _uses_an_autograd_function(self, x):
    return Doubling.apply(self.linear(x))


def _switches_autocast(self, x):
    with torch.autocast("cpu", enabled=False):
        return self.linear(x)


def _fails(self, x):
    return self.linear(x[:, :3])


@pytest.mark.parametrize(
    ("forward", "line", "cause"),
    [
        (_branches_on_data, "if x.sum() > 0:", "data-dependent"),
        (_reads_a_number, "return x * x.max().item()", "from data"),
        (_uses_an_autograd_function, "return Doubling.apply(self.linear(x))", "autograd function Doubling"),
        (_switches_autocast, 'with torch.autocast("cpu", enabled=False):', "autocast is switched"),
        (_fails, "return self.linear(x[:, :3])", "RuntimeError"),
    ],
)
def test_failures_name_file_line_and_cause(forward, line, cause):
    with pytest.raises(CaptureError) as failure:
        bwsk_fx.capture(Calls(forward), X)
    message = str(failure.value)
    assert message.startswith("cannot capture Calls: ")
    assert f'File "{__file__}", line ' in message
    assert f"in {forward.__name__}\n    {line}: " in message
    assert cause in message


def test_a_failure_gives_everything_back():
    model = Calls(_branches_on_data)
    parameters, random, call = list(model.parameters()), torch.get_rng_state(), nn.Module.__call__
    apply, enter, boolean = torch.autograd.Function.apply, torch.autocast.__enter__, torch.SymBool.__bool__
    with pytest.raises(CaptureError):
        bwsk_fx.capture(model, X)
    assert all(now is before for now, before in zip(model.parameters(), parameters, strict=True))
    assert torch.equal(torch.get_rng_state(), random)
    assert (nn.Module.__call__, torch.autocast.__enter__) == (call, enter)
    assert (torch.autograd.Function.apply, torch.SymBool.__bool__) == (apply, boolean)


def test_a_leaf_may_do_what_a_graph_cannot():
    inner = Calls(_uses_an_autograd_function)
    model = Calls(lambda self, x: self.inner(x), inner=inner)
    graph = bwsk_fx.capture(model, X, is_leaf=lambda module: isinstance(module, Calls))
    leaf = X.clone().requires_grad_()
    graph(leaf).sum().backward()
    assert torch.equal(leaf.grad, (torch.full((3, 4), 3.0) @ inner.linear.weight))


def _routed(self, x):
    """Apply the linear map to the rows with a positive sum, one after the other, and add a row of ones."""
    result = torch.zeros_like(x)
    for row in (x.sum(1) > 0).nonzero().flatten():
        result[row] = self.linear(x[row])
    self.calls.add_(1)
    return torch.cat([result, x, torch.ones(1, x.shape[1])]) * torch.rand(()), x.shape[1]


def _with_leaf(forward):
    inner = Calls(forward)
    inner.register_buffer("calls", torch.zeros((), dtype=torch.long))
    model = Calls(lambda self, x: self.inner(self.linear(x))[0], inner=inner)
    inner.linear.weight = model.linear.weight  # tied to a parameter outside the leaf
    return model, lambda module: isinstance(module, (nn.Linear, Calls))


def test_a_leaf_may_branch_on_data():
    model, is_leaf = _with_leaf(_routed)
    random = torch.get_rng_state()
    graph = bwsk_fx.capture(model, X, is_leaf=is_leaf)
    assert torch.equal(torch.get_rng_state(), random)
    assert model.inner.calls == 0
    (leaf,) = (node for node in graph.graph.nodes if node.target == "inner")
    rows, width = leaf.meta["val"][0].shape
    (batch,) = rows.node.expr.free_symbols
    assert (rows.node.expr, width, leaf.meta["val"][1]) == (2 * batch + 1, 4, 4)
    for size in (3, 5):
        x = torch.randn(size, 4)
        torch.manual_seed(0)
        expected = model(x)
        torch.manual_seed(0)
        assert torch.equal(graph(x), expected)


@pytest.mark.parametrize(
    ("result", "complaint"),
    [
        (lambda x: x[: int((x > 0).sum()) // 4], "which is no multiple of the batch size plus a constant"),
        (lambda x: torch.cat([x[: int(x.isfinite().sum()) // 8], x[:1]]), "a size of its result is 3, 4 and 6"),
        (lambda x: (x, int(x.isfinite().sum())), "a number that depends on the batch size or on data: 20"),
        (lambda x: [x] * int(x.isfinite().sum()), "the structure of its result depends"),
        (lambda x: x.reshape((1,) * int(x.isfinite().sum()) + x.shape), "the number of dimensions of its result"),
    ],
)
def test_a_leaf_whose_result_has_no_known_shape_is_refused(result, complaint):
    model, is_leaf = _with_leaf(lambda self, x: result(x))
    with pytest.raises(CaptureError, match=r"the leaf 'inner' \(Calls\) cannot run on fake tensors, and") as failure:
        torch.manual_seed(0)
        bwsk_fx.capture(model, X, is_leaf=is_leaf)
    assert complaint in str(failure.value)


def test_a_leaf_that_fails_on_real_data_too_says_why():
    model, is_leaf = _with_leaf(_fails)
    with pytest.raises(CaptureError, match="RuntimeError: a and b must have same reduction dim"):
        bwsk_fx.capture(model, X, is_leaf=is_leaf)


def test_a_new_tensor_for_a_buffer_is_refused():
    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return self.linear(x)

    model = Calls(forward)
    model.register_buffer("mean", torch.ones(4))
    with pytest.raises(CaptureError, match=r"gives buffer 'mean' a new tensor.*copy_"):
        bwsk_fx.capture(model, X)
    assert torch.equal(model.mean, torch.ones(4))


@pytest.mark.parametrize(
    ("result", "message"),
    [(lambda self, x: object(), "an object of type 'object'"), (lambda self, x: {"a": [{1, 2}]}, "of type 'set'")],
)
def test_results_that_are_not_made_of_tensors(result, message):
    with pytest.raises(CaptureError, match=message):
        bwsk_fx.capture(Calls(result), X)


def test_inputs_that_do_not_fit():
    model = Calls(lambda self, x: self.linear(x))
    with pytest.raises(CaptureError, match=r"do not fit Calls\.forward: missing a required argument: 'x'"):
        bwsk_fx.capture(model, {"pixels": X})
    with pytest.raises(CaptureError, match=r"do not fit Calls\.forward: too many"):
        bwsk_fx.capture(model, (X, X, X))
    with pytest.raises(CaptureError, match="input 'x' is a list of tensors"):
        bwsk_fx.capture(model, ([X, X],))
    with pytest.raises(CaptureError, match=r"cannot capture Calls: (.|\n)*RuntimeError"):
        bwsk_fx.capture(model, torch.ones(3, 5))


@pytest.mark.parametrize(
    ("forward", "allowed", "refused", "condition"),
    [
        (lambda self, x: self.linear(x) if x.shape[0] > 2 else x, 5, 2, "> 2"),
        (lambda self, x: x if x.shape[0] == 1 else self.linear(x), 2, 1, "Ne"),
        (lambda self, x: sum(self.linear(x[i : i + 1]) for i in range(x.shape[0])), 3, 4, "Eq"),
    ],
)
def test_branches_on_the_batch_size_are_guarded(forward, allowed, refused, condition):
    model = Calls(forward)
    graph = bwsk_fx.capture(model, X)
    assert torch.equal(graph(X), model(X))
    assert torch.equal(graph(torch.ones(allowed, 4)), model(torch.ones(allowed, 4)))
    with pytest.raises(CaptureError, match=rf"requires .*{condition}.*dimension 0 of 'x', now {refused}"):
        graph(torch.ones(refused, 4))


class Waiting(nn.Module):
    """Tells in its forward pass that it has come that far, and waits a while for something else."""

    def __init__(self, inside: threading.Event, other: threading.Event) -> None:
        super().__init__()
        self.inside, self.other, self.inner = inside, other, nn.Linear(2, 2)

    def forward(self, x):
        self.inside.set()
        self.other.wait(timeout=0.5)
        return self.inner(x)


@pytest.mark.skipif(torch.__version__.startswith("2.11"), reason="capturing in a second thread ends the process there")
def test_two_threads_that_capture_leave_the_classes_of_pytorch_as_they_were():
    owners = [(nn.Module, "__call__"), (nn.Module, "__getattribute__"), (torch.SymInt, "__int__")]
    before = [vars(owner).get(name) for owner, name in owners]
    first, second, done = threading.Event(), threading.Event(), threading.Event()
    nodes = []

    def work(model, after, finished):
        after.wait()
        nodes.append(len(bwsk_fx.capture(model, torch.ones(3, 2)).graph.nodes))
        finished.set()

    start = threading.Event()
    start.set()
    # The second starts when the first is inside, and would leave after it.
    jobs = [(Waiting(first, second), start, done), (Waiting(second, done), first, threading.Event())]
    threads = [threading.Thread(target=work, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    after = [vars(owner).get(name) for owner, name in owners]
    for (owner, name), value in zip(owners, before, strict=True):
        if value is not None:
            setattr(owner, name, value)
    assert nodes == [3, 3] and after == before
