"""How partial results of REDUCE and JOIN become the result: what stands for absent facts, and what merges shards.

A partial result is what a call makes of one shard, with a neutral value in place of every other fact. For affine
operators (products, convolutions, sums, means) the neutral value is zero, and the sum of partial results has the
constant term once too often for every shard beyond the first. Sizes are no facts: every shard knows them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bwsk_fx.rules.targets import Registry, operator_name


@dataclass(frozen=True)
class RealCall:
    """One call on real values.

    Attributes:
        target: The module, the function or the method's name.
        args: Positional arguments.
        kwargs: Keyword arguments.
    """

    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def option(self, name: str, place: int, default: Any = None) -> Any:
        """Return an option: an attribute of the module, or an argument by keyword or position."""
        if isinstance(self.target, nn.Module):
            return getattr(self.target, name, default)
        return self.kwargs.get(name, self.args[place] if len(self.args) > place else default)

    def dims(self, place: int = 1) -> list[int]:
        """Return the dimensions that the call acts on; all of its operand's if it names none."""
        given = self.option("dim", place)
        if given is None or isinstance(given, bool):
            return list(range(self.args[0].dim()))
        return list(given) if isinstance(given, (tuple, list)) else [given]


Combine = Callable[[RealCall, Sequence[Any], Any], Any]


@dataclass(frozen=True)
class Merge:
    """How the shards of one operator are merged.

    Attributes:
        combine: Takes the call, the partial results, and the result of no facts at all; returns the result.
        neutral: What stands for an absent fact.
        partial: What a shard computes in place of the operator itself, if it is something else.
        whole: What the result is compared with in place of the call, if it leaves out what is random.
        integers: Whether absent integers are replaced, too; those of a loss are classes, of which none is neutral.
    """

    combine: Combine
    neutral: float = 0.0
    partial: Callable[[RealCall], Any] | None = None
    whole: Callable[[RealCall], Any] | None = None
    integers: bool = True

    def absent(self, whole: Tensor) -> Tensor:
        """Return what stands for the absent facts of a tensor."""
        if whole.is_floating_point():
            return torch.full_like(whole, self.neutral)
        if not self.integers:
            return whole
        if whole.dtype is torch.bool:
            return torch.full_like(whole, self.neutral > 0)
        info = torch.iinfo(whole.dtype)
        return torch.full_like(whole, int(min(max(self.neutral, info.min), info.max)))


def _added(_: RealCall, parts: Sequence[Tensor], nothing: Tensor) -> Tensor:
    return sum(parts, torch.zeros_like(nothing)) - (len(parts) - 1) * nothing


ADDED = Merge(_added)
_MERGES: Registry[Callable[[], Merge]] = Registry("merge")
merges = _MERGES.register


def merge_of(target: Any) -> Merge:
    """Return how an operator's shards are merged; by addition, where nothing else is known."""
    found = _MERGES.of(target)
    return found() if found else ADDED


@merges(nn.CrossEntropyLoss, F.cross_entropy, atens="cross_entropy_loss")
def losses() -> Merge:
    """Predictions without scores have one loss, whatever their class."""
    return Merge(_added, integers=False)


@merges(ops="prod")
def products() -> Merge:
    """Absent factors are one."""
    return Merge(lambda _, parts, nothing: math.prod(parts, start=torch.ones_like(nothing)), neutral=1.0)


@merges(ops="logsumexp")
def log_sums() -> Merge:
    """Absent terms have the logarithm of zero."""
    return Merge(lambda _, parts, nothing: torch.stack(list(parts)).logsumexp(0), neutral=-math.inf)


@merges(torch.functional.norm, torch.linalg.norm, torch.linalg.vector_norm, methods="norm")
def norms() -> Merge:
    """The p-norm of p-norms."""

    def combine(call: RealCall, parts: Sequence[Tensor], nothing: Tensor) -> Tensor:
        order = call.option("p", 1, call.kwargs.get("ord", 2))
        return torch.linalg.vector_norm(torch.stack(list(parts)), 2 if order in (None, "fro") else order, dim=0)

    return Merge(combine)


