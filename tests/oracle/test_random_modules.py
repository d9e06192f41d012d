"""Random small modules agree with eager execution at every tier.

Exact tiers have eager's bits: loss, gradients of parameters, gradients of inputs. There are cases in which gradients
are added in another order, or a kernel meets another layout (`_differs_by_design`); where one of them applies, an
exact tier is held to the bound of the rounded ones, and most modules have to be held to the bits.

Rounded tiers have at most 1.5 times eager's error against float64, where the error is the norm of the difference over
all gradients of a module. Two things keep that from being a matter of luck:

- Errors are pooled over draws of weights and inputs, as variances. With few elements, one of two equally good results
  is often 1.5 times as far off as the other, so that a single draw says little. Where the pool of a few draws is over
  the bound, that of many decides.
- Some modules hardly round in eager execution, so a floor of two units in the last place of float32, relative to the
  norm of all gradients, is added to the bound.

The float64 run sees the same dropout masks: on a CPU, the numbers that a mask is drawn from depend on the seed and on
the number of elements, not on the dtype (`test_masks_do_not_depend_on_the_dtype`).

By default each case (tier, granularity, precision) is tried on small modules of its own, 300 in all: most of the time
goes into capturing and tracing, which every further case of a module would pay for again. `pytest -m slow` tries
10,000 larger ones, or BWSK_RANDOM_MODULES. A seed per case, in place of `derandomize`, keeps runs alike and cases
apart.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from unittest.mock import patch

import pytest
import random_modules
import torch
from hypothesis import HealthCheck, assume, given, note, seed, settings
from random_modules import Spec
from random_steps import step
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import bwsk_fx
from bwsk_fx.modes import applied
from bwsk_fx.planning.layouts import laid_out
from bwsk_fx.planning.options import TIERS as NAMED_TIERS
from bwsk_fx.planning.program import Layout
from bwsk_fx.reversible import ReversibleRegion

BOUND, FLOOR = 1.5, 2 * torch.finfo(torch.float32).eps
FEW_DRAWS, MANY_DRAWS = 3, 40
TIERS = (("exact", 0.0), ("exact", math.inf), ("rounded", 0.0), ("rounded", 0.1), ("rounded", math.inf))
SAMPLE = 15  # Modules per case.
THOROUGH = math.ceil(int(os.environ.get("BWSK_RANDOM_MODULES", "10000")) / (len(TIERS) * 4))
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
    granularity: str = "whole"
    half: bool = False

    def __str__(self) -> str:
        return f"{self.faith}-{self.budget:g}-{self.granularity}-{'bf16' if self.half else 'fp32'}"


CASES = [
    Case(*tier, granularity, half) for tier, granularity, half in product(TIERS, ("whole", "block"), (False, True))
]


# -- one module -------------------------------------------------------------------------------------------------------


def check(spec: Spec, case: Case) -> str:
    """Compare a module with its reversible form; return what it was held to: `bits`, `error`, or `nothing`."""
    model = random_modules.build(spec)
    fused = _reversible(model, spec, case)
    with _gradients_wanted() as wanted:
        held_to = _compare(model, fused, spec, case, lambda: fused)
    assert held_to == "nothing" or any(region.program for region in _regions(fused)) or not any(wanted)
    return held_to


@contextmanager
def _gradients_wanted() -> Iterator[list[bool]]:
    """Note for each call of a region whether it has anything to plan: what trains may be outside of all of them."""
    wanted: list[bool] = []
    original = ReversibleRegion.forward

    def forward(self: ReversibleRegion, *args: object) -> tuple[Tensor, ...]:
        operands = [*(argument for argument in args if isinstance(argument, Tensor)), *self.subgraph.parameters()]
        wanted.append(any(operand.requires_grad for operand in operands))
        return original(self, *args)

    with patch.object(ReversibleRegion, "forward", forward):
        yield wanted


def _reversible(model: nn.Module, spec: Spec, case: Case) -> fx.GraphModule:
    graph = bwsk_fx.capture(model, random_modules.inputs_of(spec, 0))
    fused = bwsk_fx.fuse_regions(graph, case.budget, faith=case.faith, granularity=case.granularity)
    assert _regions(fused)
    return fused


def _regions(model: nn.Module) -> list[ReversibleRegion]:
    return [module for module in model.modules() if isinstance(module, ReversibleRegion)]


def _compare(
    model: nn.Module, reversible: nn.Module, spec: Spec, case: Case, fused: Callable[[], fx.GraphModule]
) -> str:
    if _step(model, spec, case, 0) is None:
        return "nothing"
    if case.faith == "exact":
        with _layouts_copied() as copied:
            differing = _differing(model, reversible, spec, case)
        if not differing:
            return "bits"
        assert copied or _differs_by_design(fused()), f"largest differences: {differing}"
    return "error" if _require_small_error(model, reversible, spec, case) else "nothing"


def _step(model: nn.Module, spec: Spec, case: Case, draw: int) -> Results | None:
    """Run one training step on a draw of weights and inputs; return the loss and all gradients.

    None where the loss depends on nothing that needs a gradient.
    """
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
    if not loss.requires_grad:
        return None
    loss.backward()
    leaves = dict(model.named_parameters()) | inputs
    found = {"loss": loss} | {name: leaf.grad for name, leaf in leaves.items()}
    return {name: None if value is None else value.detach().clone() for name, value in found.items()}


def _widened(value: Tensor) -> Tensor:
    return value.detach().double().requires_grad_(value.requires_grad) if value.is_floating_point() else value


def _differing(model: nn.Module, fused: nn.Module, spec: Spec, case: Case) -> dict[str, float]:
    """Return the largest difference of each result that has not eager's bits in every draw."""
    differing: dict[str, float] = {}
    for draw in range(FEW_DRAWS):
        found, expected = _step(fused, spec, case, draw), _step(model, spec, case, draw)
        assert found.keys() == expected.keys()
        missing = {name for name in found if (found[name] is None) != (expected[name] is None)}
        assert not missing, f"gradients are missing on one side: {missing}"
        pairs = {name: (found[name], expected[name]) for name in found if found[name] is not None}
        differing |= {name: _distance(*pair) for name, pair in pairs.items() if not torch.equal(*pair)}
    return differing


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).abs().max())


