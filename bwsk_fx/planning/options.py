"""What a plan is asked for: budget or memory, faith, and how it is made and run."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, fields, replace
from typing import Any, TypedDict

from bwsk_fx.errors import PlanError

FAITHS = ("rounded", "exact")
COMPILERS = ("eager", "inductor")
COSTS = ("builtin", "roofline", "measured")
_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([kmg]i?b|b)?\s*", re.IGNORECASE)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class PlanKeywords(TypedDict, total=False):
    """The options of a plan beside its budget, as keyword arguments of `fuse_regions` and `apply`."""

    faith: str
    tier: str | None
    memory: int | str | None
    activation_fraction: float | None
    inverses: bool
    linear_inverses: bool
    costs: str
    compiler: str
    plan: str | None


@dataclass(frozen=True)
class PlanOptions:
    """What a plan is asked for.

    With neither `memory` nor `activation_fraction`, a plan holds the least memory within the budget; with one of them,
    it takes the least time within that memory, and `budget` is the most that it may take.

    Attributes:
        budget: Extra time, as a fraction of the conventional step. 0.0 runs no matrix product, convolution or attention
            twice; elementwise work is then weighed against the bytes that it saves.
        faith: `exact` for bit-identical gradients (keep, recompute, views), `rounded` to allow inverses too.
        memory: Bytes that a step may hold at its peak beyond parameters, buffers and optimizer state: activations,
            gradients and what is rebuilt. A number, or a text such as `"1.5GiB"`.
        activation_fraction: The share of the bytes that eager execution keeps for the backward pass.
        inverses: Whether values may be rebuilt from what was made of them; False leaves keeping and recomputing.
        linear_inverses: Whether linear maps with a frozen, well-conditioned weight may be undone; finding them takes a
            singular value decomposition of each frozen weight.
        costs: Where modelled times come from: `builtin` figures, a `roofline` calibrated on the device, or every
            distinct call `measured`.
        compiler: What runs a region's forward and backward pass: `eager`, or `inductor`.
        plan: A file that `save_plan` wrote; what it says is run, and nothing is solved.

    Raises:
        PlanError: An option is out of range.
    """

    budget: float = 0.0
    faith: str = "rounded"
    memory: int | str | None = None
    activation_fraction: float | None = None
    inverses: bool = True
    linear_inverses: bool = False
    costs: str = "builtin"
    compiler: str = "eager"
    plan: str | None = None

    def __post_init__(self) -> None:
        if not _is_number(self.budget) or not self.budget >= 0.0:
            raise PlanError(f"budget is {self.budget!r}: expected a fraction of a training step, 0.0 or more")
        for name, known in (("faith", FAITHS), ("costs", COSTS), ("compiler", COMPILERS)):
            if getattr(self, name) not in known:
                raise PlanError(f"{name} is {getattr(self, name)!r}: expected one of {', '.join(map(repr, known))}")
        self._require_types()
        share = self.activation_fraction
        if share is not None and not (_is_number(share) and 0.0 < share <= 1.0):
            raise PlanError(
                f"activation_fraction is {share!r}: expected a share of eager's kept bytes, above 0 up to 1"
            )
        if self.memory is not None:
            if share is not None:
                raise PlanError("memory and activation_fraction are two bounds of one thing: give one of them")
            object.__setattr__(self, "memory", bytes_of(self.memory))
        if self.compiler == "inductor" and self.faith == "exact":
            raise PlanError(
                "faith='exact' promises eager's bits, which compiler='inductor' does not give: use 'rounded'"
            )

    def _require_types(self) -> None:
        for name in ("inverses", "linear_inverses"):
            if not isinstance(getattr(self, name), bool):
                raise PlanError(f"{name} is {getattr(self, name)!r}: expected True or False")
        if self.plan is not None and not isinstance(self.plan, (str, os.PathLike)):
            raise PlanError(f"plan is {self.plan!r}: expected the path of a file that save_plan wrote")

    def __str__(self) -> str:
        """Name the budget, the faith, and what differs from the defaults."""
        others = (field for field in fields(self) if getattr(self, field.name) != field.default)
        shown = {"budget": self.budget, "faith": self.faith} | {one.name: getattr(self, one.name) for one in others}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())

    @property
    def bounds_memory(self) -> bool:
        """Whether memory is given and time is looked for."""
        return self.memory is not None or self.activation_fraction is not None

    @property
    def is_local(self) -> bool:
        """Whether regions can be planned one by one: what one of them takes leaves the others as much as before."""
        return self.plan is not None or (not self.bounds_memory and self.budget in (0.0, math.inf))


# `balanced` spends what a step of a transformer hardly shows.
TIERS = {
    "exact": PlanOptions(budget=0.0, faith="exact"),
    "balanced": PlanOptions(budget=0.1),
    "smallest": PlanOptions(budget=math.inf),
}


def plan_options(budget: float | None = None, **keywords: Any) -> PlanOptions:
    """Put together what `fuse_regions` and `apply` were asked for.

    A tier stands for a budget and a faith, so that it takes neither beside it. With a bound on memory and no budget,
    time is not bounded.

    Raises:
        PlanError: A value is out of range, or two of them say the same thing.
    """
    tier = keywords.pop("tier", None)
    known = {field.name for field in fields(PlanOptions)}
    if unknown := sorted(set(keywords) - known):
        raise PlanError(f"there is no option {unknown[0]!r}: expected one of {', '.join(sorted(known | {'tier'}))}")
    if tier is None:
        unbounded = keywords.get("memory") is not None or keywords.get("activation_fraction") is not None
        default = math.inf if unbounded else 0.0
        return PlanOptions(default if budget is None else budget, **keywords)
    if not isinstance(tier, str) or tier not in TIERS:
        raise PlanError(f"tier is {tier!r}: expected one of {', '.join(map(repr, TIERS))}")
    if budget is not None or "faith" in keywords:
        raise PlanError(f"tier={tier!r} stands for a budget and a faith: give the tier, or the two of them")
    return replace(TIERS[tier], **keywords)


def bytes_of(size: int | float | str) -> int:
    """Read a number of bytes, or a text such as `"512MiB"` or `"1.5 GB"`.

    Raises:
        PlanError: It is neither, or not above zero.
    """
    found = _SIZE.fullmatch(size) if isinstance(size, str) else None
    number: Any = float(found[1]) * _UNITS[(found[2] or "").lower().removeprefix("b")] if found else size
    if not _is_number(number) or not 0 < number < math.inf:
        raise PlanError(f"memory is {size!r}: expected a number of bytes above zero, or a text such as '1.5GiB'")
    return int(number)


def show_bytes(count: float) -> str:
    """Write a number of bytes for people, in the largest binary unit that leaves a number above one."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count:.0f} B"
