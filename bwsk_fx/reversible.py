"""Reversible regions: the autograd Function that runs a plan, and the module that stands for a region in a graph."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from bwsk_fx import _torch_private as private
from bwsk_fx._hooks import is_hooked
from bwsk_fx._inside import unseen_by_hooks
from bwsk_fx._side_effects import emptied_caches
from bwsk_fx.errors import RegionError
from bwsk_fx.planning.options import PlanOptions
from bwsk_fx.planning.plan import Plan
from bwsk_fx.planning.program import Program, in_memory
from bwsk_fx.planning.prospect import Prospect, survey
from bwsk_fx.rules.inverse_linear import is_well_conditioned
from bwsk_fx.signature import Settings, frozen, structure_of
from bwsk_fx.statistics import running_statistics


@dataclass
class Programs:
    """What the regions of a graph run, by kind of input; equal blocks share their prospects.

    Attributes:
        prospects: What plans there are, by structure and kind of input.
        chosen: What each region runs for each kind, by its name.
    """

    prospects: dict[Hashable, Prospect] = field(default_factory=dict)
    chosen: dict[tuple[str, Hashable], Program] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> Programs:
        return Programs()

    def __reduce__(self) -> tuple[type[Programs], tuple[()]]:
        return Programs, ()


@dataclass(frozen=True)
class Foreseen:
    """How a region would be called.

    Attributes:
        region: The region.
        kind: The kind of input.
        prospect: Its plans for that kind.
        outputs: What it would return, as fake tensors.
    """

    region: ReversibleRegion
    kind: Hashable
    prospect: Prospect
    outputs: tuple[Tensor, ...]


class ReversibleRegion(nn.Module):
    """A subgraph whose activations are rebuilt in the backward pass instead of kept.

    The region plans itself when it first meets a kind of input (shapes, strides, dtypes, device, autocast state, modes,
    which inputs need gradients). Without gradients it runs its subgraph as it is.

    Attributes:
        subgraph: The torch-level graph of the region. It shares its leaf modules with the model and is not a
            submodule of the region, so that no parameter is registered twice.
        attributes: How many of its last inputs are parameters and buffers that it reads by themselves.
        options: Budget and faith of the plan.
        program: The program of the latest training step; None before the first.
    """

    subgraph: fx.GraphModule
    program: Program | None

    def __init__(
        self, name: str, subgraph: fx.GraphModule, attributes: int, options: PlanOptions, programs: Programs
    ) -> None:
        super().__init__()
        self.name = name
        self.attributes = attributes
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
        args = tuple(in_memory(arg) if isinstance(arg, Tensor) else arg for arg in args)
        inputs = self._inputs(args)
        if not (torch.is_grad_enabled() and any(primal.requires_grad for primal in inputs.primals)):
            return self.subgraph(*args)
        self._require_usable(inputs)
        self.program = self._program(inputs)
        outputs = _RegionFunction.apply(self.program, self.name, *inputs.primals)
        return self._with_statistics_written(outputs if isinstance(outputs, tuple) else (outputs,))

    def _with_statistics_written(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Write the running statistics that the program returns behind its own outputs, and return those."""
        buffers = [buffer for _, buffer in running_statistics(self._settings.modules())]
        count = len(outputs) - len(buffers)
        with torch.no_grad():
            for buffer, value in zip(buffers, outputs[count:], strict=True):
                buffer.copy_(value)
        return outputs[:count]

    def extra_repr(self) -> str:
        """Name the region and its size."""
        return f"{self.name}, {len(self.subgraph.graph.nodes)} nodes, {self.options}"

    def _inputs(self, args: tuple[Any, ...]) -> _Inputs:
        """Look parameters and buffers up anew: `to`, `load_state_dict(assign=True)` and the like replace them."""
        dynamic = len(args) - self.attributes
        weights = tuple(self._settings.tensors())
        return _Inputs.of(args[:dynamic], [*args[dynamic:], *(tensor for _, tensor in weights)], [*dict(weights)])

    def _require_usable(self, inputs: _Inputs) -> None:
        if inputs.primals[0].is_meta:
            raise RegionError(
                f"region {self.name} was called with tensors on the meta device, which hold no values to train with; "
                "move model and inputs to a device (model.to_empty(device='cpu')), or plan with plan_frontier"
            )
        if private.inside_function_transform():
            raise RegionError(
                f"region {self.name} was called inside a torch.func transform (grad, vmap, jvp, …), which reversible "
                "regions do not support; transform the model before it is rewritten, or use loss.backward()"
            )
        if hooked := next((path for path, module in self._settings.modules() if is_hooked(module)), None):
            raise RegionError(
                f"region {self.name}: module {hooked} carries forward or backward hooks, which a fused region does not "
                "run; remove them, or keep the module out of regions"
            )

    def foresee(self, *args: Any) -> Foreseen | None:
        """Trace the region for fake inputs; None where it would run its subgraph as it is.

        Raises:
            PlanError: The region cannot be traced.
        """
        inputs = self._inputs(args)
        if not any(primal.requires_grad for primal in inputs.primals):
            return None
        kind = self._kind(inputs)
        prospect = self._prospect(kind, inputs)
        differentiable = iter(prospect.traced.differentiable)
        values = (node.meta["val"] for node in prospect.traced.joint.forward_outputs if node is not None)
        outputs = tuple(
            torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device).requires_grad_(
                wanted
            )
            for value, wanted in zip(values, differentiable, strict=True)
        )
        return Foreseen(self, kind, prospect, outputs)

    def choose(self, kind: Hashable, program: Program) -> None:
        """Run `program` for a kind of input from now on."""
        self._programs.chosen[self.name, kind] = program

    def plans(self) -> list[Plan]:
        """Return the plan of every kind of input that the region has met."""
        return [program.plan for (name, _), program in self._programs.chosen.items() if name == self.name]

    def _program(self, inputs: _Inputs) -> Program:
        kind = self._kind(inputs)
        if (self.name, kind) not in self._programs.chosen:
            with unseen_by_hooks():
                self.choose(kind, self._by_itself(self._prospect(kind, inputs)))
        return self._programs.chosen[self.name, kind]

    def _by_itself(self, prospect: Prospect) -> Program:
        """Plan without knowing the other regions, as is right where they do not share a bound."""
        if self.options.plan is not None:
            return prospect.from_file(self.options.plan, self.name)
        if not self.options.bounds_memory:
            return prospect.within_budget()
        warnings.warn(
            f"region {self.name} met a kind of input that was not foreseen when memory was shared out among regions "
            "(a module's settings have changed, or it is called by itself): it keeps as little as it can",
            stacklevel=2,
        )
        return prospect.program(prospect.least_bytes)

    def _kind(self, inputs: _Inputs) -> Hashable:
        return (
            self._structure,
            self._settings.current(),
            self.options,
            self._invertible(inputs),
            inputs.kind(),
            ambient_state(inputs.primals[0].device.type),
        )

    def _invertible(self, inputs: _Inputs) -> tuple[int, ...]:
        """Return the places of weights whose linear maps may be undone."""
        if not self.options.linear_inverses:
            return ()
        first = len(inputs.primals) - len(inputs.static)
        return tuple(first + place for place, weight in enumerate(inputs.static) if is_well_conditioned(weight))

    def _prospect(self, kind: Hashable, inputs: _Inputs) -> Prospect:
        if kind not in self._programs.prospects:
            self._programs.prospects[kind] = self._survey(inputs)
        return self._programs.prospects[kind]

    def _survey(self, inputs: _Inputs) -> Prospect:
        statistics = [name for name, _ in running_statistics(self._settings.modules())]

        def region(*traced: Tensor) -> tuple[Tensor, ...]:
            operands, weights = inputs.replaced_by(traced)
            weights |= {name: weights[name].clone() for name in statistics}
            # Node by node, so that what is traced remembers the node and the user's line that it comes from.
            with (
                emptied_caches(self.subgraph),
                private.swapped_parameters(self.subgraph, weights),
                fx.traceback.preserve_node_meta(),
            ):
                outputs = fx.Interpreter(self.subgraph, garbage_collect_values=False).run(*operands)
            return *outputs, *(weights[name] for name in statistics)

        names = [node.name for node in self.subgraph.graph.find_nodes(op="placeholder")]
        static = range(len(inputs.primals) - len(inputs.static), len(inputs.primals))
        return survey(region, inputs.named(names), static, self.options, self.name, self._invertible(inputs))