def _require_small_error(model: nn.Module, fused: nn.Module, spec: Spec, case: Case) -> bool:
    """Hold the pooled error to the bound; False where float64 itself overflows."""
    wide = random_modules.build(spec).double()
    for draws in (range(FEW_DRAWS), range(FEW_DRAWS, FEW_DRAWS + MANY_DRAWS)):
        norm = eager = found = 0.0
        for draw in draws:
            exact = _step(wide, spec, case, draw)
            norm += _squared(exact, {})
            eager += _squared(_step(model, spec, case, draw), exact)
            found += _squared(_step(fused, spec, case, draw), exact)
        if not math.isfinite(norm) or not math.isfinite(eager):
            return False
        if found**0.5 <= BOUND * eager**0.5 + FLOOR * norm**0.5:
            return True
    ratio = (found / eager) ** 0.5 if eager else math.inf
    raise AssertionError(
        f"error {found**0.5:.1e} against {eager**0.5:.1e} of eager execution, {ratio:.2f} times as large, where the "
        f"norm of all gradients is {norm**0.5:.1e}"
    )


def _squared(found: Results, exact: Results) -> float:
    """Return the squared norm of the difference over all gradients."""
    gradients = {name: value for name, value in found.items() if value is not None and name != "loss"}
    return sum(float((value.double() - exact.get(name, 0.0)).square().sum()) for name, value in gradients.items())


# -- where last bits differ -------------------------------------------------------------------------------------------


def _differs_by_design(fused: fx.GraphModule) -> bool:
    """Whether gradients are added in another order, or a kernel reads a result that lies otherwise than in eager.

    On a CPU the last bits of GELU and others depend on whether their operand is contiguous. Kept values are laid out as
    eager's, so they are no excuse.
    """
    programs = [region.program for region in _regions(fused) if region.program]
    nodes = [node for one in programs for half in (one.forward, one.backward) for node in half.graph.nodes]
    copies = [node for node in nodes if node.target is laid_out and node.args[0].op != "call_method"]
    return bool(copies) or _adds_otherwise(fused)


@contextmanager
def _layouts_copied() -> Iterator[list[Layout]]:
    """Note the gradients that enter a region in another layout than it was traced with, or as zeros for none."""
    copied: list[Layout] = []
    original = Layout.applied_to

    def applied_to(self: Layout, gradient: Tensor | None) -> Tensor:
        if gradient is None or gradient.stride() != self.strides:
            copied.append(self)
        return original(self, gradient)

    with patch.object(Layout, "applied_to", applied_to):
        yield copied


def _adds_otherwise(fused: fx.GraphModule) -> bool:
    """Whether a value has three or more uses, not all of them in one place."""
    uses = ([_uses(fused, user, node) for user in node.users] for node in fused.graph.nodes)
    return any(len(found) > 1 and sum(found) > 2 for found in uses)


def _uses(fused: fx.GraphModule, user: fx.Node, value: fx.Node) -> int:
    """Count how often one node reads a value, inside it if it is a region."""
    module = fused.get_submodule(str(user.target)) if user.op == "call_module" else None
    if not isinstance(module, ReversibleRegion):
        # PyTorch puts an RMSNorm together from operators.
        return 2 if isinstance(module, nn.RMSNorm) else pytree.tree_leaves((user.args, user.kwargs)).count(value)
    placeholders = module.subgraph.graph.find_nodes(op="placeholder")
    inner = [place for place, operand in zip(placeholders, user.args, strict=True) if operand is value]
    return sum(_uses(module.subgraph, reader, place) for place in inner for reader in place.users)


