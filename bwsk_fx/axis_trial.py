"""One node's axis claims on real operands: run it shard by shard, merge as claimed, and compare."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations, product
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from bwsk_fx.axes import Step
from bwsk_fx.axis_facts import Facts, Shard, shards_of
from bwsk_fx.errors import RuleError, first_line
from bwsk_fx.report.axis_certificate import AxisCertificate, Status
from bwsk_fx.rules.axis import Behaviour, Claim, Value
from bwsk_fx.rules.axis_merge import ADDED, Merge, RealCall, merge_of
from bwsk_fx.rules.decomposition import untouched
from bwsk_fx.signature import tensors_of

# Results of few values may agree by chance.
_DRAWS = 3
# In units of the result's precision: sums of shards round otherwise.
_TOLERANCE = 1e4


def copied(arguments: Any) -> Any:
    """Copy tensors, which an in-place call would write into."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.clone(), arguments)


@dataclass(frozen=True)
class SeededCall:
    """A call that gives the same result every time, its random numbers included."""

    op: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    seed: int = 0

    def run(self, args: Any, kwargs: Any, weights: Mapping[str, Tensor] | None = None) -> Any:
        """Call the target on copies of arguments, a module with other weights if they are given."""
        args, kwargs = copied((args, kwargs))
        torch.manual_seed(self.seed)
        if self.op == "call_method":
            return getattr(args[0], self.target)(*args[1:], **kwargs)
        if isinstance(self.target, nn.Module):
            with untouched(self.target):
                return functional_call(self.target, dict(weights or {}), args, kwargs)
        return self.target(*args, **kwargs)


class _Outcome(NamedTuple):
    """What a trial showed; as in `AxisCertificate`."""

    status: Status
    why: str
    parameters: tuple[tuple[str, int], ...] = ()
    error: float = 0.0


@dataclass(frozen=True)
class _Operand:
    """A real operand of a call: its place among the leaves of the arguments, and what is known of its axes."""

    place: int
    value: Value
    real: Tensor