@dataclass(frozen=True)
class _Inputs:
    """What a region is called with, sorted.

    Attributes:
        args: Tensors and numbers that depend on the model's inputs.
        static: Parameters and buffers, each once.
        places: Where in `static` each attribute is, then each weight of a leaf module; tied ones share a place.
        weights: The names of those weights.
    """

    args: tuple[Any, ...]
    static: tuple[Tensor, ...]
    places: tuple[int, ...]
    weights: tuple[str, ...]

    @classmethod
    def of(cls, args: tuple[Any, ...], static: Sequence[Tensor], weights: Sequence[str]) -> _Inputs:
        """Sort inputs and the tensors of attributes and weights, tied ones included."""
        distinct = {id(tensor): tensor for tensor in static}
        order = {key: place for place, key in enumerate(distinct)}
        places = tuple(order[id(tensor)] for tensor in static)
        return cls(args, tuple(distinct.values()), places, tuple(weights))

    @cached_property
    def primals(self) -> tuple[Tensor, ...]:
        """The tensors among `args`, then `static`."""
        return (*(arg for arg in self.args if isinstance(arg, Tensor)), *self.static)

    def kind(self) -> Hashable:
        """Return everything about the inputs that a program depends on."""
        numbers = tuple(None if isinstance(arg, Tensor) else frozen(arg) for arg in self.args)
        return numbers, tuple(map(kind_of, self.primals)), self.places

    def named(self, placeholders: Sequence[str]) -> dict[str, Tensor]:
        """Name the primals after placeholders and weights; tied ones after the first."""
        names = [name for name, arg in zip(placeholders, self.args, strict=False) if isinstance(arg, Tensor)]
        own = (*placeholders[len(self.args) :], *self.weights)
        names += [own[self.places.index(place)] for place in range(len(self.static))]
        return dict(zip(names, self.primals, strict=True))

    def replaced_by(self, primals: Iterable[Tensor]) -> tuple[list[Any], dict[str, Tensor]]:
        """Return a call's arguments and the weights by name, with `primals` in place of the tensors."""
        remaining = iter(primals)
        args = [next(remaining) if isinstance(arg, Tensor) else arg for arg in self.args]
        static = tuple(remaining)
        given = [static[place] for place in self.places]
        attributes = len(given) - len(self.weights)
        return args + given[:attributes], dict(zip(self.weights, given[attributes:], strict=True))


