"""S claims on concrete values: one node with what reaches it, tried in any dtype and on any operands."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from bwsk_fx import _torch_private as private
from bwsk_fx.errors import first_line
from bwsk_fx.rules import sound
from bwsk_fx.rules.round_trip import Executed, RoundTrip, execute, merged, round_trip
from bwsk_fx.rules.samples import adversarial
from bwsk_fx.rules.single import Target
from bwsk_fx.rules.sizes import short
from bwsk_fx.verdict import Label, Verdict

# Scales that stand for those of a norm whose γ came close to zero.
_SMALL_SCALE = 1e-4


@dataclass(frozen=True)
class Trial:
    """What came of an S claim in one dtype.

    Attributes:
        dtype: The dtype, without `torch.`.
        real: The round trip of the given values; None where there was none.
        adversarial: The sum of the round trips of other values; None where there were none.
        note: Why there was none: the operator is not S in this dtype, or does not run in it.
    """

    dtype: str
    real: RoundTrip | None = None
    adversarial: RoundTrip | None = None
    note: str = ""

    @property
    def trips(self) -> list[RoundTrip]:
        """The round trips that were made."""
        return [trip for trip in (self.real, self.adversarial) if trip is not None]

    @property
    def holds(self) -> bool:
        """Whether no element came back wrong."""
        return all(trip.holds for trip in self.trips)

    @property
    def failure(self) -> str:
        """What came back wrong; empty where the claim holds."""
        trip = next((trip for trip in self.trips if not trip.holds), None)
        if trip is None:
            return ""
        return trip.note or f"{trip.wrong} of {trip.elements} elements are wrong, by up to {trip.error:.1e}"


@dataclass(frozen=True)
class Claim:
    """A call with the values that reach it, and the S verdict to try.

    Attributes:
        target: A module, a function, or the name of a method.
        args: Positional arguments.
        kwargs: Keyword arguments.
        dynamic: The names of the dynamic operands by the identity of their values.
        verdict: The verdict.
        fixed: Whether the verdict holds for all dtypes, as a user's does; else rules judge each dtype anew.
    """

    target: Target
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    dynamic: Mapping[int, str]
    verdict: Verdict
    fixed: bool = False

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of the first dynamic operand in floating point."""
        return next((value.dtype for value in self._operands() if value.is_floating_point()), None)

    def execute(self) -> Executed:
        """Run the call on its values."""
        return execute(self.target, self.args, self.kwargs, tuple(self.dynamic), self.dynamic)

    def try_own(self, kinds: Sequence[str]) -> Trial:
        """Try the claim as it stands.

        Args:
            kinds: Which adversarial values to try as well; see `bwsk_fx.rules.samples`.
        """
        executed = self.execute()
        dtype = self.dtype or next((value.dtype for value in self._operands()), None)
        real = round_trip(executed, self.verdict)
        name = "no dtype" if dtype is None else short(dtype)
        return Trial(name, real, self._adversarial(kinds, self.verdict, executed))

    def try_in(self, dtype: torch.dtype, kinds: Sequence[str]) -> Trial:
        """Try the claim with every floating-point value and parameter in another dtype, without autocast."""
        variant = self._mapped(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf)
        if isinstance(self.target, nn.Module):
            variant = replace(variant, target=copy.deepcopy(self.target).to(dtype))
        try:
            with private.without_autocast():
                executed = variant.execute()
                verdict = self.verdict if self.fixed else sound.verdict(executed.call)
                if verdict.label is not Label.S:
                    return Trial(short(dtype), note=f"{verdict.label} in this dtype: {verdict.rationale}")
                real = round_trip(executed, verdict, with_condition=False)
                return Trial(short(dtype), real, variant._adversarial(kinds, verdict, executed))
        except (NotImplementedError, RuntimeError) as error:
            return Trial(short(dtype), note=f"does not run in this dtype: {first_line(error)}")

    def _adversarial(self, kinds: Sequence[str], verdict: Verdict, executed: Executed) -> RoundTrip | None:
        variants = [(self._with_values(kind), executed.run.memory) for kind in kinds]
        if kinds and (small := _with_small_scale(self.target)) is not None:
            variants.append((replace(self, target=small), {}))
        trips = [_trip(variant, verdict, memory) for variant, memory in variants]
        return merged(trips) if trips else None

    def _with_values(self, kind: str) -> Claim:
        seeds = {id(value): seed for seed, value in enumerate(self._operands())}
        return self._mapped(lambda leaf: adversarial(leaf, kind, seeds[id(leaf)]) if id(leaf) in seeds else leaf)

    def _operands(self) -> list[Tensor]:
        leaves = pytree.tree_leaves((self.args, dict(self.kwargs)))
        return list({id(leaf): leaf for leaf in leaves if id(leaf) in self.dynamic}.values())

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> Claim:
        """Return the claim on other values; names stay with their operands."""
        made: dict[int, Tensor] = {}

        def changed(leaf: Tensor) -> Tensor:
            return made.setdefault(id(leaf), change(leaf)) if id(leaf) not in made else made[id(leaf)]

        args, kwargs = pytree.tree_map_only(Tensor, changed, (self.args, dict(self.kwargs)))
        dynamic = {id(made[key]): name for key, name in self.dynamic.items()}
        return replace(self, args=args, kwargs=kwargs, dynamic=dynamic)


def claim_of(
    node: fx.Node,
    target: Target,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    dynamic: set[fx.Node],
    verdict: Verdict,
) -> Claim:
    """Return the claim of a node, given the values of its arguments and the graph's dynamic nodes."""
    sources = pytree.tree_leaves((node.args, dict(node.kwargs)))
    values = pytree.tree_leaves((args, dict(kwargs)))
    names = {
        id(value): source.name
        for source, value in zip(sources, values, strict=True)
        if isinstance(source, fx.Node) and source in dynamic and isinstance(value, Tensor)
    }
    return Claim(target, args, kwargs, names, verdict)


def _trip(claim: Claim, verdict: Verdict, memory: dict[str, Any]) -> RoundTrip:
    executed = claim.execute()
    return round_trip(replace(executed, run=replace(executed.run, memory=memory)), verdict, with_condition=False)


def _with_small_scale(target: Target) -> nn.Module | None:
    """Return a norm, or another module with a scale per feature, with every second scale close to zero."""
    weight = getattr(target, "weight", None)
    if not isinstance(target, nn.Module) or not isinstance(weight, Tensor) or weight.dim() != 1:
        return None
    small = copy.deepcopy(target)
    with torch.no_grad():
        small.weight[::2] *= _SMALL_SCALE  # type: ignore[index, operator]
    return small
