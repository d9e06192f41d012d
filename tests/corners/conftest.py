"""Training with regions beside eager training: outputs, gradients and buffers, step by step, at several budgets."""

import copy
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bwsk_fx.modes import applied, apply

PLANS = [(faith, budget) for faith in ("exact", "rounded") for budget in (0.0, 0.1, math.inf)]


def _train(model: nn.Module, inputs: Sequence[Tensor], steps: int = 2) -> dict[str, Tensor | None]:
    """Train with SGD and return outputs, gradients and buffers of each step."""
    optimizer, found = torch.optim.SGD(model.parameters(), lr=0.05), {}
    for step in range(steps):
        torch.manual_seed(step)
        random.seed(step)
        optimizer.zero_grad()
        given = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
        outputs = [leaf for leaf in pytree.tree_leaves(model(*given)) if isinstance(leaf, Tensor)]
        sum(output.sin().sum() for output in outputs if output.requires_grad).backward()
        found |= {f"{step} output {place}": output.detach().clone() for place, output in enumerate(outputs)}
        found |= {f"{step} input {place}": _copy(x.grad) for place, x in enumerate(given)}
        found |= {f"{step} {name}": _copy(parameter.grad) for name, parameter in model.named_parameters()}
        found |= {f"{step} {name}": buffer.clone() for name, buffer in model.named_buffers()}
        optimizer.step()
    return found


def _copy(gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else gradient.clone()


def _assert_as_eager(
    make: Callable[[], nn.Module],
    inputs: Sequence[Tensor],
    assert_same_bits: Callable[..., None],
    plans: Sequence[tuple[str, float]] = PLANS,
    **options: Any,
) -> nn.Module:
    """Compare in float64, bit for bit where the plan is exact; the model trained last is returned."""
    torch.manual_seed(0)
    model = make().double().train()
    inputs = [x.double() if x.is_floating_point() else x for x in inputs]
    expected = _train(copy.deepcopy(model), inputs)
    for faith, budget in plans:
        rewritten = apply(copy.deepcopy(model), faith=faith, budget=budget, **options)
        found = _train(rewritten, inputs)
        if faith == "exact":
            assert_same_bits(found, expected)
        for name, value in expected.items():
            torch.testing.assert_close(
                found[name], value, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: name + text
            )
    assert applied(rewritten).rewritten is not None
    return rewritten


@pytest.fixture
def assert_as_eager(assert_same_bits):
    def compare(make: Callable[[], nn.Module], *inputs: Tensor, **options: Any) -> nn.Module:
        return _assert_as_eager(make, inputs, assert_same_bits, **options)

    return compare


@pytest.fixture
def train() -> Callable[..., dict[str, Tensor | None]]:
    return _train


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def sandwich() -> Callable[[nn.Module], nn.Module]:
    """Put a module between others that regions take."""
    return lambda middle: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), middle, nn.GELU(), nn.Linear(4, 4), nn.Tanh())