@dataclass
class Trial:
    """The claims of one node on real operands."""

    step: Step
    node: fx.Node
    call: SeededCall
    facts: Facts
    shards: int
    _generator: torch.Generator = field(default_factory=torch.Generator)

    @cached_property
    def _leaves(self) -> tuple[list[Any], pytree.TreeSpec]:
        return pytree.tree_flatten((self.call.args, self.call.kwargs))

    @cached_property
    def _operands(self) -> list[_Operand]:
        """Pair real tensors with the values of the walk; both are in the order of the arguments."""
        leaves, _ = self._leaves
        real = [(place, leaf) for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        known = self.step.inputs
        if len(real) != len(known):
            raise RuleError(f"node '{self.node.name}' has {len(real)} operands, and {len(known)} when it was captured")
        return [_Operand(place, value, leaf) for (place, leaf), value in zip(real, known, strict=True)]

    @cached_property
    def _full(self) -> list[Tensor]:
        """The unsharded results."""
        return _tensors(self.call.run(self.call.args, self.call.kwargs))

    def certificate(self, claim: Claim) -> AxisCertificate:
        """Try a claim."""
        try:
            outcome = self._tried(claim)
        except (RuntimeError, ValueError, IndexError, TypeError) as failure:
            # A trial that cannot be made is no proof of anything, and the other claims are to be tried.
            outcome = _Outcome(Status.UNTRIED, first_line(failure))
        name = self.facts.axes.name(claim.axis)
        node, target, behaviour = self.node.name, self.step.target, claim.behaviour
        return AxisCertificate(node, target, name, behaviour, claim.role, *outcome)

    def _tried(self, claim: Claim) -> _Outcome:
        carried = [self._indices(one.value, one.real, claim) for one in self._operands]
        produced = self._produced(claim)
        known = [found for found in (*carried, *produced) if found is not None]
        if not known:
            return _Outcome(Status.UNTRIED, "no tensor of the call carries the axis")
        cuts = shards_of(max(int(found.max()) for found in known) + 1, self.shards)
        if not any(found is not None for found in carried):
            return self._made(claim, produced, cuts)
        if claim.behaviour is Behaviour.BARRIER:
            needless = self._independent(carried, produced, cuts) <= self._tolerance
            why = "shards do not need each other here" if needless else "shards differ without each other's facts"
            return _Outcome(Status.CAUTIOUS if needless else Status.CERTIFIED, why)
        if claim.behaviour is Behaviour.MAP:
            why = "each shard comes out the same, whatever the others hold"
            ways = (
                (self._independent(some, produced, cuts), why + note) for some, note in self._sharded(claim, carried)
            )
        else:
            ways = (self._merged(some, cuts, note) for some, note in self._sharded(claim, carried))
        return self._judged(*min(ways))

    def _sharded(self, claim: Claim, carried: list[Tensor | None]) -> Iterator[tuple[list[Tensor | None], str]]:
        """Yield which operands are sharded: all that carry the axis, but for those that other claims speak of."""
        yield carried, ""
        others = (other for other in self.step.claims if other.axis == claim.axis and other is not claim)
        places = [place for place, found in enumerate(carried) if found is not None]
        if not all(other.behaviour.coordination_free for other in others):
            for size in range(len(places) - 1, 0, -1):
                for some in combinations(places, size):
                    rest = ", ".join(self._operands[place].value.node.name for place in places if place not in some)
                    chosen = [found if place in some else None for place, found in enumerate(carried)]
                    yield chosen, f", given all of {rest}"

    def _judged(self, error: float, why: str, parameters: tuple[tuple[str, int], ...] = ()) -> _Outcome:
        if error <= self._tolerance:
            return _Outcome(Status.CERTIFIED, why, parameters, error)
        why = f"shards differ from the unsharded run by {error:.1e} of its largest element"
        return _Outcome(Status.WRONG, why, error=error)

    @cached_property
    def _tolerance(self) -> float:
        wide = [torch.finfo(one.dtype).eps for one in self._full if one.is_floating_point()]
        return _TOLERANCE * max(wide, default=0.0)

    def _indices(self, value: Value, real: Tensor, claim: Claim) -> Tensor | None:
        return self.facts.indices(value, real.shape, claim.axis)

    def _produced(self, claim: Claim) -> list[Tensor | None]:
        return [self._indices(value, real, claim) for value, real in zip(self.step.results, self._full, strict=True)]

    def _independent(
        self, carried: Sequence[Tensor | None], produced: Sequence[Tensor | None], cuts: Sequence[Shard]
    ) -> float:
        """Return the largest error of what each shard makes by itself.

        Where a result has the axis, the shard's part of it counts. Where facts have got other indices, or one of them
        is left, each element has to come out right in one shard.
        """
        runs = ((cut, self._run_with_noise(carried, cut)) for cut in cuts)
        return self._worst(runs, produced)

    def _worst(self, runs: Iterable[tuple[Shard, list[list[Tensor]]]], produced: Sequence[Tensor | None]) -> float:
        best = [torch.full(full.shape, torch.inf, dtype=torch.float64) for full in self._full]
        for cut, draws in runs:
            for place, full in enumerate(self._full):
                errors = torch.stack([_errors(draw[place], full) for draw in draws]).amax(0)
                there = produced[place]
                if there is None:
                    best[place] = torch.minimum(best[place], errors)
                else:
                    best[place] = torch.where(cut.has(there), errors, best[place])
        return max((float(errors.max()) for errors in best if errors.numel()), default=0.0)

    def _run_with_noise(self, carried: Sequence[Tensor | None], cut: Shard) -> list[list[Tensor]]:
        return [self._run_with(carried, cut, self._noise) for _ in range(_DRAWS)]

    def _run_with(self, carried: Sequence[Tensor | None], cut: Shard, others: Any, partial: Any = None) -> Any:
        """Run on one shard, with `others` in place of the facts that it does not have."""
        replaced = {
            one.place: cut.select(one.real, indices, others(one.real))
            for one, indices in zip(self._operands, carried, strict=True)
            if indices is not None
        }
        args, kwargs = self._with(replaced)
        return (partial or self._run)(args, kwargs)

    def _with(self, replaced: Mapping[int, Tensor]) -> Any:
        leaves, spec = self._leaves
        return pytree.tree_unflatten([replaced.get(place, leaf) for place, leaf in enumerate(leaves)], spec)

    def _run(self, args: Any, kwargs: Any, weights: Mapping[str, Tensor] | None = None) -> list[Tensor]:
        return _tensors(self.call.run(args, kwargs, weights))

    def _noise(self, real: Tensor) -> Tensor:
        """Draw values of a tensor's kind: numbers of any size, integers of the range that there is."""
        if real.is_floating_point():
            return torch.randn(real.shape, generator=self._generator, dtype=real.dtype) * (1 + real.abs().max())
        if real.dtype is torch.bool:
            return torch.rand(real.shape, generator=self._generator) < 0.5
        low, high = int(real.min()), int(real.max())
        return torch.randint(low, high + 1, real.shape, generator=self._generator).to(real.dtype)

    def _merged(self, carried: Sequence[Tensor | None], cuts: Sequence[Shard], note: str) -> tuple[float, str]:
        merge = merge_of(self.call.target)
        call = RealCall(self.call.target, self.call.args, self.call.kwargs)
        partial = self._partial(merge)
        parts = [self._run_with(carried, cut, merge.absent, partial) for cut in cuts]
        nothing = self._run_with(carried, Shard(0, 0), merge.absent, partial)
        found = _tensors(merge.combine(call, parts, nothing))
        full = self._full if merge.whole is None else _tensors(merge.whole(call))
        error = max((float(_errors(*pair).max()) for pair in zip(found, full, strict=True)), default=0.0)
        how = "sum up to" if merge is ADDED else "merge into"
        return error, f"the partial results of {len(cuts)} shards {how} the unsharded one{note}"

    def _partial(self, merge: Merge) -> Callable[[Any, Any], Any]:
        partial = merge.partial
        if partial is None:
            return self.call.run
        return lambda args, kwargs: partial(RealCall(self.call.target, args, kwargs))

    def _made(self, claim: Claim, produced: Sequence[Tensor | None], cuts: Sequence[Shard]) -> _Outcome:
        """Try an axis that only results carry: parameters are what can be sharded along it."""
        if claim.behaviour is Behaviour.BARRIER:
            return _Outcome(Status.CERTIFIED, "nothing that enters the call carries the axis")
        if self.facts.axes.origins(claim.axis):
            return _Outcome(Status.CERTIFIED, "its facts are those of an axis that is tried by itself")
        choices = self._choices(claim)
        for choice in choices:
            error = self._sharded_parameters(choice, produced, cuts)
            if error <= self._tolerance:
                names = ", ".join(name for name, _ in choice)
                return self._judged(error, f"each shard of {names} yields results of its own", choice)
        if not choices:
            return _Outcome(Status.CERTIFIED, "it is made of what every shard has")
        return _Outcome(Status.WRONG, "no parameter can be sharded along the axis", error=1.0)

    def _choices(self, claim: Claim) -> list[tuple[tuple[str, int], ...]]:
        """Return the ways to shard parameters, those that shard most of them first."""
        sizes = {
            real.shape[dim]
            for value, real in zip(self.step.results, self._full, strict=True)
            if (dim := self.facts.dim(value, claim.axis)) is not None
        }
        options = [
            [(name, dim) for dim, size in enumerate(real.shape) if size in sizes] + [None]
            for name, real in self._parameters.items()
        ]
        found = [tuple(one for one in choice if one is not None) for choice in product(*options)]
        return sorted((choice for choice in found if choice), key=len, reverse=True)

    @cached_property
    def _parameters(self) -> dict[str, Tensor]:
        """Parameters and buffers of the module, and operands that the graph reads as attributes."""
        own = self.call.target if isinstance(self.call.target, nn.Module) else nn.Module()
        attributes = (one for one in self._operands if one.value.node.op == "get_attr")
        return tensors_of(own) | {str(one.value.node.target): one.real for one in attributes}

    def _sharded_parameters(
        self, choice: Sequence[tuple[str, int]], produced: Sequence[Tensor | None], cuts: Sequence[Shard]
    ) -> float:
        """Return the largest error where each shard has its part of the chosen parameters alone."""

        def runs() -> Iterator[tuple[Shard, list[list[Tensor]]]]:
            for cut in cuts:
                weights = {name: self._poisoned(name, dim, produced, cut) for name, dim in choice}
                places = {one.place: str(one.value.node.target) for one in self._operands}
                replaced = {place: weights.pop(name) for place, name in places.items() if name in weights}
                args, kwargs = self._with(replaced)
                yield cut, [self._run(args, kwargs, weights)]

        return self._worst(runs(), produced)

    def _poisoned(self, name: str, dim: int, produced: Sequence[Tensor | None], cut: Shard) -> Tensor:
        """Keep the shard's part of a parameter, whose dimension has the indices of the result's."""
        real = self._parameters[name]
        indices = next(found.flatten() for found in produced if found is not None and found.numel() == real.shape[dim])
        return cut.select(real, indices.view(-1, *[1] * (real.dim() - dim - 1)), self._noise(real))


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _errors(found: Tensor, full: Tensor) -> Tensor:
    """Return the difference of each element, relative to the largest; what is not a number has to be none, too."""
    if not full.is_floating_point():
        return (found != full).double()
    finite = full[full.isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 1.0
    errors = (found.double() - full.double()).abs() / (largest or 1.0)
    same = (found == full) | (found.isnan() & full.isnan())
    return torch.where(same, 0.0, errors.nan_to_num(torch.inf, torch.inf, torch.inf))
