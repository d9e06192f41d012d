"""The pass protocol, and the pipeline that verifies the graph between passes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from bwsk_fx.arguments import require_graph
from bwsk_fx.errors import PassError

__all__ = ["Pass", "PassError", "PassPipeline", "PassResult", "verify"]


@dataclass(frozen=True)
class Pass(ABC):
    """One step over a graph; options are the fields of the dataclass.

    Attributes:
        name: What reports and errors call the pass.
    """

    name: ClassVar[str]

    @abstractmethod
    def run(self, graph_module: fx.GraphModule) -> PassResult:
        """Run over the graph and return it, or its replacement, with whether its nodes changed."""

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Run the pass, as torch's own `PassManager` calls it."""
        return self.run(graph_module)


Callback = Callable[[Pass, fx.GraphModule], None]


@dataclass(frozen=True)
class PassPipeline:
    """Runs passes in order and verifies the graph before the first and after each.

    Attributes:
        passes: The passes, in order.
        callback: Called with each pass and the verified graph that it left, for printing and timing.
    """

    passes: Sequence[Pass]
    callback: Callback | None = None

    def __call__(self, graph_module: fx.GraphModule) -> fx.GraphModule:
        """Run all passes and return the graph of the last one.

        Raises:
            PassError: The graph was malformed before the first pass, or a pass left it malformed.
        """
        if self.passes:
            verify(graph_module, f"before pass '{self.passes[0].name}'")
        for step in self.passes:
            graph_module = self._run(step, graph_module)
        return graph_module

    def _run(self, step: Pass, graph_module: fx.GraphModule) -> fx.GraphModule:
        try:
            result = step.run(graph_module)
        except Exception as error:
            error.add_note(f"while pass '{step.name}' was running")
            raise
        if not isinstance(result, PassResult):
            raise PassError(f"pass '{step.name}' returned a {type(result).__name__}; it must return a PassResult")
        graph_module, modified = result
        verify(graph_module, f"after pass '{step.name}'")
        if modified:
            graph_module.recompile()
        if self.callback is not None:
            self.callback(step, graph_module)
        return graph_module


def verify(graph_module: fx.GraphModule, when: str = "in this graph") -> None:
    """Check that a torch-level graph is well formed.

    It passes fx's own lint; placeholders come first; there is one output and it is last; every node but the output
    carries `meta["val"]`, and those of placeholders and attributes are not None.

    Raises:
        PassError: Starts with `when` and names the node.
    """
    require_graph(graph_module)
    try:
        graph_module.graph.lint()
    except Exception as error:
        raise PassError(f"{when}: {error}") from error
    for node, complaint in _complaints(graph_module.graph):
        raise PassError(f"{when}: node '{node.name}' ({node.op} {_target_name(node)}) {complaint}")
    if not graph_module.graph.find_nodes(op="output"):
        raise PassError(f"{when}: the graph has no output node")


def _complaints(graph: fx.Graph) -> Iterator[tuple[fx.Node, str]]:
    inputs_done, output = False, None
    for node in graph.nodes:
        if output is not None:
            yield node, f"comes after the output node '{output.name}'"
        if node.op == "placeholder" and inputs_done:
            yield node, "is a placeholder behind a computation; placeholders come first"
        inputs_done = inputs_done or node.op not in ("placeholder", "get_attr")
        output = node if node.op == "output" else output
        if node.op != "output" and "val" not in node.meta:
            yield node, "has no meta['val']; run PropagateValues, or set it where the node is made"
        if node.op in ("placeholder", "get_attr") and node.meta["val"] is None:
            yield node, "has meta['val'] None; an input or attribute is a tensor or a number"


def _target_name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
