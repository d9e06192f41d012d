"""Branches and loops: on shapes and configurations they are recorded, on data they are refused, with the line."""

import pytest
import torch
from torch import Tensor, nn

import bwsk_fx
from bwsk_fx.errors import CaptureError
from bwsk_fx.modes import applied, apply


class Layers(nn.Module):
    def __init__(self, normalized: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.norm = nn.LayerNorm(4) if normalized else None

    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            x = layer(x).tanh() if index % 2 else layer(x)
            x = x if self.norm is None else self.norm(x)
            x = x.sin() if x.shape[0] > 2 else x.cos()
        return x


@pytest.mark.parametrize("normalized", [True, False])
def test_branches_on_configuration_and_shapes_are_recorded(x, assert_as_eager, normalized):
    model = assert_as_eager(lambda: Layers(normalized), x, plans=[("exact", 0.0)])
    two = x[:2].double().requires_grad_()
    with pytest.raises(CaptureError, match=r"requires s\d+ > 2, where s\d+ is dimension 0 of 'x', now 2"):
        applied(model).graph(two)
    # In a mode, the model is captured anew for the other branch.
    assert torch.equal(model(two), Layers.forward(model, two))


class Branches(nn.Module):
    def __init__(self, branch) -> None:
        super().__init__()
        self.layer, self.branch = nn.Linear(4, 4), branch

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return self.branch(y)


def _cond(y: Tensor) -> Tensor:
    return torch.cond(y.sum() > 0, torch.sin, torch.cos, (y,))


def _while(y: Tensor) -> Tensor:
    from torch._higher_order_ops import while_loop

    return while_loop(lambda i, t: i < 3, lambda i, t: (i + 1, t.sin()), (torch.zeros((), dtype=torch.long), y))[1]


def _scan(y: Tensor) -> Tensor:
    from torch._higher_order_ops import scan

    return scan(lambda carry, row: (carry + row.sin(), carry * row), torch.zeros(4), y)[1]


@pytest.mark.parametrize(("name", "branch"), [("cond", _cond), ("while_loop", _while), ("scan", _scan)])
def test_operators_that_take_functions_are_refused(x, name, branch):
    text = (
        rf"test_control_flow.py.*\n.*{name}\(.*\({name} runs functions that a graph of torch calls cannot hold; choose"
    )
    with pytest.raises(CaptureError, match=text):
        bwsk_fx.capture(Branches(branch), x)


@pytest.mark.filterwarnings("ignore:Converting a tensor")
@pytest.mark.parametrize(
    "branch",
    [lambda y: y.sin() if y.sum() > 0 else y.cos(), lambda y: y * float(y.sum()), lambda y: y[y > 0].sum().item() * y],
    ids=["if", "float", "item"],
)
def test_branches_on_data_are_refused(x, branch):
    text = (
        r"File .*test_control_flow.py(.|\n)*(takes the value of a tensor, which differs from step to step|or from data)"
    )
    with pytest.raises(CaptureError, match=text):
        bwsk_fx.capture(Branches(branch), x)


class Decides(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sin() if x.sum() > 0 else x.cos()


@pytest.mark.filterwarnings("ignore:node .* cannot be run on fake tensors")
def test_a_leaf_that_branches_on_data_runs_outside_of_regions(x, assert_as_eager, sandwich):
    model = assert_as_eager(lambda: sandwich(Decides()), x, plans=[("exact", float("inf"))])
    model(-x.double()).sum().backward()
    graph = apply(sandwich(Decides()))
    graph(x).sum().backward()
    verdicts = [node.meta["bwsk"] for node in graph._bwsk_applied.graph.graph.nodes if node.target == "2"]
    assert verdicts[0].label.name == "GRAY" and "cannot be decomposed" in verdicts[0].rationale
