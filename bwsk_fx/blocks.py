"""Which repeated block of a model a node belongs to."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx


def block_of(node: fx.Node) -> str | None:
    """Return the path of the outermost indexed block around a node, such as `"vit.layers.3"`.

    A block is a module that its container holds under a number, as `ModuleList` and `Sequential` do. A leaf module
    right inside a container, such as a `Linear` in a `Sequential`, is an operator and no block.

    Returns:
        The path, or None for nodes outside any block: embeddings, heads, placeholders, attributes and sizes.
    """
    for path in node.meta.get("nn_module_stack") or ():
        if path.rpartition(".")[2].isdecimal() and not (node.op == "call_module" and node.target == path):
            return path
    return None


def section_and_index(path: str) -> tuple[str, int]:
    """Split a block's path into its container's path and its index there."""
    section, _, index = path.rpartition(".")
    return section, int(index)


def blocks(graph: fx.Graph) -> Iterator[tuple[str, list[fx.Node]]]:
    """Yield each block's path with its nodes, in the order in which they first run."""
    members: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        path = block_of(node)
        if path is not None:
            members.setdefault(path, []).append(node)
    yield from members.items()
