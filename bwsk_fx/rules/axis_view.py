"""How axes go through a reshape: which dimensions stay, which are split, which merge, and which are lost.

Sizes are factorised from the front: the smallest groups of dimensions with equal products belong together. A group of
one and one is the same axis, one and several a split, several and one a merge. Anything else mixes axes, unless the
dimensions are made of axes (an earlier merge) that fall into the new ones whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bwsk_fx.rules.axis import AxisCall, Behaviour, Claim, Effect, claims
from bwsk_fx.rules.axis_table import Axis, AxisTable, Extent, Layout, Strength

Sized = tuple[Axis, Extent]
Group = tuple[list[int], list[int]]

_SPATIAL = frozenset({"depth", "height", "width"})
_FEATURES = frozenset({"feature", "head", "channel", "group", ""})


def reshape(call: AxisCall) -> Effect:
    """Return the effect of any call that keeps the elements' order and changes the sizes."""
    return _Reshape(call.axes, call.operand.layout, call.operand.shape, call.shape).effect()


def split(axes: AxisTable, axis: Axis, size: Extent, sizes: Sequence[Extent]) -> tuple[Layout, tuple[Claim, ...]]:
    """Take an axis of a size apart, from the outermost part to the innermost; parts that are known are found again."""
    effect = _Reshape(axes, (axis,), (size,), tuple(sizes)).effect()
    return effect.layouts[0], effect.claims


@dataclass
class _Reshape:
    axes: AxisTable
    layout: Layout
    before: tuple[Extent, ...]
    after: tuple[Extent, ...]

    def effect(self) -> Effect:
        out: list[Axis | None] = [None] * len(self.after)
        said: list[Claim] = []
        for ins, outs in _groups(self.before, self.after):
            sources = [(axis, self.before[dim]) for dim in ins if (axis := self.layout[dim]) is not None]
            made, group_claims = self._group(sources, [self.after[dim] for dim in outs])
            said += group_claims
            for dim, axis in zip(outs, made, strict=True):
                out[dim] = axis
        self._name_tokens(out)
        return Effect(tuple(said), (tuple(out),))

    def _group(self, sources: list[Sized], sizes: list[Extent]) -> tuple[Sequence[Axis | None], list[Claim]]:
        if len(sources) == len(sizes) == 1:
            axis = sources[0][0]
            return [axis], claims([axis], Behaviour.MAP, "the axis keeps its place and size")
        made = self._made(sources, sizes)
        if made is None:
            lost = claims([axis for axis, _ in sources], Behaviour.BARRIER, _MIXES, produced=False)
            return self.axes.fresh(sizes), lost
        return made, self._moved([axis for axis, _ in sources], made)

    def _made(self, sources: list[Sized], sizes: list[Extent]) -> list[Axis] | None:
        for parts in _expansions(self.axes, sources):
            runs = _runs(parts, sizes)
            if runs is not None:
                return [run[0][0] if len(run) == 1 else _merged(self.axes, run) for run in runs]
        return _split(self.axes, sources[0][0], sizes) if len(sources) == 1 else None

    def _moved(self, sources: Sequence[Axis], made: Sequence[Axis | None]) -> list[Claim]:
        before, after = self.axes.atoms(sources), self.axes.atoms(made)
        reason = f"a new index for the same facts: {self._words(sources)} becomes {self._words(made)}"
        kept = claims((axis for axis in before if axis in after), Behaviour.MAP, reason)
        gone, born = (axis for axis in before if axis not in after), (axis for axis in after if axis not in before)
        kept += claims(gone, Behaviour.MAP, reason, role="operand", produced=False)
        return kept + claims(born, Behaviour.MAP, reason, role="result", consumed=False)

    def _words(self, layout: Sequence[Axis | None]) -> str:
        return " × ".join(self.axes.name(axis) or "an axis" for axis in self.axes.atoms(layout))

    def _name_tokens(self, out: Sequence[Axis | None]) -> None:
        """AxisCall channels features once the positions that they belong to are tokens."""
        born = [axis for axis in out if axis is not None and _is_made_of(self.axes, axis, _SPATIAL)]
        for axis in out if born else ():
            if axis is not None and self.axes.name(axis) == "channel":
                self.axes.call(axis, "feature", Strength.CONTEXT)


_MIXES = "the reshape mixes axes: no axis of the result follows this one"


def _groups(before: Sequence[Extent], after: Sequence[Extent]) -> Iterator[Group]:
    """Yield the smallest groups of dimensions whose sizes have equal products; sizes of one belong to none."""
    left = [dim for dim, size in enumerate(before) if size != 1]
    right = [dim for dim, size in enumerate(after) if size != 1]
    while left and right:
        ins, outs = [left.pop(0)], [right.pop(0)]
        product, target = before[ins[0]], after[outs[0]]
        while (order := _compare(product, target)) and (left if order < 0 else right):
            if order < 0:
                ins.append(left.pop(0))
                product = product * before[ins[-1]]
            else:
                outs.append(right.pop(0))
                target = target * after[outs[-1]]
        yield (ins, outs) if not order else (ins + left, outs + right)
        if order:
            return


def _compare(one: Extent, other: Extent) -> int:
    """Order two sizes, symbolic ones by divisibility."""
    if isinstance(one, int) and isinstance(other, int):
        return (one > other) - (one < other)
    ratio = one / other
    if ratio.is_number:
        return bool(ratio > 1) - bool(ratio < 1)
    return 1 if ratio.as_numer_denom()[0].free_symbols else -1


def _expansions(axes: AxisTable, sources: Sequence[Sized]) -> Iterator[list[Sized]]:
    """Yield the dimensions themselves, then what they are made of, level by level."""
    level = list(sources)
    while True:
        yield level
        deeper = [part for axis, size in level for part in (axes.parts(axis) or ((axis, size),))]
        if len(deeper) == len(level):
            return
        level = deeper


def _runs(parts: Sequence[Sized], sizes: Sequence[Extent]) -> list[list[Sized]] | None:
    """Deal the parts out to the sizes, whole and in order."""
    rest, runs = list(parts), []
    for size in sizes:
        run: list[Sized] = []
        while rest and _compare(math.prod(part for _, part in run), size) < 0:
            run.append(rest.pop(0))
        if _compare(math.prod(part for _, part in run), size):
            return None
        runs.append(run)
    return runs if not rest else None


def _merged(axes: AxisTable, run: Sequence[Sized]) -> Axis:
    names = {axes.name(axis) for axis, _ in run}
    name = "token" if names <= _SPATIAL else "feature" if names <= _FEATURES and names != {""} else ""
    return axes.new(name, parts=run)


def _split(axes: AxisTable, axis: Axis, sizes: Sequence[Extent]) -> list[Axis]:
    parts = [
        (axes.new(name), size) for name, size in zip(_split_names(axes.name(axis), len(sizes)), sizes, strict=True)
    ]
    axes.decompose(axis, parts)
    return [part for part, _ in parts]


def _split_names(name: str, count: int) -> list[str]:
    """Name the parts of a split axis, outermost first."""
    outer = {"feature": "head", "batch": "batch"}.get(name, "window" if name in _SPATIAL | {"token"} else "group")
    inner = "group" if name == "batch" else name
    if not name:
        return [""] * count
    return [*["group"] * (count - 2), outer, inner]


def _is_made_of(axes: AxisTable, axis: Axis, names: frozenset[str]) -> bool:
    parts = axes.parts(axis)
    return bool(parts) and {axes.name(part) for part, _ in parts} <= names
