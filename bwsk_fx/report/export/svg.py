"""Typed graphs as SVG: a box per module, coloured by the verdicts of its nodes, from the inputs down to the output."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path

import networkx as nx
from torch import fx

from bwsk_fx.arguments import require_graph
from bwsk_fx.report.colours import INK, LABEL_COLOURS, UNCOUNTED
from bwsk_fx.report.export.folding import Box, Folded, fold
from bwsk_fx.report.files import write_text
from bwsk_fx.report.records import records
from bwsk_fx.verdict import Label

DEPTH = 3
_WIDTH, _HEIGHT, _GAP_X, _GAP_Y, _MARGIN, _LEGEND = 250, 52, 40, 26, 24, 34
_BAR, _LONGEST = 8, 36
_LINE = "#767676"
_FORBIDDEN = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_MEANINGS = {Label.S: "preserves", Label.K: "erases", Label.GRAY: "unknown"}


def to_svg(graph: fx.GraphModule, depth: int = DEPTH) -> str:
    """Return a typed graph as a self-contained SVG; Graphviz is not needed.

    Args:
        graph: A graph that `type_nodes` has labelled.
        depth: One box per run of nodes that share so many parts of their module's path.

    Raises:
        RuleError: The graph is not typed, or the depth is negative.
    """
    return _Drawing(fold(records(graph), depth)).svg()


def save_svg(graph: fx.GraphModule, path: str | Path, depth: int = DEPTH) -> None:
    """Write what `to_svg` returns.

    Raises:
        BwskError: As for `to_svg`, or the file cannot be written.
    """
    require_graph(graph)
    write_text(path, to_svg(graph, depth))


@dataclass(frozen=True)
class _Drawing:
    folded: Folded

    def svg(self) -> str:
        """Return the whole document."""
        columns = max((len(row) for row in self._rows), default=1)
        # Lines that skip rows go around the boxes, on the right.
        width = 2 * _MARGIN + max(columns * (_WIDTH + _GAP_X), 420) + 2 * _GAP_X
        height = 2 * _MARGIN + _LEGEND + len(self._rows) * (_HEIGHT + _GAP_Y)
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
            'font-family="Helvetica, Arial, sans-serif" font-size="11" role="img">',
            "<title>Modules by what they preserve and erase</title>",
            f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
            *_legend(),
            *(self._edge(source, target) for source, target in self.folded.edges),
            *(part for place, box in enumerate(self.folded.boxes) for part in _box(box, *self._corners[place])),
            "</svg>",
        ]
        return "\n".join(parts) + "\n"

    @cached_property
    def _rows(self) -> list[list[int]]:
        """The boxes of each row: all below those that they read, inputs right above their first reader."""
        network = nx.DiGraph(self.folded.edges)
        network.add_nodes_from(range(len(self.folded.boxes)))
        rank: dict[int, int] = {}
        for place in nx.topological_sort(network):
            rank[place] = max((rank[source] + 1 for source in network.predecessors(place)), default=0)
        for place in network.nodes:
            readers = [rank[target] for target in network.successors(place)]
            if readers and not network.in_degree(place):
                rank[place] = min(readers) - 1
        rows: list[list[int]] = [[] for _ in range(max(rank.values(), default=-1) + 1)]
        for place in sorted(rank):
            rows[rank[place]].append(place)
        return [self._ordered(row, network) for row in rows]

    @staticmethod
    def _ordered(row: list[int], network: nx.DiGraph) -> list[int]:
        """Put what goes on for longest first, so that it stays in one column."""
        return sorted(row, key=lambda place: (-network.in_degree(place), place))

    @cached_property
    def _corners(self) -> dict[int, tuple[int, int]]:
        """The upper left corner of each box."""
        return {
            place: (_MARGIN + column * (_WIDTH + _GAP_X), _MARGIN + _LEGEND + row * (_HEIGHT + _GAP_Y))
            for row, places in enumerate(self._rows)
            for column, place in enumerate(places)
        }

    def _edge(self, source: int, target: int) -> str:
        (left, top), (right, bottom) = self._corners[source], self._corners[target]
        x1, y1, x2, y2 = left + _WIDTH / 2, top + _HEIGHT, right + _WIDTH / 2, bottom
        if y2 - y1 <= _GAP_Y:
            curve = f"C {x1} {y1 + _GAP_Y / 2} {x2} {y2 - _GAP_Y / 2} {x2} {y2}"
        else:
            side = max(left, right) + _WIDTH + _GAP_X * 0.75
            curve = (
                f"C {x1} {y1 + _GAP_Y / 2} {side} {y1} {side} {y1 + _GAP_Y} "
                f"L {side} {y2 - _GAP_Y} C {side} {y2} {x2} {y2 - _GAP_Y / 2} {x2} {y2}"
            )
        return f'<path d="M {x1} {y1} {curve}" fill="none" stroke="{_LINE}" stroke-width="1.2"/>'


def _legend() -> Iterator[str]:
    x = _MARGIN
    for label, meaning in _MEANINGS.items():
        yield f'<rect x="{x}" y="{_MARGIN - 10}" width="12" height="12" fill="{LABEL_COLOURS[label]}"/>'
        yield _text(x + 18, _MARGIN, f"{label}: {meaning}")
        x += 130


def _box(box: Box, x: int, y: int) -> Iterator[str]:
    lines = [box.title, box.contents, box.erased]
    names = ", ".join(node.name for node in box.nodes[:8]) + (", …" if len(box.nodes) > 8 else "")
    yield f"<g><title>{_safe(f'{box.title}: {names}')}</title>"
    yield f'<rect x="{x}" y="{y}" width="{_WIDTH}" height="{_HEIGHT}" rx="3" fill="{UNCOUNTED}" stroke="{_LINE}"/>'
    yield from _bar(box, x, y)
    for line, words in enumerate(words for words in lines if words):
        yield _text(x + 8, y + 21 + 13 * line, _shortened(words), "bold" if line == 0 else "normal")
    yield "</g>"


def _bar(box: Box, x: float, y: int) -> Iterator[str]:
    """The shares of the labels, along the upper edge."""
    total = sum(box.counts.values())
    for label, count in box.counts.items():
        width = round(_WIDTH * count / total, 2)
        yield f'<rect x="{x:g}" y="{y}" width="{width:g}" height="{_BAR}" fill="{LABEL_COLOURS[label]}"/>'
        x += width


def _text(x: float, y: float, words: str, weight: str = "normal") -> str:
    return f'<text x="{x}" y="{y}" font-weight="{weight}" fill="{INK}">{_safe(words)}</text>'


def _shortened(words: str) -> str:
    # The end of a path says more than its beginning.
    return words if len(words) <= _LONGEST else f"…{words[1 - _LONGEST :]}"


def _safe(words: str) -> str:
    """Return words without what XML forbids or reads as markup."""
    return escape(_FORBIDDEN.sub("\ufffd", words), quote=True)
