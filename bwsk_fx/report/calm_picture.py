"""The CALM report as one picture: a row per axis, a column per node, coloured by what the node does on the axis.

A bar is a partition: nodes that run on a shard without waiting. Where a node waits for a whole axis, a line crosses the
row. Repeated blocks are drawn once. The colours are those of Okabe and Ito (2008, "Color Universal Design"), which
people of all kinds of colour vision can tell apart; behaviours other than MAP carry a letter, too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from itertools import groupby

from bwsk_fx.blocks import section_and_index, span
from bwsk_fx.report.calm import AxisReport, CalmReport, NodeReport, strictest
from bwsk_fx.rules.axis import Behaviour

COLOURS: Mapping[Behaviour, str] = {
    Behaviour.MAP: "#56b4e9",
    Behaviour.JOIN: "#009e73",
    Behaviour.REDUCE: "#e69f00",
    Behaviour.BARRIER: "#d55e00",
}
_LETTERS: Mapping[Behaviour, str] = {
    Behaviour.MAP: "",
    Behaviour.JOIN: "J",
    Behaviour.REDUCE: "Σ",
    Behaviour.BARRIER: "B",
}
_MEANINGS: Mapping[Behaviour, str] = {
    Behaviour.MAP: "runs on each shard alone",
    Behaviour.JOIN: "merges shards, in any order",
    Behaviour.REDUCE: "shards are summed",
    Behaviour.BARRIER: "waits for the whole axis",
}
_COLUMN, _LANE, _CELL = 20, 18, 12
_TOP, _LEFT, _RIGHT, _LABELS = 80, 150, 24, 190
_LONGEST = 28
_INK, _FAINT, _STRIPE = "#222222", "#767676", "#f2f2f2"
_FORBIDDEN = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def picture(report: CalmReport) -> str:
    """Return the report as a self-contained SVG.

    Args:
        report: What `analyze_calm` returned.
    """
    return _Picture(report, _Columns.of(report.nodes)).svg()


@dataclass(frozen=True)
class _Section:
    """Columns under one heading.

    Attributes:
        title: The heading; empty for none.
        nodes: What is drawn.
        first: Where a folded section's first and last repetition are, by node name, as places in `nodes`.
        last: The same for the last one.
    """

    title: str
    nodes: tuple[NodeReport, ...]
    first: Mapping[str, int]
    last: Mapping[str, int]


@dataclass(frozen=True)
class _Columns:
    """Which nodes are drawn, and in which column."""

    sections: tuple[_Section, ...]

    @classmethod
    def of(cls, nodes: Sequence[NodeReport]) -> _Columns:
        """Fold equal neighbouring blocks into one."""
        groups = [(path, tuple(group)) for path, group in groupby(nodes, key=lambda node: node.block)]
        sections: list[_Section] = []
        while groups:
            run = _run(groups)
            path, shown = groups[0]
            title = path if run == 1 else f"{span(*_spanned([path for path, _ in groups[:run]]))} (× {run})"
            places = [{node.node: place for place, node in enumerate(group)} for _, group in groups[:run]]
            sections.append(_Section(title, shown, places[0], places[-1]))
            del groups[:run]
        return cls(tuple(sections))

    @cached_property
    def shown(self) -> tuple[NodeReport, ...]:
        """The nodes that are drawn, in order."""
        return tuple(node for section in self.sections for node in section.nodes)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The first column of each section."""
        starts = [0]
        for section in self.sections:
            starts.append(starts[-1] + len(section.nodes))
        return tuple(starts[:-1])

    def of_partition(self, partition: Iterable[str]) -> list[frozenset[int]]:
        """Return the columns of a partition: as the first repetitions have it, and as the last ones do, if apart."""
        names = set(partition)
        found = []
        for which in ("first", "last"):
            columns: set[int] = set()
            for start, section in zip(self.starts, self.sections, strict=True):
                columns.update(start + place for name, place in getattr(section, which).items() if name in names)
            found.append(frozenset(columns))
        first, last = found
        return [first | last] if first & last else [columns for columns in found if columns]


