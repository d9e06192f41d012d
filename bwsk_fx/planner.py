"""Plans all regions of a graph together, before its first step with a kind of input.

Regions that share a budget of time, or a bound on memory, cannot be planned one by one. The graph is run once on fake
tensors, which costs no memory and no arithmetic: each region is traced, and what lies between regions is weighed.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd.graph import saved_tensors_hooks

from bwsk_fx import _torch_private as private
from bwsk_fx._hooks import without_hooks
from bwsk_fx._side_effects import kept_attributes
from bwsk_fx._state_watch import kept_python_states
from bwsk_fx.errors import PlanError, first_line
from bwsk_fx.planning.allocate import fewest_kept, least_memory, least_time
from bwsk_fx.planning.options import PlanOptions
from bwsk_fx.planning.program import Program
from bwsk_fx.reversible import Foreseen, ReversibleRegion, ambient_state, kind_of
from bwsk_fx.rules.inverse_linear import stands_for
from bwsk_fx.signature import frozen, tensors_of


@dataclass(frozen=True)
class Foresight:
    """A step of a graph before it is run.

    Attributes:
        regions: How its regions are called, in the order of execution.
        outside_bytes: What autograd keeps between them.
    """

    regions: tuple[Foreseen, ...]
    outside_bytes: int

    def candidates(self) -> list[tuple[Program, ...]]:
        """Return the programs that each region could follow."""
        return [foreseen.prospect.candidates for foreseen in self.regions]


@dataclass
class Planner:
    """A forward pre-hook of a rewritten graph that chooses what its regions run.

    Attributes:
        options: What the plan is asked for.
    """

    options: PlanOptions
    _met: set[Hashable] = field(default_factory=set, repr=False)

    def __call__(self, graph: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Plan, unless this kind of input has been met before.

        Raises:
            PlanError: Nothing fits the bound on memory, or the step cannot be foreseen and memory is bounded.
        """
        if not torch.is_grad_enabled() or private.inside_function_transform():
            return
        kind = _kind(graph, args, kwargs)
        if kind not in self._met:
            self._plan(graph, args, kwargs)
            self._met.add(kind)

    def __deepcopy__(self, memo: dict[int, Any]) -> Planner:
        return Planner(self.options)

    def _plan(self, graph: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        foresight = self._foresee(graph, args, kwargs)
        if foresight is None or not foresight.regions:
            return
        candidates = foresight.candidates()
        for foreseen, programs, index in zip(
            foresight.regions, candidates, choose(candidates, self.options, foresight.outside_bytes), strict=True
        ):
            foreseen.region.choose(foreseen.kind, programs[index])

    def _foresee(self, graph: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Foresight | None:
        try:
            return foresee(graph, args, kwargs)
        except PlanError as error:
            if self.options.bounds_memory:
                raise
            warnings.warn(f"{error}; each region spends the budget by itself", stacklevel=2)
            return None


def choose(candidates: Sequence[Sequence[Program]], options: PlanOptions, outside: int) -> list[int]:
    """Return, per region, which of its programs is right for `options`.

    Raises:
        PlanError: Nothing fits the bound on memory.
    """
    plans = [[program.plan for program in programs] for programs in candidates]
    if not options.bounds_memory:
        local = options.is_local
        return fewest_kept(plans, options.budget) if local else least_memory(plans, options.budget, outside)
    kept = None
    if options.activation_fraction is not None:
        conventional = outside + sum(own[0].conventional_bytes for own in plans)
        kept = int(options.activation_fraction * conventional)
    return least_time(plans, options.budget, peak=options.memory, kept=kept, outside=outside)  # type: ignore[arg-type]


def foresee(graph: fx.GraphModule, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Foresight:
    """Run a rewritten graph on fake tensors, in the caller's autocast state, and trace each of its regions.

    Args:
        graph: What `fuse_regions` returned.
        args: Positional arguments of its call; read for shapes, strides, dtypes and devices only.
        kwargs: Keyword arguments, likewise.

    Raises:
        PlanError: An operator between regions needs real numbers, or a region cannot be traced.
    """
    mode = private.fake_mode()
    fakes: dict[int, Tensor] = {}

    def fake(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in fakes:
            fakes[id(value)] = private.fake_tensor(mode, value)
            stands_for(fakes[id(value)], value)
        return fakes[id(value)]

    placeholders = [str(node.target) for node in graph.graph.find_nodes(op="placeholder")]
    named = dict(zip(placeholders, args, strict=False)) | dict(kwargs)
    own = {name: fake(tensor) for name, tensor in tensors_of(graph).items()}
    run = _FakeRun(graph, own.values())
    with (
        kept_python_states(),
        kept_attributes(graph),
        without_hooks(graph),
        mode,
        private.swapped_parameters(graph, own),
    ):
        try:
            run.run(*(fake(named[name]) for name in placeholders if name in named))
        except (PlanError, KeyboardInterrupt):
            raise
        except Exception as error:
            raise PlanError(
                f"node {run.at} cannot be run on fake tensors, so that regions cannot be planned together "
                f"({type(error).__name__}: {first_line(error)})"
            ) from error
    return Foresight(tuple(run.regions), sum(run.saved.values()))


class _FakeRun(fx.Interpreter):
    """Calls `foresee` of each region instead of running it, and weighs what autograd saves between them."""

    def __init__(self, graph: fx.GraphModule, own: Iterable[Tensor]) -> None:
        super().__init__(graph)
        # Errors are ours, and name the node themselves.
        self.extra_traceback = False
        self.regions: list[Foreseen] = []
        self.saved: dict[int, int] = {}
        self.at = ""
        self._own = set(map(private.storage_key, own))

    def run_node(self, n: fx.Node) -> Any:
        self.at = n.name
        module = self.fetch_attr(str(n.target)) if n.op == "call_module" else None
        if isinstance(module, ReversibleRegion):
            args, _ = self.fetch_args_kwargs_from_env(n)
            foreseen = module.foresee(*args)
            if foreseen is not None:
                self.regions.append(foreseen)
                return foreseen.outputs
        with saved_tensors_hooks(self._weigh, lambda tensor: tensor):
            return super().run_node(n)

    def _weigh(self, tensor: Tensor) -> Tensor:
        key = private.storage_key(tensor)
        if key not in self._own:
            self.saved[key] = tensor.untyped_storage().nbytes()
        return tensor


def _kind(graph: fx.GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Hashable:
    values = (*args, *kwargs.values())
    inputs = tuple(kind_of(value) if isinstance(value, Tensor) else frozen(value) for value in values)
    wanted = tuple(parameter.requires_grad for parameter in graph.parameters())
    device = next((value.device.type for value in values if isinstance(value, Tensor)), "cpu")
    return inputs, tuple(kwargs), wanted, graph.training, ambient_state(device)