# -- many modules -----------------------------------------------------------------------------------------------------


def _try(case: Case, count: int, key: int, most: int, trial: Callable[[Spec, Case], str] = check) -> Counter[str]:
    """Try `count` modules, the same ones for the same key; return what how many of them were held to."""
    held: Counter[str] = Counter()

    @seed(key)
    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(random_modules.specs(most))
    def agrees(spec: Spec) -> None:
        note(repr(case))
        held_to = trial(spec, case)
        held[held_to] += 1
        assume(held_to != "nothing")

    agrees()
    assert held["bits"] + held["error"] >= count
    return held


def _check_applied(spec: Spec, case: Case) -> str:
    """As `check`, for a module that `apply` makes reversible in place."""
    model = random_modules.build(spec)
    bwsk_fx.apply(model, "reversible", budget=case.budget, faith=case.faith, granularity=case.granularity)
    if _step(model, spec, case, 0) is None:
        return "nothing"
    rewritten = applied(model).rewritten
    assert any(region.program for region in _regions(rewritten))
    return _compare(random_modules.build(spec), model, spec, case, lambda: rewritten)


def _require_agreement(case: Case, count: int, key: int, most: int) -> None:
    held = _try(case, count, key, most)
    if case.faith == "exact":
        assert held["bits"] >= (0.8 if case.granularity == "whole" else 0.5) * count


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_sample_agrees(case):
    _require_agreement(case, SAMPLE, CASES.index(case), most=3)


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_ten_thousand_agree(case):
    for first in range(0, THOROUGH, 100):
        _require_agreement(case, min(100, THOROUGH - first), 1000 + 20 * first + CASES.index(case), most=6)


@pytest.mark.parametrize("faith", ["exact", "rounded"])
def test_applied_modules_agree(faith):
    _try(Case(faith, 0.1, "block"), 5, 0, 3, _check_applied)


def test_named_tiers_are_among_those_tried():
    assert {(options.faith, options.budget) for options in NAMED_TIERS.values()} <= set(TIERS)


# -- the trial itself -------------------------------------------------------------------------------------------------

PLAIN = Spec((step("linear", out=8, bias=True, relu=False), step("act", name="gelu")), width=8, tokens=3, batch=2)
TAPPED = Spec(
    (step("blocks", step("extra", op="+"), step("extra", op="+"), count=2),), width=8, tokens=3, batch=2, grad=("y",)
)


def test_regions_without_gradients_are_no_failure():
    blocks = step("blocks", step("norm", of="layer", affine=False), step("gate", by="itself"), count=2)
    steps = (blocks, step("parameter", role="scale"))
    assert check(Spec(steps, width=4, tokens=3, batch=2), Case("exact", 0.0, "block")) == "bits"
    with _gradients_wanted() as wanted:
        check(PLAIN, Case("exact", 0.0))
    assert any(wanted)


@pytest.mark.parametrize("faith", ["exact", "rounded"])
def test_a_wrong_gradient_is_found(faith):
    original = random_modules.loss_of

    def steeper(spec, output):
        loss = original(spec, output)
        return loss * (1 + 1e-5) if "RegionFunction" in type(output.grad_fn).__name__ else loss

    assert check(PLAIN, Case(faith, 0.0)) in ("bits", "error")
    with patch.object(random_modules, "loss_of", steeper), pytest.raises(AssertionError, match=r"differences|error"):
        check(PLAIN, Case(faith, 0.0))


def test_values_with_several_uses_across_regions_are_told_apart():
    for spec, granularity, expected in ((PLAIN, "whole", False), (TAPPED, "whole", False), (TAPPED, "block", True)):
        fused = _reversible(random_modules.build(spec), spec, Case("exact", 0.0, granularity))
        assert _adds_otherwise(fused) is expected


def test_rounded_plans_of_the_sample_invert():
    rules: Counter[str] = Counter()

    def count(spec: Spec, case: Case) -> str:
        fused = _reversible(random_modules.build(spec), spec, case)
        if _step(fused, spec, case, 0) is None:
            return "nothing"
        plans = [region.program.plan for region in _regions(fused) if region.program]
        rules.update(value.rule for plan in plans for value in plan.values if value.action == "invert")
        return "error"

    _try(Case("rounded", 0.0, "whole", half=True), SAMPLE, 9, 3, count)
    assert sum(number for rule, number in rules.items() if rule == "sum" or "LayerNorm" in rule) >= 3


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_masks_do_not_depend_on_the_dtype(p):
    masks = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        torch.manual_seed(0)
        masks.append(F.dropout(torch.ones(4, 6, 16, dtype=dtype), p) != 0)
    assert all(torch.equal(mask, masks[0]) for mask in masks)
    assert 0 < int(masks[0].sum()) < masks[0].numel()
