"""Dynamo's graphs in the form of captured ones: modules, parameters and buffers by their paths, values recorded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import fx, nn

from bwsk_fx import _torch_private as private

# What comes behind the root in `L['self'].layers[0]._modules['fc1']._parameters['weight']`.
_STEP = re.compile(r"\['(?P<key>[^']*)'\]|\[(?P<index>\d+)\]|\.(?P<name>\w+)")
_REGISTRIES = frozenset({"_modules", "_parameters", "_buffers"})
_FRAME = re.compile(r'^\s*File "', re.MULTILINE)


def path_of(source: str) -> str:
    """Return the path below the model of what Dynamo names by an expression of Python; empty for the model itself."""
    _, _, rest = source.partition("]") if source.startswith(("L[", "G[")) else ("", "", f".{source}")
    steps = (next(filter(None, step.groups()), "") for step in _STEP.finditer(rest))
    return ".".join(step for step in steps if step not in _REGISTRIES)


def name_modules(graph: fx.Graph) -> None:
    """Let `meta["nn_module_stack"]` be module path to (path, class), as in captured graphs, unless it is."""
    for node in graph.nodes:
        stack: Mapping[str, Any] = node.meta.get("nn_module_stack") or {}
        if any(key != path for key, (path, _) in stack.items()):
            paths = ((path_of(source), kind) for source, kind in stack.values())
            node.meta["nn_module_stack"] = {path: (path, kind) for path, kind in paths if path}


def as_captured(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Return a copy of a graph of Dynamo's in the form in which `capture` returns graphs.

    Parameters and buffers, which Dynamo passes as inputs, are attributes under the model's own names; their tensors are
    fake. Each node has the innermost line of the user's code.

    Args:
        graph_module: The graph that a backend of `torch.compile` is given; it stays as it is.
    """
    root = _Attributes()
    for name, child in graph_module.named_children():
        root.add_module(name, child)
    graph = fx.Graph()
    at: dict[fx.Node, fx.Node] = {}
    for node in graph_module.graph.nodes:
        at[node] = root.hold(graph, node) or graph.node_copy(node, at.__getitem__)
        at[node].meta = _meta(node)
    name_modules(graph)
    graph.lint()
    return fx.GraphModule(root, graph, class_name="DynamoGraph")


class _Attributes(nn.Module):
    """Holds the fake parameters and buffers of a graph, at their paths."""

    def hold(self, graph: fx.Graph, node: fx.Node) -> fx.Node | None:
        """Take over what a placeholder passes in, if it belongs to the model, and return a node that reads it."""
        source = private.dynamo_source(node) if node.op == "placeholder" else ""
        if not any(f"{registry}[" in source for registry in ("_parameters", "_buffers")):
            return None
        path, _, name = path_of(source).rpartition(".")
        owner: nn.Module = self
        for step in path.split(".") if path else ():
            if not hasattr(owner, step):
                owner.add_module(step, nn.Module())
            owner = getattr(owner, step)
        value = node.meta["example_value"]
        if isinstance(value, nn.Parameter):
            owner.register_parameter(name, value)
        else:
            owner.register_buffer(name, value)
        return graph.create_node("get_attr", f"{path}.{name}".removeprefix("."), name=node.name)


def _meta(node: fx.Node) -> dict[str, Any]:
    kept = {key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if node.meta.get(key)}
    if "stack_trace" in kept:
        *_, frame = _FRAME.split(kept["stack_trace"])
        lines = (line for line in frame.splitlines() if line.strip(" ^~"))
        kept["stack_trace"] = 'File "' + "\n".join(lines)
    # AOTAutograd's graphs have their values under the name of captured ones.
    value = node.meta.get("example_value", node.meta.get("val"))
    return kept if node.op == "output" else {**kept, "val": value}
