"""Curves as inline SVG, coloured by the page's style sheet so that they follow its light and dark schemes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from bwsk_fx.measure import Timeline
from bwsk_fx.planning.allocate import Totals
from bwsk_fx.planning.options import PlanOptions, show_bytes
from bwsk_fx.report.frontier import Frontier

_WIDTH, _HEIGHT = 720, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 76, 24, 16, 44
# More points than pixels would only make the file larger.
_POINTS = 700
_TICKS = 5


@dataclass(frozen=True)
class _Scale:
    """From numbers to places in the picture; both axes start at zero or below."""

    left: float
    right: float
    top: float

    def x(self, value: float) -> float:
        """Place a number on the horizontal axis."""
        return _LEFT + (value - self.left) / ((self.right - self.left) or 1) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        """Place a number on the vertical axis."""
        return _HEIGHT - _BOTTOM - value / (self.top or 1) * (_HEIGHT - _TOP - _BOTTOM)


def timeline_chart(conventional: Timeline, reversible: Timeline) -> str:
    """Draw live bytes over a step, both ways of running it; each is as wide as the picture."""
    curves = {"conventional": conventional, "reversible": reversible}
    scale = _Scale(0, 1, _above(max(map(_peak, curves.values()))))
    parts = [*_grid(scale), _label(_WIDTH / 2, _HEIGHT - 8, "progress of the step: forward pass, then backward pass")]
    for name, curve in curves.items():
        points = [(scale.x(share), scale.y(live)) for share, live in _thinned(curve)]
        parts.append(f'<polyline class="curve {name}" points="{_points(points)}"/>')
    for place, (name, curve) in enumerate(curves.items()):
        turn = curve.forward_events / (len(curve.live_bytes) or 1)
        x = f"{scale.x(turn):.1f}"
        parts.append(f'<line class="turn {name}" x1="{x}" x2="{x}" y1="{_TOP}" y2="{scale.y(0):.1f}"/>')
        words = f"{name}: peak {show_bytes(_peak(curve))}"
        parts += _key(name, words, place)
    return _svg(parts, "Live bytes over a training step, conventional and reversible")


def frontier_chart(frontier: Frontier, chosen: Totals, options: PlanOptions) -> str:
    """Draw what budgets buy: kept bytes over modelled extra time, with the chosen plan and eager execution."""
    points = [(point.totals.overhead, point.totals.kept_bytes, f"budget {point.budget:g}") for point in frontier.points]
    mine = (chosen.overhead, chosen.kept_bytes, f"chosen: {options}")
    eager = (0.0, chosen.conventional_bytes, "conventional")
    times = [time for time, _, _ in (*points, mine, eager)]
    margin = 0.08 * (max(times) - min(times) or 0.1)
    scale = _Scale(min(times) - margin, max(times) + margin, _above(max(size for _, size, _ in (*points, mine, eager))))
    parts = [
        *_grid(scale),
        *_times(scale),
        _label(_WIDTH / 2, _HEIGHT - 8, "modelled time beyond the conventional step"),
    ]
    line = [(scale.x(time), scale.y(size)) for time, size, _ in points]
    parts.append(f'<polyline class="curve reversible" points="{_points(line)}"/>')
    parts += [_dot(scale, point, "reversible", 4) for point in points]
    parts += [_dot(scale, eager, "conventional", 5), _dot(scale, mine, "chosen", 8)]
    entries = (("conventional", eager), ("chosen", mine))
    for place, (name, (_, size, words)) in enumerate(entries):
        parts += _key(name, f"{words}, keeps {show_bytes(size)}", place)
    return _svg(parts, "Kept bytes over modelled extra time, for several budgets")


def _peak(curve: Timeline) -> int:
    return max(curve.live_bytes, default=0)


def _thinned(curve: Timeline) -> Iterable[tuple[float, int]]:
    """The highest point of each stretch of events, so that the peak stays, by its share of the step."""
    live = curve.live_bytes
    return [(place / len(live), live[place]) for place in curve.highest(_POINTS)]


def _above(size: float) -> float:
    """Return the smallest round number of bytes above a size: 1, 2 or 5 of a power of two times five ticks."""
    step = max(size / _TICKS, 1)
    unit = 1024.0 ** math.floor(math.log(step, 1024))
    power = 10 ** math.floor(math.log10(step / unit))
    nice = next(factor * power * unit for factor in (1, 2, 2.5, 5, 10, 20) if factor * power * unit >= step)
    return nice * _TICKS


def _grid(scale: _Scale) -> list[str]:
    parts = []
    for tick in range(_TICKS + 1):
        size = scale.top * tick / _TICKS
        y = scale.y(size)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{_short(size)}</text>')
    return parts


def _times(scale: _Scale) -> list[str]:
    """Ticks at round percentages."""
    span = (scale.right - scale.left) / _TICKS
    step = next(step for step in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 10.0, math.inf) if step >= span)
    ticks = range(math.ceil(scale.left / step), math.floor(scale.right / step) + 1)
    return [
        f'<text class="tick" x="{scale.x(tick * step):.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">'
        f"{tick * step:+.0%}</text>"
        for tick in ticks
    ]


def _short(size: float) -> str:
    number, _, unit = show_bytes(size).partition(" ")
    return f"{float(number):g} {unit}"


def _label(x: float, y: float, words: str) -> str:
    return f'<text class="tick" x="{x:.0f}" y="{y:.0f}" text-anchor="middle">{escape(words)}</text>'


def _key(name: str, words: str, place: int) -> list[str]:
    """One line of the legend, at the upper right, where curves are low."""
    y = _TOP + 12 + 18 * place
    return [
        f'<text class="key" x="{_WIDTH - _RIGHT - 22}" y="{y}" text-anchor="end">{escape(words)}</text>',
        f'<circle class="dot {name}" cx="{_WIDTH - _RIGHT - 9}" cy="{y - 4}" r="5"/>',
    ]


def _dot(scale: _Scale, point: tuple[float, int, str], name: str, radius: int) -> str:
    time, size, words = point
    title = escape(f"{words}: {time:+.1%} time, {show_bytes(size)} kept")
    place = f'cx="{scale.x(time):.1f}" cy="{scale.y(size):.1f}" r="{radius}"'
    return f'<circle class="dot {name}" {place}><title>{title}</title></circle>'


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _svg(parts: Sequence[str], title: str) -> str:
    head = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}" xmlns="http://www.w3.org/2000/svg">'
    return head + f"<title>{escape(title)}</title>" + "".join(parts) + "</svg>"
