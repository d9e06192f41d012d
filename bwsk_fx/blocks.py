"""Which repeated block of a model a node belongs to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from torch import fx

Item = TypeVar("Item")


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
    return grouped(graph.nodes, block_of)


def grouped(items: Iterable[Item], path_of: Callable[[Item], str | None]) -> Iterator[tuple[str, list[Item]]]:
    """Yield each block's path with the items of it, in the order of their first; items of no block are left out."""
    members: dict[str, list[Item]] = {}
    for item in items:
        path = path_of(item)
        if path is not None:
            members.setdefault(path, []).append(item)
    yield from members.items()


def span(section: str, indices: Sequence[int]) -> str:
    """Name neighbouring blocks of one container: `vit.layers.0-11`, or `vit.layers.3` for a single one."""
    numbers = str(indices[0]) if len(indices) == 1 else f"{indices[0]}-{indices[-1]}"
    return f"{section}.{numbers}".removeprefix(".")
