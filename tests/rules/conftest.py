"""Capture one operator, type it, and return its verdict."""

from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch
from torch import nn

import bwsk_fx
from bwsk_fx.passes.type_nodes import type_nodes
from bwsk_fx.rules import sound
from bwsk_fx.rules.round_trip import execute, round_trip
from bwsk_fx.rules.single import Target
from bwsk_fx.verdict import Label, Verdict


class _Function(nn.Module):
    """A function of up to two inputs, as a model."""

    def __init__(self, function: Callable) -> None:
        super().__init__()
        self.function = function
        self.takes_weight = getattr(function, "__code__", None) and function.__code__.co_varnames[:1] == ("weight",)
        self.weight = nn.Parameter(torch.rand(4, 4) + 1)

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        arguments = [self.weight] if self.takes_weight else []
        return self.function(*arguments, x) if y is None else self.function(*arguments, x, y)


class _Module(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


@pytest.fixture
def verdict_of() -> Callable[..., Verdict]:
    """Verdict of the last counted node; a function whose first parameter is `weight` gets a static 4×4 tensor."""

    def judge(operator: Callable, *inputs: torch.Tensor, ruleset: str = "sound") -> Verdict:
        model = _Module(operator) if isinstance(operator, nn.Module) else _Function(operator)
        # A function is in the same mode as a model in training.
        model.training = operator.training if isinstance(operator, nn.Module) else True
        graph = type_nodes(bwsk_fx.capture(model, inputs), ruleset)
        counted = [node.meta["bwsk"] for node in graph.graph.nodes if node.meta["bwsk"].counted]
        return counted[-1]

    return judge


@pytest.fixture
def certified() -> Callable[..., Verdict]:
    """Verdict of one call on real values; an S verdict's inverse has been run on them, and rebuilt everything."""

    def judge(target: Target, *args: Any, dynamic: Collection[int] | None = None, **kwargs: Any) -> Verdict:
        executed = execute(target, args, kwargs, dynamic)
        verdict = sound.verdict(executed.call)
        if verdict.label is Label.S:
            trip = round_trip(executed, verdict)
            assert trip.complete, trip
        return verdict

    return judge