class _RegionFunction(torch.autograd.Function):
    """Runs the forward module of a program, and its backward module on what was kept."""

    @staticmethod
    def forward(ctx: Any, program: Program, name: str, *primals: Tensor) -> tuple[Tensor, ...]:
        with private.without_autocast():
            outputs, kept = program.run_forward(*primals)
        ctx.program, ctx.name = program, name
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*kept, *(primals[index] for index in program.static))
        flags = zip(outputs, program.differentiable, strict=True)
        ctx.mark_non_differentiable(*(output for output, differentiable in flags if not differentiable))
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RegionError(
                f"region {ctx.name}: reversible regions have no second derivative; call backward() and autograd.grad() "
                "without create_graph=True, or differentiate the model before it is rewritten"
            )
        program: Program = ctx.program
        residuals = list(ctx.saved_tensors)
        # The list is now the only owner, and the backward module empties it as it goes.
        private.release_saved_tensors(ctx)
        tangents = [gradient for gradient, wanted in zip(gradients, program.differentiable, strict=True) if wanted]
        present = {place for place, tangent in enumerate(tangents) if tangent is not None}
        residuals += (layout.applied_to(tangent) for layout, tangent in zip(program.tangents, tangents, strict=True))
        del gradients, tangents
        with private.without_autocast():
            found = _apart(program.run_backward(residuals))
        # Eager execution leaves a parameter alone that no used output depends on; optimizers tell None from zero.
        reads = zip(found, program.reads, strict=True)
        return None, None, *(None if read and read.isdisjoint(present) else gradient for gradient, read in reads)


def _apart(gradients: Iterable[Tensor | None]) -> Iterator[Tensor | None]:
    """Give each gradient a storage of its own.

    With a batch of one, sums over the batch are views, and autograd makes such gradients the parameters' own: what then
    changes one in place, as clipping and the averages of `DistributedDataParallel` do, would change another as well.
    """
    met = set()
    for gradient in gradients:
        if gradient is not None:
            storage = gradient.untyped_storage()._cdata
            gradient = gradient.clone() if storage in met else gradient
            met.add(storage)
        yield gradient


def kind_of(tensor: Tensor) -> Hashable:
    """Return everything about a tensor that a program depends on."""
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


def ambient_state(device_type: str) -> Hashable:
    """Everything outside a region that decides which kernels PyTorch picks for it."""
    sdp = torch.backends.cuda
    return (
        torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type),
        torch.are_deterministic_algorithms_enabled(),
        (sdp.flash_sdp_enabled(), sdp.mem_efficient_sdp_enabled(), sdp.math_sdp_enabled(), sdp.cudnn_sdp_enabled()),
    )