def _run(groups: Sequence[tuple[str, Sequence[NodeReport]]]) -> int:
    """Return how many equal neighbouring blocks of one container there are at the front."""
    path, first = groups[0]
    if not path:
        return 1
    section, shape = section_and_index(path)[0], [(node.target, node.facts) for node in first]
    run = 1
    for other, nodes in groups[1:]:
        same = other and section_and_index(other)[0] == section
        if not same or [(node.target, node.facts) for node in nodes] != shape:
            break
        run += 1
    return run


def _spanned(paths: Sequence[str]) -> tuple[str, list[int]]:
    return section_and_index(paths[0])[0], [section_and_index(path)[1] for path in paths]


@dataclass(frozen=True)
class _Picture:
    report: CalmReport
    columns: _Columns

    def svg(self) -> str:
        """Return the whole document."""
        rows, height = self._rows()
        width = max(_LEFT + _COLUMN * len(self.columns.shown) + _RIGHT, 900)
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height + _LABELS}" '
            f'viewBox="0 0 {width} {height + _LABELS}" font-family="Helvetica, Arial, sans-serif" font-size="11" '
            'role="img">',
            "<title>CALM partitions by axis</title>",
            f'<rect width="{width}" height="{height + _LABELS}" fill="#ffffff"/>',
            *self._legend(),
            *self._headings(height),
            *rows,
            *self._names(height),
            "</svg>",
        ]
        return "\n".join(parts) + "\n"

    def _legend(self) -> Iterator[str]:
        x = 12
        for behaviour, colour in COLOURS.items():
            yield _rect(x, 10, _CELL, _CELL, colour) + _letter(behaviour, x, 10)
            words = f"{behaviour}: {_MEANINGS[behaviour]}"
            yield _text(x + _CELL + 5, 20, words)
            x += _CELL + 12 + round(6.8 * len(words))

        yield _text(12, 42, "A bar is a partition: its nodes run on shards of the axis and wait for no other shard.")

    def _headings(self, bottom: int) -> Iterator[str]:
        for start, section in zip(self.columns.starts, self.columns.sections, strict=True):
            if section.title:
                x, width = _LEFT + _COLUMN * start, _COLUMN * len(section.nodes)
                yield f'<rect x="{x}" y="{_TOP - 24}" width="{width}" height="{bottom - _TOP + 24}" fill="{_STRIPE}"/>'
                yield _text(x + 4, _TOP - 12, _shortened(section.title, width // 6), weight="bold")

    def _rows(self) -> tuple[list[str], int]:
        parts, y = [], _TOP
        for axis in self.report.axes:
            lanes = _lanes(self._partitions(axis))
            height = _LANE * max(len(lanes), 1) + 8
            parts.append(_text(_LEFT - 10, y + height / 2 + 4, axis.axis, anchor="end", weight="bold"))
            parts.append(f'<line x1="12" y1="{y + height}" x2="{self._right}" y2="{y + height}" stroke="#d0d0d0"/>')
            for lane, partitions in enumerate(lanes):
                for partition in partitions:
                    parts += self._partition(axis.axis, sorted(partition), y + 4 + _LANE * lane)
            parts += self._barriers(axis, y, height)
            y += height
        return parts, y

    @property
    def _right(self) -> int:
        return _LEFT + _COLUMN * len(self.columns.shown)

    def _partitions(self, axis: AxisReport) -> list[frozenset[int]]:
        """Return the columns of each partition; what another one holds already is left out."""
        found = dict.fromkeys(columns for part in axis.partitions for columns in self.columns.of_partition(part))
        kept = [one for one in found if not any(one < other for other in found)]
        # What only opens a partition would be drawn as MAP, though it sums up what comes before it, too.
        closing = {column for one in kept for column in one if len(one) == 1 or column != min(one)}
        sums = {point.node for point in axis.reduces}
        alone = (frozenset({column}) for column, node in enumerate(self.columns.shown) if node.node in sums)
        return sorted([*kept, *(one for one in alone if closing.isdisjoint(one))], key=lambda one: (min(one), len(one)))

    def _barriers(self, axis: AxisReport, y: int, height: int) -> Iterator[str]:
        waiting = {point.node for point in axis.barriers}
        for column, node in enumerate(self.columns.shown):
            if node.node in waiting:
                x, colour = _LEFT + _COLUMN * column + _COLUMN / 2, COLOURS[Behaviour.BARRIER]
                yield f'<line x1="{x}" y1="{y}" x2="{x}" y2="{y + height}" stroke="{colour}" stroke-width="2"/>'
                yield self._cell(axis.axis, column, y + (height - _CELL) / 2, Behaviour.BARRIER)

    def _partition(self, axis: str, columns: Sequence[int], y: float) -> Iterator[str]:
        x1, x2 = (_LEFT + _COLUMN * column + _COLUMN / 2 for column in (columns[0], columns[-1]))
        middle = y + _LANE / 2 - 1
        yield f'<line x1="{x1}" y1="{middle}" x2="{x2}" y2="{middle}" stroke="{_FAINT}" stroke-width="2"/>'
        for place, column in enumerate(columns):
            behaviours = {fact.behaviour for fact in self.columns.shown[column].facts if fact.axis == axis}
            # A node that sums up one partition may open the next, which it maps into.
            opens = place == 0 and len(columns) > 1
            free = next((each for each in COLOURS if each in behaviours and each.coordination_free), None)
            shown = free if opens and free else strictest(self.columns.shown[column].facts)[axis]
            yield self._cell(axis, column, middle - _CELL / 2, shown)

    def _cell(self, axis: str, column: int, y: float, behaviour: Behaviour) -> str:
        node, x = self.columns.shown[column], _LEFT + _COLUMN * column + (_COLUMN - _CELL) / 2
        reasons = dict.fromkeys(fact.reason for fact in node.facts if fact.axis == axis and fact.behaviour is behaviour)
        title = f"<title>{_safe(f'{node.node} ({node.target}), {axis}: {behaviour}, ' + '; '.join(reasons))}</title>"
        return f"<g>{title}{_rect(x, y, _CELL, _CELL, COLOURS[behaviour])}{_letter(behaviour, x, y)}</g>"

    def _names(self, y: int) -> Iterator[str]:
        for column, node in enumerate(self.columns.shown):
            x = _LEFT + _COLUMN * column + _COLUMN / 2 + 4
            prefix = f"{node.block.replace('.', '_')}_" if node.block else ""
            words = _safe(_shortened(node.node.removeprefix(prefix), _LONGEST))
            turned = f'transform="rotate(-60 {x} {y + 14})"'
            yield f'<text x="{x}" y="{y + 14}" text-anchor="end" fill="{_INK}" {turned}>{words}</text>'


def _lanes(partitions: Iterable[frozenset[int]]) -> list[list[frozenset[int]]]:
    """Deal partitions out to as few lanes as it takes for none to overlap another."""
    lanes: list[list[frozenset[int]]] = []
    for partition in partitions:
        lane = next((lane for lane in lanes if max(lane[-1]) < min(partition)), None)
        if lane is None:
            lanes.append([partition])
        else:
            lane.append(partition)
    return lanes


def _safe(words: str) -> str:
    """Return words without what XML forbids or reads as markup."""
    return escape(_FORBIDDEN.sub("\ufffd", words), quote=True)


def _shortened(words: str, longest: int) -> str:
    return words if len(words) <= longest else words[: max(longest - 1, 1)] + "…"


def _rect(x: float, y: float, width: float, height: float, colour: str) -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="2" fill="{colour}"/>'


def _letter(behaviour: Behaviour, x: float, y: float) -> str:
    letter = _LETTERS[behaviour]
    place = f'x="{x + _CELL / 2}" y="{y + _CELL - 2.5}"'
    return f'<text {place} text-anchor="middle" font-size="10" fill="#000000">{letter}</text>' if letter else ""


def _text(x: float, y: float, words: str, anchor: str = "start", weight: str = "normal") -> str:
    place = f'x="{x}" y="{y}" text-anchor="{anchor}" font-weight="{weight}"'
    return f'<text {place} fill="{_INK}">{_safe(words)}</text>'
