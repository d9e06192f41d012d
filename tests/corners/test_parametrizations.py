"""Parametrized weights: gradients and the buffers of power iterations are those of eager execution."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, spectral_norm, weight_norm

import bwsk_fx


class Skew(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        upper = weight.triu(1)
        return upper - upper.mT


def _skew(layer: nn.Linear) -> nn.Module:
    return parametrize.register_parametrization(layer, "weight", Skew())


class Net(nn.Module):
    def __init__(self, wrap) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.b, self.head = (
            wrap(nn.Linear(8, 8)),
            nn.LayerNorm(8),
            wrap(nn.Linear(8, 8)),
            nn.Linear(8, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x + self.b(nn.functional.gelu(self.a(x)))))


WRAPS = {
    "weight_norm": parametrizations.weight_norm,
    "weight_norm, by a hook": weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "spectral_norm, by a hook": spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "orthogonal, which solves equations": partial(parametrizations.orthogonal, orthogonal_map="cayley"),
    "own": _skew,
}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_two_steps_are_those_of_eager(wrap):
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    runs = []
    for mode in ("conventional", "reversible"):
        model = Net(wrap)
        bwsk_fx.apply(model, mode, **({"faith": "exact", "budget": 0.1} if mode == "reversible" else {}))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            model(x).sin().sum().backward()
            optimizer.step()
        runs.append({name: value.clone() for name, value in model.state_dict().items()})
    assert all(torch.equal(runs[1][name], value) for name, value in runs[0].items())


def test_typing_does_not_move_a_power_iteration():
    model = Net(parametrizations.spectral_norm)
    before = [buffer.clone() for buffer in model.buffers()]
    bwsk_fx.type_nodes(bwsk_fx.capture(model, torch.randn(4, 8)))
    assert all(map(torch.equal, model.buffers(), before))
