"""Real layouts against traced ones: a graph's views and reductions are right for the strides that it was traced with.

PyTorch's fake tensors now and then foresee other strides than the kernel returns, and a rebuilt value may lie in memory
otherwise than the original did. A traced graph has taken decisions by strides (`contiguous()` on a tensor that is
contiguous leaves no node), so that a tensor that lies otherwise would be read wrongly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx

from bwsk_fx import _torch_private as private
from bwsk_fx.errors import PlanError
from bwsk_fx.planning.bindings import bound
from bwsk_fx.planning.sizes import at_sizes, bind_sizes, is_symbolic, sizes_in_arguments, symbols_of
from bwsk_fx.rules.inverse import laid_out

_BOUND = "bound"


def run(module: fx.GraphModule, *args: Any) -> Any:
    """Run a graph module whose nodes have recorded values; in its first run, lay out as recorded what lies otherwise.

    Where a tensor has other strides than recorded, a copy is added to the graph for good. Later runs go by what `bound`
    makes of it.

    Raises:
        PlanError: A tensor has other sizes than recorded.
    """
    if _BOUND in module.meta:
        return module.meta[_BOUND](*args)
    run = _CheckedRun(module)
    result = run.run(*args)
    _add_copies(module, run.otherwise)
    module.meta[_BOUND] = bound(module)
    return result


class _CheckedRun(fx.Interpreter):
    """Runs a graph node by node and finds the nodes whose tensors lie otherwise than recorded."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        # Errors are ours, and name the node themselves.
        self.extra_traceback = False
        self.otherwise: dict[fx.Node, tuple[int, ...]] = {}
        # What the symbols in recorded sizes are in this run.
        self._symbols: dict[Any, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run a node and lay its tensor out as recorded."""
        result = super().run_node(n)
        recorded = n.meta.get("val")
        if n.op != "call_function" and is_symbolic(recorded):
            self._symbols.setdefault(private.expression_of(recorded), result)
        if n.op != "call_function" or not isinstance(result, Tensor) or not isinstance(recorded, Tensor):
            return result
        shape, strides = (at_sizes(own, self._symbols) for own in (recorded.shape, recorded.stride()))
        # Not the dtype: fakes are wrong about statistics of mixed dtypes, and the next kernel takes what it gets.
        if tuple(result.shape) != shape:
            raise PlanError(
                f"node {n.name} ({n.target}) gave the sizes {tuple(result.shape)}, and was traced with "
                f"{shape}; leave its module out with granularity='s-run'"
            )
        if _lies_alike(result, strides):
            return result
        self.otherwise[n] = recorded.stride()
        return laid_out(result, strides)


def _lies_alike(one: Tensor, strides: Sequence[int]) -> bool:
    """Whether equal indices are equally far apart; dimensions of one index have no distance."""
    dims = zip(one.shape, one.stride(), strides, strict=True)
    return one.numel() == 0 or all(mine == theirs for size, mine, theirs in dims if size > 1)


def _add_copies(module: fx.GraphModule, otherwise: dict[fx.Node, tuple[int, ...]]) -> None:
    for node, strides in otherwise.items():
        with module.graph.inserting_after(node), sizes_in_arguments():
            copy = module.graph.call_function(laid_out, (node, strides))
        copy.meta = dict(node.meta)
        node.replace_all_uses_with(copy, delete_user_cb=lambda user, copy=copy: user is not copy)  # type: ignore[misc]
    if otherwise:
        bind_sizes(module.graph, symbols_of(node for node in module.graph.nodes if node.op != "call_function"))
        module.recompile()
