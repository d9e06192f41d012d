"""Shared, frozen and replaced weights train as in eager execution, and stay the model's own."""

import pytest
import torch
from torch import Tensor, nn

import bwsk_fx
from bwsk_fx import _torch_private as private


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(8, 16), nn.Linear(16, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.down(nn.functional.gelu(self.up(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(), Block(), Block()])
        self.own, self.unused, self.head = nn.Parameter(torch.randn(8, 8)), nn.Linear(2, 2), nn.Linear(8, 2)
        self.blocks[1].requires_grad_(False)
        self.blocks[2].up.weight = self.blocks[0].up.weight

    def forward(net, x: Tensor) -> Tensor:  # its name is free
        for block in net.blocks:
            x = block(x) @ net.own
        return net.head(x + net.own.view(-1)[:8])


def _same_module_twice(model: Net) -> None:
    model.blocks[1] = model.blocks[0]


def _other_weight(model: Net) -> None:
    model.blocks[0].up.weight = nn.Parameter(torch.ones(16, 8))


def _tied(model: Net) -> None:
    model.blocks[1].down.weight = model.blocks[0].down.weight


CHANGES = {
    "none": lambda model: None,
    "one module at two paths": _same_module_twice,
    "unfrozen": lambda model: model.requires_grad_(True),
    "frozen": lambda model: model.blocks[0].requires_grad_(False),
    "own frozen": lambda model: model.own.requires_grad_(False),
    "replaced": _other_weight,
    "tied": _tied,
    "assigned": lambda model: model.load_state_dict({k: 2 * v for k, v in model.state_dict().items()}, assign=True),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_after_apply_is_noticed(change):
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    runs = []
    for mode in ("conventional", "reversible"):
        model = Net()
        bwsk_fx.apply(model, mode, **({"faith": "exact", "budget": 0.1} if mode == "reversible" else {}))
        model(x).sin().sum().backward()
        change(model)
        model.zero_grad()
        # One use decides each value's sum, but for `own`, whose gradients are added in the order of the regions.
        model(x).sin().sum().backward()
        runs.append(dict(model.named_parameters(remove_duplicate=False)))
    eager, found = runs
    assert not any(map(private.is_fake, found.values()))
    assert {name for name in eager if eager[name].grad is None} == {name for name in found if found[name].grad is None}
    for name, parameter in eager.items():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name].grad, parameter.grad, rtol=1e-5, atol=1e-6)
