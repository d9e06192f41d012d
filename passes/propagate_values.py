"""Values: recompute the fake result of every node from the placeholders' fakes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from torch.utils import _pytree as pytree

from bwsk_fx import _torch_private as private
from bwsk_fx.passes.pipeline import Pass, PassError, PassResult


@dataclass(frozen=True)
class PropagateValues(Pass):
    """Refreshes `node.meta["val"]` of all nodes from the placeholders' values; other meta stays."""

    name: ClassVar[str] = "propagate-values"

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        """Interpret the graph on fakes; parameters, buffers and the random state stay as they are."""
        inputs = [node.meta.get("val") for node in graph_module.graph.find_nodes(op="placeholder")]
        mode = next((value.fake_mode for value in inputs if hasattr(value, "fake_mode")), None)
        if mode is None:
            raise PassError(f"pass '{self.name}': no placeholder has a fake tensor as meta['val']; capture makes them")
        own = dict(graph_module.named_parameters()) | dict(graph_module.named_buffers())
        fakes = {name: private.fake_tensor(mode, tensor) for name, tensor in own.items()}
        swapped = private.swapped_parameters(graph_module, fakes)
        kernels = private.python_kernels()
        with torch.random.fork_rng(devices=()), mode, kernels, swapped, private.without_autocast():
            _Propagator(graph_module).run(*inputs, enable_io_processing=False)
        return PassResult(graph_module, False)


class _Propagator(fx.Interpreter):
    """Runs the graph and writes each result down."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op != "output":
            n.meta["val"] = pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, _plain(result))
        return result


def _plain(result: Any) -> Any:
    """Output classes have no value of their own, as in a fresh capture."""
    kept = (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool, str, tuple, list)
    return result if isinstance(result, kept) else None
