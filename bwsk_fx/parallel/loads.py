"""What each node of a captured graph costs, for cutting it into stages of equal load."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode

from bwsk_fx import _torch_private as private
from bwsk_fx.planning.cost import flops
from bwsk_fx.planning.kernels import KernelCall
from bwsk_fx.rules.axis_table import per_sample


def loads_of(graph: fx.GraphModule, nodes: Sequence[fx.Node]) -> list[float]:
    """Return the floating-point operations of each node for one sample, one per element where there are no products."""
    counted = _Flops(graph).counted()
    return [float(counted.get(node) or _elements(node)) for node in nodes]


def _elements(node: fx.Node) -> int:
    value = node.meta.get("val")
    several = value if isinstance(value, (tuple, list)) else [value]
    return sum(math.prod(map(per_sample, item.shape)) for item in several if isinstance(item, torch.Tensor))


class _Flops(fx.Interpreter):
    """Counts the floating-point operations of each node for one sample, on fake tensors."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self._found: dict[fx.Node, float] = {}

    def counted(self) -> dict[fx.Node, float]:
        mode = private.fake_mode()
        graph: fx.GraphModule = self.module  # type: ignore[assignment]
        own = dict(graph.named_parameters()) | dict(graph.named_buffers())
        fakes = {name: private.fake_tensor(mode, tensor) for name, tensor in own.items()}
        values = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
        with torch.random.fork_rng(devices=()), torch.no_grad(), mode, private.swapped_parameters(graph, fakes):
            self.run(*map(_single, values), enable_io_processing=False)
        return self._found

    def run_node(self, n: fx.Node) -> Any:
        with _Counter() as counter:
            result = super().run_node(n)
        self._found[n] = counter.total
        return result


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.total = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.total += flops(KernelCall(func, args, kwargs or {}, result))
        return result


def _single(value: Any) -> Any:
    """Return a fake input with one sample."""
    if not isinstance(value, torch.Tensor):
        return value
    return torch.zeros([per_sample(size) for size in value.shape], dtype=value.dtype, device=value.device)
