"""The three modes as a training run uses them: put into place, then shown to have taken effect."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import bwsk_fx
from bwsk_fx.errors import TrainingError
from bwsk_fx.training.config import Mode, ReversibleOptions


@dataclass(frozen=True)
class Ratios:
    """Shares of S and K nodes in a typed graph."""

    s: float
    k: float


NO_GRAPH = Ratios(0.0, 0.0)


def put_into(model: Any, mode: Mode, plan: ReversibleOptions) -> None:
    """Puts a model into a mode; the conventional one leaves it exactly as transformers made it."""
    if mode is Mode.CONVENTIONAL:
        return
    options = vars(plan) if mode is Mode.REVERSIBLE else {}
    bwsk_fx.apply(model, mode=mode.value, **options)


def require_effect(model: Any, mode: Mode) -> None:
    """Raises a TrainingError when a training step did not run in the mode that was asked for.

    A model can bypass a rewritten path in silence, which would make all three modes equal on paper.
    """
    if mode is Mode.CONVENTIONAL:
        return
    state = bwsk_fx.applied(model)
    if state is None or str(state.mode) != mode.value:
        raise TrainingError(f"mode '{mode.value}' did not take effect: the model is not in it")
    if state.graph is None:
        raise TrainingError(f"mode '{mode.value}' did not take effect: the first training step captured nothing")


def ratios(model: Any, ruleset: str) -> Ratios:
    """S and K ratios of the captured graph; zero for the conventional mode, which has none, as published."""
    state = bwsk_fx.applied(model)
    if state is None or state.graph is None:
        return NO_GRAPH
    summary = bwsk_fx.summarize(bwsk_fx.type_nodes(state.graph, ruleset=ruleset))
    return Ratios(summary.s_ratio, summary.k_ratio)