@merges(ops="var std var_mean std_mean")
def moments() -> Merge:
    """Sums and sums of squares; the count is known."""

    def sums(call: RealCall) -> tuple[Tensor, Tensor]:
        operand = call.args[0]
        return operand.sum(call.dims(), keepdim=True), operand.square().sum(call.dims(), keepdim=True)

    def combine(call: RealCall, parts: Sequence[Any], nothing: Any) -> Any:
        operand, dims = call.args[0], call.dims()
        count = math.prod(operand.shape[dim] for dim in dims)
        mean = sum(first for first, _ in parts) / count
        correction = call.option("correction", 9, int(bool(call.option("unbiased", 2, True))))
        variance = (sum(second for _, second in parts) - count * mean.square()) / (count - correction)
        name = operator_name(call.target)
        spread = variance.sqrt() if name.startswith("std") else variance
        keep = call.option("keepdim", 3, False)
        found = [one if keep else one.squeeze(dims) for one in (spread, mean)]
        return tuple(found) if name.endswith("_mean") else found[0]

    return Merge(combine, partial=sums)


@merges(ops="any")
def some() -> Merge:
    """Whether any shard has one."""
    return Merge(lambda _, parts, nothing: torch.stack(list(parts)).any(0))


@merges(ops="all")
def every() -> Merge:
    """Whether all shards do."""
    return Merge(lambda _, parts, nothing: torch.stack(list(parts)).all(0), neutral=1.0)


@merges(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, F.max_pool1d, F.max_pool2d, F.max_pool3d, ops="amax max")
@merges(atens="max_pool1d max_pool2d max_pool3d")
def largest() -> Merge:
    """The largest of the largest, with its index where the call has one."""
    return Merge(_extreme(torch.argmax), neutral=-math.inf)


@merges(ops="amin min")
def smallest() -> Merge:
    """The smallest of the smallest, likewise."""
    return Merge(_extreme(torch.argmin), neutral=math.inf)


@merges(ops="argmax")
def place_of_largest() -> Merge:
    """The shard's place whose value is the largest."""
    return Merge(_places(torch.argmax), neutral=-math.inf)


@merges(ops="argmin")
def place_of_smallest() -> Merge:
    """The shard's place whose value is the smallest."""
    return Merge(_places(torch.argmin), neutral=math.inf)


def _extreme(best: Callable[..., Tensor]) -> Combine:
    def combine(call: RealCall, parts: Sequence[Any], nothing: Any) -> Any:
        if isinstance(nothing, Tensor):
            return _picked(parts, best(torch.stack(list(parts)), dim=0))
        winner = best(torch.stack([values for values, _ in parts]), dim=0)
        return tuple(_picked(list(each), winner) for each in zip(*parts, strict=True))

    return combine


def _places(best: Callable[..., Tensor]) -> Combine:
    def combine(call: RealCall, parts: Sequence[Tensor], nothing: Tensor) -> Tensor:
        dim, operand, keep = call.option("dim", 1), call.args[0], call.option("keepdim", 2, False)
        if dim is None:
            values = [operand.flatten()[place] for place in parts]
        else:
            kept = [place if keep else place.unsqueeze(dim) for place in parts]
            found = [operand.gather(dim, place) for place in kept]
            values = found if keep else [value.squeeze(dim) for value in found]
        return _picked(parts, best(torch.stack(values), dim=0))

    return combine


def _picked(parts: Sequence[Tensor], winner: Tensor) -> Tensor:
    return torch.stack(list(parts)).gather(0, winner.unsqueeze(0)).squeeze(0)


@merges(F.scaled_dot_product_attention, atens="scaled_dot_product_attention")
def attention() -> Merge:
    """Scores add up; softmax and the values' weights follow when they are complete."""

    def scores(call: RealCall) -> Tensor:
        query, key = call.option("query", 0), call.option("key", 1)
        scale = call.option("scale", 6) or query.shape[-1] ** -0.5
        return query @ _repeated(key, query).transpose(-2, -1) * scale

    def combine(call: RealCall, parts: Sequence[Tensor], nothing: Tensor) -> Tensor:
        total, value, mask = sum(parts, torch.zeros_like(nothing)), call.option("value", 2), call.option("attn_mask", 3)
        if call.option("is_causal", 5, False):
            mask = torch.ones(total.shape[-2:], dtype=torch.bool, device=total.device).tril()
        if mask is not None:
            total = total.masked_fill(~mask, -math.inf) if mask.dtype is torch.bool else total + mask
        return total.softmax(-1) @ _repeated(value, total)

    def whole(call: RealCall) -> Tensor:
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
        options = dict(zip(names, call.args, strict=False)) | dict(call.kwargs)
        return F.scaled_dot_product_attention(**{**options, "dropout_p": 0.0})

    return Merge(combine, partial=scores, whole=whole)


def _repeated(shared: Tensor, like: Tensor) -> Tensor:
    """Repeat the heads of keys or values that several heads of queries share."""
    groups = like.shape[-3] // shared.shape[-3] if like.dim() > 2 else 1
    return shared.repeat_interleave(groups, -3) if groups > 1 else shared
