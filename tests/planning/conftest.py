"""Functions that are small enough to plan by hand, and the steps of planning them."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bwsk_fx.planning.cost import Roofline, profile_of
from bwsk_fx.planning.derivations import derive
from bwsk_fx.planning.integer_program import Problem
from bwsk_fx.planning.options import PlanOptions
from bwsk_fx.planning.program import Program
from bwsk_fx.planning.prospect import Prospect
from bwsk_fx.planning.trace import trace

BATCH, WIDTH = 4, 8
# Launches would outweigh all else on tensors this small.
COSTS = Roofline(replace(profile_of(torch.device("cpu")), launch=0.0))


def mlp(x: Tensor, up: Tensor, down: Tensor) -> list[Tensor]:
    return [F.gelu(x @ up) @ down]


def residual(x: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor) -> list[Tensor]:
    return [x + F.layer_norm(x, (WIDTH,), gamma, beta) @ weight]


def attention(x: Tensor, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    heads = (F.linear(x, weight).view(1, BATCH, 2, WIDTH // 2).transpose(1, 2) for weight in (query, key, value))
    return [F.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(BATCH, WIDTH)]


def dropout(x: Tensor, weight: Tensor) -> list[Tensor]:
    return [F.dropout(x @ weight, 0.5).sin()]


def chain(x: Tensor, weight: Tensor) -> list[Tensor]:
    y = (x @ weight).exp()
    return [(y + y.sin()).tanh() * 2.0]


def views(x: Tensor, weight: Tensor) -> list[Tensor]:
    return [(x @ weight).t().unsqueeze(0).exp().permute(2, 0, 1).reshape(BATCH, WIDTH).sigmoid()]


SHAPES = {
    mlp: [(WIDTH, 2 * WIDTH), (2 * WIDTH, WIDTH)],
    residual: [(WIDTH,), (WIDTH,), (WIDTH, WIDTH)],
    attention: [(WIDTH, WIDTH)] * 3,
    dropout: [(WIDTH, WIDTH)],
    chain: [(WIDTH, WIDTH)],
    views: [(WIDTH, WIDTH)],
}


def _inputs(function: Callable) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(BATCH, WIDTH), *SHAPES[function]]
    tensors = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    return {f"in{index}": tensor for index, tensor in enumerate(tensors)}


def _plan(function: Callable, budget: float = 0.0, faith: str = "exact", dtype: torch.dtype | None = None) -> Program:
    inputs = _inputs(function)
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        traced = trace(function, inputs, range(1, len(inputs)), "small")
    return Prospect("small", PlanOptions(budget, faith), traced, COSTS).within_budget()


def _hypergraph(function: Callable, *, exact: bool, dtype: torch.dtype | None = None) -> Any:
    inputs = _inputs(function)
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        joint = trace(function, inputs, range(1, len(inputs)), "small").joint
    hypergraph = derive(joint, COSTS, exact=exact)
    step = sum(COSTS.seconds(node) for node in joint.conventional.nodes)
    return SimpleNamespace(joint=joint, hypergraph=hypergraph, problem=Problem.of(joint, hypergraph, step))


@pytest.fixture(scope="session")
def functions() -> Any:
    return SimpleNamespace(**{function.__name__: function for function in SHAPES})


@pytest.fixture(scope="session")
def inputs_of() -> Callable[..., dict[str, Tensor]]:
    return _inputs


@pytest.fixture(scope="session")
def plan() -> Callable[..., Program]:
    return _plan


@pytest.fixture(scope="session")
def planning() -> Callable[..., Any]:
    return _hypergraph
