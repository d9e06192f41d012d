"""Reversible regions: the autograd Function that runs a plan, and the module that stands for a region in a graph."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from bwsk_fx import _torch_private as private
from bwsk_fx.errors import RegionError
from bwsk_fx.planning.plan import PlanOptions
from bwsk_fx.planning.program import Program, build_program
from bwsk_fx.signature import Settings, structure_of


class Programs(dict[Hashable, Program]):
    """The programs of a graph's regions, by structure and kind of input; equal blocks share theirs."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Programs:
        return Programs()

    def __reduce__(self) -> tuple[type[Programs], tuple[()]]:
        return Programs, ()


class ReversibleRegion(nn.Module):
    """A subgraph whose activations are rebuilt in the backward pass instead of kept.

    The region plans itself when it first meets a kind of input (shapes, strides, dtypes, device, autocast state, modes,
    which inputs need gradients). Without gradients it runs its subgraph as it is.

    Attributes:
        subgraph: The torch-level graph of the region. It shares its leaf modules with the model and is not a
            submodule of the region, so that no parameter is registered twice.
        options: Budget and faith of the plan.
        program: The program of the latest training step; None before the first.
    """

    subgraph: fx.GraphModule
    program: Program | None

    def __init__(self, name: str, subgraph: fx.GraphModule, options: PlanOptions, programs: Programs) -> None:
        super().__init__()
        self.name = name
        self.options = options
        self.program = None
        # Past nn.Module's own __setattr__, which would register it.
        self.__dict__["subgraph"] = subgraph
        self._programs = programs
        self._settings = Settings.of(subgraph)
        self._structure = structure_of(subgraph)

    def forward(self, *args: Any) -> tuple[Tensor, ...]:
        """Run the region.

        Raises:
            RegionError: A `torch.func` transform is active, or a module of the region carries hooks.
            PlanError: The region cannot be planned for these inputs.
        """
        weights = dict(self._weights())
        primals = (*(arg for arg in args if isinstance(arg, Tensor)), *weights.values())
        if not (torch.is_grad_enabled() and any(primal.requires_grad for primal in primals)):
            return self.subgraph(*args)
        self._require_usable()
        self.program = self._program(args, weights, primals)
        outputs = _RegionFunction.apply(self.program, self.name, *primals)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def extra_repr(self) -> str:
        """Name the region and its size."""
        return f"{self.name}, {len(self.subgraph.graph.nodes)} nodes, {self.options}"

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        """Look parameters and buffers up anew: `to`, `load_state_dict(assign=True)` and the like replace them."""
        yield from self.subgraph.named_parameters()
        yield from self.subgraph.named_buffers()

    def _require_usable(self) -> None:
        if private.inside_function_transform():
            raise RegionError(
                f"region {self.name} was called inside a torch.func transform (grad, vmap, jvp, …), which reversible "
                "regions do not support; transform the model before it is rewritten, or use loss.backward()"
            )
        if hooked := self._settings.hooked_module():
            raise RegionError(
                f"region {self.name}: module {hooked} carries forward or backward hooks, which a fused region does not "
                "run; remove them, or keep the module out of regions"
            )

    def _program(self, args: tuple[Any, ...], weights: dict[str, Tensor], primals: tuple[Tensor, ...]) -> Program:
        scalars = tuple(arg if not isinstance(arg, Tensor) else None for arg in args)
        key = (
            self._structure,
            self._settings.current(),
            self.options,
            scalars,
            tuple(map(_kind, primals)),
            _ambient_state(primals[0].device.type),
        )
        if key not in self._programs:
            self._programs[key] = self._build(args, weights, primals)
        return self._programs[key]

    def _build(self, args: tuple[Any, ...], weights: dict[str, Tensor], primals: tuple[Tensor, ...]) -> Program:
        dynamic = len(primals) - len(weights)

        def region(*traced: Tensor) -> tuple[Tensor, ...]:
            tensors = iter(traced[:dynamic])
            operands = [next(tensors) if isinstance(arg, Tensor) else arg for arg in args]
            swapped = private.swapped_parameters(self.subgraph, dict(zip(weights, traced[dynamic:], strict=True)))
            # Node by node, so that what is traced remembers the node and the user's line that it comes from.
            with swapped, fx.traceback.preserve_node_meta():
                return fx.Interpreter(self.subgraph, garbage_collect_values=False).run(*operands)

        placeholders = self.subgraph.graph.find_nodes(op="placeholder")
        names = [node.name for node, arg in zip(placeholders, args, strict=True) if isinstance(arg, Tensor)]
        inputs = dict(zip((*names, *weights), primals, strict=True))
        return build_program(region, inputs, range(dynamic, len(primals)), self.options, self.name)


class _RegionFunction(torch.autograd.Function):
    """Runs the forward module of a program, and its backward module on what was kept."""

    @staticmethod
    def forward(ctx: Any, program: Program, name: str, *primals: Tensor) -> tuple[Tensor, ...]:
        with private.without_autocast():
            outputs, kept = program.forward(*primals)
        ctx.program, ctx.name = program, name
        ctx.save_for_backward(*kept, *(primals[index] for index in program.static))
        flags = zip(outputs, program.differentiable, strict=True)
        ctx.mark_non_differentiable(*(output for output, differentiable in flags if not differentiable))
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RegionError(
                f"region {ctx.name}: reversible regions have no second derivative; call backward() and autograd.grad() "
                "without create_graph=True, or differentiate the model before it is rewritten"
            )
        program: Program = ctx.program
        residuals = list(ctx.saved_tensors)
        # The list is now the only owner, and the backward module empties it as it goes.
        private.release_saved_tensors(ctx)
        tangents = (gradient for gradient, wanted in zip(gradients, program.differentiable, strict=True) if wanted)
        residuals += map(_with_strides, tangents, program.tangent_strides)
        del gradients, tangents
        with private.without_autocast():
            return None, None, *program.backward(residuals)


def _with_strides(tangent: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Lay a gradient out as the backward module was traced: its views depend on it."""
    if tangent.stride() == strides:
        return tangent
    return tangent.new_empty_strided(tangent.shape, strides).copy_(tangent)


def _kind(tensor: Tensor) -> Hashable:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


def _ambient_state(device_type: str) -> Hashable:
    """Everything outside a region that decides which kernels PyTorch picks for it."""
    sdp = torch.backends.cuda
    return (
        torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type),
        torch.are_deterministic_algorithms_enabled(),
        (sdp.flash_sdp_enabled(), sdp.mem_efficient_sdp_enabled(), sdp.math_sdp_enabled(), sdp.cudnn_sdp_enabled()),
    )
