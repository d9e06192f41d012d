"""Typed graphs in Graphviz's DOT language, coloured by verdict."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

from bwsk_fx.arguments import require_graph
from bwsk_fx.errors import BwskError
from bwsk_fx.report.colours import INK, LABEL_COLOURS, UNCOUNTED, colour_of
from bwsk_fx.report.export.folding import Box, fold
from bwsk_fx.report.records import records


def to_dot(graph: fx.GraphModule, depth: int | None = None) -> str:
    """Return a typed graph as text for Graphviz; neither Graphviz nor pydot is needed to make it.

    S is blue, K orange, GRAY gray; a box with several labels has stripes in proportion. Attributes, sizes and static
    values are left out.

    Args:
        graph: A graph that `type_nodes` has labelled.
        depth: One box per run of nodes that share so many parts of their module's path; None: a box per node.

    Raises:
        RuleError: The graph is not typed, or the depth is negative.
    """
    require_graph(graph)
    folded = fold(records(graph), depth)
    lines = [
        "digraph bwsk {",
        f'  node [shape=box, fontname="Helvetica", fontsize=10, fontcolor="{INK}", color="{INK}"];',
        *(f"  n{place} [{_box(box)}];" for place, box in enumerate(folded.boxes)),
        *(f"  n{source} -> n{target};" for source, target in folded.edges),
        "}",
    ]
    return "\n".join(lines) + "\n"


def draw(graph: fx.GraphModule, name: str = "bwsk") -> Any:
    """Let PyTorch's `FxGraphDrawer` draw a typed graph, and fill its nodes with the colours of their verdicts.

    Args:
        graph: A graph that `type_nodes` has labelled.
        name: What the drawing is called.

    Returns:
        A `pydot.Dot`, with `write_svg` and other methods that call Graphviz.

    Raises:
        BwskError: The graph is not typed, or pydot is not installed.
    """
    from torch.fx.passes import graph_drawer

    if not graph_drawer.HAS_PYDOT:
        raise BwskError("draw needs pydot, which is not installed: install it, or use to_dot, which needs nothing")
    drawer = graph_drawer.FxGraphDrawer(graph, name, ignore_getattr=True, ignore_parameters_and_buffers=True)
    drawing = drawer.get_dot_graph()
    for record in records(graph):
        for node in drawing.get_node(record.name):
            node.set("fillcolor", f'"{colour_of(record.label, record.counted)}"')
    return drawing


def _box(box: Box) -> str:
    words = "\\n".join(_escaped(line) for line in (box.title, box.contents, box.erased) if line)
    sources = dict.fromkeys(node.source for node in box.nodes if node.source)
    tooltip = _escaped(next(iter(sources), ""))
    return ", ".join([f'label="{words}"', f'tooltip="{tooltip}"', *_fill(box)])


def _fill(box: Box) -> Iterator[str]:
    total = sum(box.counts.values())
    if len(box.counts) > 1:
        stripes = ":".join(f"{LABEL_COLOURS[label]};{count / total:.4f}" for label, count in box.counts.items())
        yield 'style="striped"'
        yield f'fillcolor="{stripes}"'
    else:
        yield 'style="filled"'
        yield f'fillcolor="{next((LABEL_COLOURS[label] for label in box.counts), UNCOUNTED)}"'


def _escaped(words: str) -> str:
    return words.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ")
