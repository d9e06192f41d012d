"""Random small modules agree with eager execution at every tier.

Exact tiers have eager's bits: loss, gradients of parameters, gradients of inputs. Rounded tiers have at most 1.5 times
eager's error against float64, where the error is the norm of the difference over all gradients of a module. Two things
keep that from being a matter of luck:

- Errors are pooled over draws of weights and inputs, as variances. Where eager happens to round well, a single draw
  says little: with few elements, one of two equally good results is often 1.5 times as far off as the other. If the
  pool of a few draws is over the bound, a larger one decides.
- Some modules hardly round in eager execution, so a floor of two units in the last place of float32, relative to the
  norm of all gradients, is added to the bound.

The float64 run sees the same dropout masks: on a CPU, the numbers that a mask is drawn from depend on the seed and on
the number of elements, not on the dtype (`test_masks_do_not_depend_on_the_dtype`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

import random_modules
import torch
from hypothesis import HealthCheck, assume, given, note, seed, settings
from random_modules import Spec
from torch import Tensor, fx, nn

import bwsk_fx
from bwsk_fx.reversible import ReversibleRegion

BOUND, FLOOR = 1.5, 2 * torch.finfo(torch.float32).eps
FEW_DRAWS, MANY_DRAWS = 3, 40
TIERS = (("exact", 0.0), ("exact", math.inf), ("rounded", 0.0), ("rounded", 0.1), ("rounded", math.inf))
Results = dict[str, Tensor | None]


@dataclass(frozen=True)
class Case:
    """How a module is made reversible and run.

    Attributes:
        faith: `exact` or `rounded`.
        budget: Of the plan.
        granularity: `whole` or `block`.
        half: Whether it runs under bfloat16 autocast.
    """

    faith: str
    budget: float
    granularity: str
    half: bool


CASES = [
    Case(*tier, granularity, half) for tier, granularity, half in product(TIERS, ("whole", "block"), (False, True))
]


def _reversible(graph: fx.GraphModule, case: Case) -> nn.Module:
    fused = bwsk_fx.fuse_regions(graph, case.budget, faith=case.faith, granularity=case.granularity)
    assert _regions(fused)
    return fused


def _regions(model: nn.Module) -> list[ReversibleRegion]:
    return [module for module in model.modules() if isinstance(module, ReversibleRegion)]


def _step(model: nn.Module, spec: Spec, case: Case, draw: int) -> Results:
    """Run one training step on a draw of weights and inputs; return the loss and all gradients."""
    wide = next(iter(model.parameters()), torch.zeros(())).dtype is torch.float64
    random_modules.redraw(model, draw)
    inputs = random_modules.inputs_of(spec, 1000 + draw)
    if wide:
        inputs = {name: _widened(value) for name, value in inputs.items()}
    model.zero_grad()
    torch.manual_seed(draw)
    cached = random_modules.casts_once(spec)
    with torch.autocast("cpu", torch.bfloat16, enabled=case.half and not wide, cache_enabled=cached):
        output = model(**inputs)
    loss = random_modules.loss_of(spec, output)
    assume(loss.requires_grad)
    loss.backward()
    leaves = dict(model.named_parameters()) | inputs
    found = {"loss": loss} | {name: leaf.grad for name, leaf in leaves.items()}
    return {name: None if value is None else value.detach().clone() for name, value in found.items()}


def _widened(value: Tensor) -> Tensor:
    return value.detach().double().requires_grad_(value.requires_grad) if value.is_floating_point() else value


def check(spec: Spec, case: Case) -> None:
    model = random_modules.build(spec)
    fused = _reversible(bwsk_fx.capture(model, random_modules.inputs_of(spec, 0)), case)
    if case.faith == "exact":
        for draw in range(FEW_DRAWS):
            _assert_same_bits(_step(fused, spec, case, draw), _step(model, spec, case, draw))
    else:
        _assert_small_error(model, fused, spec, case)
    assert any(region.program for region in _regions(fused))


def _assert_same_bits(found: Results, expected: Results) -> None:
    assert found.keys() == expected.keys()
    missing = {name for name in found if (found[name] is None) != (expected[name] is None)}
    assert not missing, f"gradients are missing on one side: {missing}"
    pairs = {name: (found[name], expected[name]) for name in found if found[name] is not None}
    differing = {name: _difference(*pair) for name, pair in pairs.items() if not torch.equal(*pair)}
    assert not differing, f"largest differences: {differing}"


def _difference(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).abs().max())


def _assert_small_error(model: nn.Module, fused: nn.Module, spec: Spec, case: Case) -> None:
    wide = random_modules.build(spec).double()
    for draws in (range(FEW_DRAWS), range(FEW_DRAWS, FEW_DRAWS + MANY_DRAWS)):
        norm = eager = found = 0.0
        for draw in draws:
            exact = _step(wide, spec, case, draw)
            norm += _squared(exact, {})
            eager += _squared(_step(model, spec, case, draw), exact)
            found += _squared(_step(fused, spec, case, draw), exact)
        assume(math.isfinite(norm) and math.isfinite(eager))
        if found**0.5 <= BOUND * eager**0.5 + FLOOR * norm**0.5:
            return
    ratio = (found / eager) ** 0.5 if eager else math.inf
    raise AssertionError(
        f"error {(found / norm) ** 0.5:.1e} against {(eager / norm) ** 0.5:.1e} of eager execution, relative to the "
        f"norm of all gradients: {ratio:.2f} times as large"
    )


def _squared(found: Results, exact: Results) -> float:
    """Return the squared norm of the difference over all gradients."""
    gradients = {name: value for name, value in found.items() if value is not None and name != "loss"}
    return sum(float((value.double() - exact.get(name, 0.0)).square().sum()) for name, value in gradients.items())


def _try(case: Case, count: int, key: int, dropout: bool = True) -> None:
    """Check `count` modules; equal arguments draw equal modules."""

    @seed(key)
    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(random_modules.specs(dropout))
    def agree(spec: Spec) -> None:
        note(f"{case}")
        check(spec, case)

    agree()
