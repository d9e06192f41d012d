"""The nodes of a graph, and the modules that they are folded into, as the page's data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any

from torch import fx

from bwsk_fx.report.calm import AxisFact, strictest
from bwsk_fx.report.html.opened import OpenedNode
from bwsk_fx.report.html.sizes import Sizes
from bwsk_fx.report.nodes import source_line, verdict_of

Path = tuple[tuple[str, str], ...]
"""The modules around a node from the outermost on: path and class of each."""

_PACKAGES = "site-packages/"


def node_row(
    opened: OpenedNode, places: Mapping[str, int], sizes: Sizes, facts: Mapping[fx.Node, Sequence[AxisFact]]
) -> dict[str, Any]:
    """Return what the page says about a node.

    Args:
        opened: The node.
        places: The place of each region in the page's list of regions.
        sizes: How sizes are written.
        facts: What nodes do on axes.

    Raises:
        RuleError: The node is not typed.
    """
    node = opened.node
    verdict = verdict_of(node).to_json()
    results = list(sizes.results(node.meta.get("val")))
    return {
        "name": node.name,
        "operator": opened.operator,
        "kind": node.op,
        "target": node.target if isinstance(node.target, str) else opened.operator,
        **verdict,
        "source": portable(source_line(node)),
        "results": results,
        "bytes": sum(result["bytes"] for result in results),
        "inputs": list(opened.inputs),
        "region": places.get(opened.region, -1),
        "axes": _axes(facts.get(node, ())),
    }


def portable(source: str) -> str:
    """Return a source line without the folder of the environment that its package is installed in."""
    return source.rpartition(_PACKAGES)[2].replace("\\", "/")


def module_tree(nodes: Sequence[OpenedNode]) -> dict[str, Any]:
    """Fold nodes by the modules that they run in, in the order of execution.

    A module is a group for each stretch of execution, so that one that is called twice has two groups.

    Returns:
        The group of the whole model: `path`, `class`, `counts` of labels, and `children`, which are places of nodes
        and further groups.
    """
    root = _group("", "")
    stack = [root]
    for place, path in enumerate(_paths(nodes)):
        if path and path[0][0] == "":
            root["class"] = path[0][1]
            path = path[1:]
        shared = _shared([(group["path"], group["class"]) for group in stack[1:]], path)
        del stack[1 + shared :]
        for name, kind in path[shared:]:
            group = _group(name, kind)
            stack[-1]["children"].append(group)
            stack.append(group)
        stack[-1]["children"].append(place)
    _count(root, nodes)
    return root


def _group(path: str, kind: str) -> dict[str, Any]:
    return {"path": path, "class": kind, "counts": {"S": 0, "K": 0, "GRAY": 0}, "children": []}


def _count(group: dict[str, Any], nodes: Sequence[OpenedNode]) -> None:
    """Add up the counted labels of a group and of those in it."""
    for child in group["children"]:
        if isinstance(child, dict):
            _count(child, nodes)
            for label, count in child["counts"].items():
                group["counts"][label] += count
        elif (verdict := verdict_of(nodes[child].node)).counted:
            group["counts"][str(verdict.label)] += 1


def _paths(nodes: Sequence[OpenedNode]) -> Iterator[Path]:
    """Yield the modules around each node; a node without any gets those that its neighbours share."""
    known = [_path(opened.node) for opened in nodes]
    following: list[Path] = []
    for path in reversed(known):
        following.append(path if path else (following[-1] if following else ()))
    before: Path = ()
    for path, after in zip(known, reversed(following), strict=True):
        yield path or before[: _shared(before, after)]
        before = path or before


def _path(node: fx.Node) -> Path:
    stack: Mapping[str, tuple[str, Any]] = node.meta.get("nn_module_stack") or {}
    # A leaf module is a node, not a group of one.
    return tuple(
        (path, getattr(kind, "__name__", str(kind)))
        for path, (_, kind) in stack.items()
        if not (node.op == "call_module" and node.target == path)
    )


def _shared(one: Iterable[tuple[str, str]], other: Iterable[tuple[str, str]]) -> int:
    """Return how many modules two paths begin with in common."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _axes(facts: Sequence[AxisFact]) -> dict[str, dict[str, str]]:
    """Return the most demanding behaviour of a node on each axis, with its reason."""
    worst = strictest(facts)
    reasons = {
        axis: next(fact.reason for fact in facts if (fact.axis, fact.behaviour) == (axis, worst[axis]))
        for axis in worst
    }
    return {axis: {"behaviour": str(behaviour), "reason": reasons[axis]} for axis, behaviour in worst.items()}
