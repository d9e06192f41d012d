"""How axes go through windows that slide over them: convolutions and pools."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from bwsk_fx.rules.axis import AxisCall, Behaviour, Claim, claims, renumbered
from bwsk_fx.rules.axis_table import Axis
from bwsk_fx.rules.axis_view import split
from bwsk_fx.rules.windows import each

_HALO = "windows reach into neighbouring shards (a halo) or over the border"


@dataclass(frozen=True)
class Sliding:
    """The windows of a call over the last dimensions of its operand.

    Attributes:
        kernel: Their sizes.
        inside: What the call does within a window: REDUCE where partial results add up, JOIN where extremes merge.
        stride: Per dimension, as all that follow.
        padding: Elements around the operand; those of `"same"` reach over the border.
        dilation: The distance of two elements of a window.
    """

    kernel: tuple[int, ...]
    inside: Behaviour
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    @classmethod
    def of(
        cls, call: AxisCall, kernel: Sequence[int], inside: Behaviour, *, stride: int, padding: int, dilation: int
    ) -> Sliding:
        """Read the options of a call, given the places of its arguments."""
        count = len(kernel)
        steps = call.option("stride", stride)
        if steps in (None, (), []):
            # A pool's windows lie side by side unless it says otherwise; a convolution's lie one element apart.
            steps = tuple(kernel) if inside is Behaviour.JOIN or not _is_convolution(call) else 1
        around = call.option("padding", padding, 0)
        pads = tuple(kernel) if around == "same" else each(0 if around == "valid" else around, count)
        return cls(tuple(kernel), inside, each(steps, count), pads, each(call.option("dilation", dilation, 1), count))

    def moved(self, call: AxisCall, said: list[Claim]) -> list[Axis | None]:
        """Return the axes of the result's positions, and say what happens to those of the operand."""
        count = len(self.kernel)
        return [self._position(call, place - count, place, said) for place in range(count)]

    def _position(self, call: AxisCall, dim: int, place: int, said: list[Claim]) -> Axis | None:
        axis, before, after = call.operand.layout[dim], call.operand.shape[dim], call.shape[dim]
        if axis is None:
            return call.axes.fresh([after])[0]
        plain = self.dilation[place] == 1 and not self.padding[place]
        kernel, stride = self.kernel[place], self.stride[place]
        if plain and kernel == stride == 1:
            said += claims([axis], Behaviour.MAP, "windows are single positions")
            return axis
        if plain and kernel == 1:
            return self._picked(call, axis, said)
        if plain and after == 1 and kernel == before:
            said += claims(
                [axis], self.inside, "one window covers the axis, and shards yield partial results", produced=False
            )
            return None
        if plain and kernel == stride and after * stride == before:
            return self._tiled(call, axis, (before, after, stride), said)
        said += claims([axis], Behaviour.BARRIER, _HALO, produced=False)
        (moved,) = call.axes.fresh([after])
        call.axes.call(moved, call.axes.name(axis))
        said += claims([moved], Behaviour.BARRIER, _HALO, consumed=False)
        return moved

    def _picked(self, call: AxisCall, axis: Axis, said: list[Claim]) -> Axis:
        """Keep one position per step, which a single shard has."""
        made = call.axes.derived(call.axes.name(axis), [axis])
        why = "some of its positions are kept, under new indices"
        said += renumbered(axis, made, why)
        return made

    def _tiled(self, call: AxisCall, axis: Axis, sizes: tuple[int, int, int], said: list[Claim]) -> Axis | None:
        """Take positions apart into windows and what is within one."""
        before, after, kernel = sizes
        name = call.axes.name(axis)
        if not call.axes.parts(axis):
            parts = (call.axes.new(name, origins=[axis]), after), (call.axes.new("window"), kernel)
            call.axes.decompose(axis, parts)
        (window, inside), _ = split(call.axes, axis, before, (after, kernel))
        call.axes.call(window, name)
        said += claims([window], Behaviour.MAP, "windows tile the axis, so whole windows yield whole results")
        why = "each part of a window yields a partial result"
        said += claims([inside], self.inside, why, role="window", produced=False)
        return window


def _is_convolution(call: AxisCall) -> bool:
    return hasattr(call.target, "weight") if isinstance(call.target, nn.Module) else len(call.inputs) > 1
