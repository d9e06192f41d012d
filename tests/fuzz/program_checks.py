"""A random program, with regions and without: outputs and gradients in float64, round trips, kept bytes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from random_programs import Program, build, inputs_of, loss_of
from torch import Tensor, fx, nn

import bwsk_fx
from bwsk_fx.errors import CaptureError, PlanError, RegionError
from bwsk_fx.reversible import ReversibleRegion

# In float64 a wrong gradient cannot hide behind rounding, save that of what a program itself casts down.
TOLERANCE, CAST_TOLERANCE = 1e-7, 2e-2
CASTS = frozenset({"single", "half"})
TIERS = (("exact", 0.0), ("exact", math.inf), ("rounded", 0.0), ("rounded", 0.1), ("rounded", math.inf))
BATCHES = (5, 2)
Results = dict[str, Any]


def step(model: nn.Module, batch: int) -> Results:
    """Run a training step; return outputs and gradients by name."""
    inputs = inputs_of(batch)
    leaves = dict(model.named_parameters()) | {name: inputs[name] for name in "xy"}
    for leaf in leaves.values():
        leaf.grad = None
    torch.manual_seed(batch)
    # A program may write into what it is given, and a leaf with a gradient cannot be written into.
    outputs = model(**{name: value.clone() for name, value in inputs.items()})
    values = {f"output {place}": value for place, value in enumerate(outputs)}
    loss = loss_of(outputs)
    if loss.requires_grad:
        loss.backward()
    found = values | {name: leaf.grad for name, leaf in leaves.items()}
    return {name: value.detach().clone() if isinstance(value, Tensor) else value for name, value in found.items()}


def runs_in_eager(program: Program) -> bool:
    """Whether PyTorch itself trains the program; one that overwrites what its gradients need does not."""
    try:
        found = [step(build(program), batch) for batch in BATCHES]
    except (RuntimeError, IndexError, ValueError):
        return False
    return all(bool(value.isfinite().all()) for results in found for value in results.values() if value is not None)


def check(program: Program, faith: str, budget: float, granularity: str = "whole") -> str:
    """Compare a program with its reversible form; return what became of it: `agrees`, or why it was refused.

    Raises:
        AssertionError: A result differs, or more is kept than eager execution keeps.
    """
    model = build(program)
    try:
        graph = bwsk_fx.capture(model, inputs_of(BATCHES[0]))
        fused = bwsk_fx.fuse_regions(graph, budget, faith=faith, granularity=granularity)
    except (CaptureError, RegionError) as error:
        return f"refused: {error}"
    for batch in BATCHES:
        try:
            found = step(fused, batch)
        except (CaptureError, PlanError) as error:  # a branch on the batch size, or a write that only eager forgives
            return f"refused: {error}"
        _require_same(found, step(model, batch), program)
    _require_no_more_kept(fused)
    return "agrees"


def _require_same(found: Results, expected: Results, program: Program) -> None:
    assert found.keys() == expected.keys()
    tolerance = CAST_TOLERANCE if any(op.name in CASTS for op in program.ops) else TOLERANCE
    for name, wanted in expected.items():
        got = found[name]
        assert (got is None) == (wanted is None), f"{name} is {got} where eager execution has {wanted}"
        if wanted is not None:
            assert got.dtype == wanted.dtype and got.shape == wanted.shape, f"{name}: {got.dtype} {got.shape}"
            distance, size = float((got.double() - wanted.double()).norm()), float(wanted.double().norm())
            assert distance <= tolerance * (1 + size), f"{name} is {distance:.1e} off, of a norm of {size:.1e}"


def _require_no_more_kept(fused: fx.GraphModule) -> None:
    for region in regions(fused):
        for plan in region.plans():
            assert plan.kept_bytes <= plan.conventional_bytes, f"{region.name} keeps more than eager execution"


def regions(model: nn.Module) -> list[ReversibleRegion]:
    return [module for module in model.modules() if isinstance(module, ReversibleRegion)]


def false_labels(program: Program) -> list[str]:
    """Return the S labels of a program whose inverses rebuild something else, in words."""
    try:
        graph = bwsk_fx.type_nodes(bwsk_fx.capture(build(program), inputs_of(BATCHES[0])))
    except CaptureError:
        return []
    certificates = bwsk_fx.certify(graph, inputs_of(BATCHES[0]), dtypes=(torch.float32,))
    return list(_failures(certificates.nodes))


def _failures(nodes: Iterable[Any]) -> Iterable[str]:
    for node in nodes:
        for trial in node.trials:
            if not trial.holds:
                yield f"{node.node} ({node.operator}) in {trial.dtype}: {trial.failure}"
