"""Programs of `torch.export` in the form of captured graphs."""

from __future__ import annotations

import operator
import re
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from bwsk_fx.errors import InspectError, first_line
from bwsk_fx.inspection.sources import Source

_FRAME = re.compile(r'^\s*File "', re.MULTILINE)
_LIBRARY = str(Path(torch.__file__).parent)


def load(path: str) -> Source:
    """Load a `.pt2` file.

    `torch.export.load` unpickles constants, and weights of tensor subclasses, which can run any code: files of others
    are to be trusted before they are loaded.

    Raises:
        InspectError: The file cannot be loaded.
    """
    if not Path(path).is_file():
        raise InspectError(f"'{path}': no such file; torch.export.save makes it")
    try:
        program = torch.export.load(path)
    except Exception as error:
        why = f"{type(error).__name__}: {first_line(error)}"
        raise InspectError(f"'{path}' cannot be loaded by torch.export.load ({why})") from error
    return from_program(program)


def from_program(program: torch.export.ExportedProgram) -> Source:
    """Return an exported program as a graph that reads its parameters by their paths, and its example inputs.

    What runs under `torch.no_grad` or `enable_grad` is part of the graph like anything else.

    Args:
        program: What `torch.export.export` returned.

    Raises:
        InspectError: The program holds branches, loops or autocast blocks.
    """
    module = program.module(check_guards=False)
    # The program's own module checks and unpacks its inputs before each call; this one takes them flat.
    graph = fx.Graph()
    graph.output(_copied(module, graph, {}))
    graph.output_node().meta.update(module.graph.output_node().meta)
    for node in graph.nodes:
        node.meta["nn_module_stack"] = _stack(node)
        if node.meta.get("stack_trace"):
            node.meta["stack_trace"] = _innermost(node.meta["stack_trace"])
    graph.lint()
    return Source(fx.GraphModule(module, graph, class_name="ExportedGraph"), _inputs(program, graph))


def _copied(module: fx.GraphModule, graph: fx.Graph, at: dict[fx.Node, Any]) -> Any:
    """Copy the nodes of a module to the end of a graph, and return what it returns; `at` has what stands for inputs."""
    for node in module.graph.nodes:
        if node.op == "output":
            return fx.node.map_arg(node.args[0], at.__getitem__)
        if node not in at and not _names_a_part(module, node):
            at[node] = _call(module, graph, node, at)
    raise AssertionError("a graph has an output")


def _call(module: fx.GraphModule, graph: fx.Graph, node: fx.Node, at: dict[fx.Node, Any]) -> Any:
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        if node.target is not torch.ops.higher_order.wrap_with_set_grad_enabled:
            raise InspectError(
                f"node '{node.name}' of the exported program runs a part of it by '{node.target.name()}', which has "
                "no rule: export the model without branches, loops and autocast blocks"
            )
        _, part, *operands = node.args
        inner = getattr(module, str(part.target))  # type: ignore[union-attr]
        inputs = inner.graph.find_nodes(op="placeholder")
        own = {into: at[given] for into, given in zip(inputs, operands, strict=True)}  # type: ignore[index]
        return _copied(inner, graph, own)
    if node.target is operator.getitem and isinstance(at[node.args[0]], (tuple, list)):  # type: ignore[index]
        return at[node.args[0]][node.args[1]]  # type: ignore[index]
    return graph.node_copy(node, at.__getitem__)


def _names_a_part(module: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "get_attr" and isinstance(getattr(module, str(node.target), None), fx.GraphModule)


def _stack(node: fx.Node) -> dict[str, tuple[str, Any]]:
    """Return the modules around a node by their paths, as in captured graphs, without those that export makes up."""
    stack = (node.meta.get("nn_module_stack") or {}).values()
    return {path: (path, kind) for path, kind in stack if path and not path.startswith("_empty_nn_module")}


def _innermost(trace: str) -> str:
    """Return the innermost frame outside of PyTorch."""
    _, *frames = _FRAME.split(trace)
    own = [frame for frame in frames if not frame.startswith(_LIBRARY)]
    return 'File "' + (own or frames or [""])[-1].rstrip()


def _inputs(program: torch.export.ExportedProgram, graph: fx.Graph) -> dict[str, Any] | None:
    if program.example_inputs is None:
        return None
    names = [str(node.target) for node in graph.find_nodes(op="placeholder")]
    return dict(zip(names, pytree.tree_leaves(program.example_inputs), strict=True))
