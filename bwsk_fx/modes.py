"""`apply` and `restore`: put a model into a mode in place, so that whatever trains it goes on working, and back."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias, TypeVar, Unpack

import torch
from torch import fx, nn

from bwsk_fx._attributes import ReadAttributes
from bwsk_fx._hooks import is_hooked
from bwsk_fx._inside import require_gathered, require_no_fsdp1, unseen_by_hooks
from bwsk_fx.arguments import APPLIED, require_model
from bwsk_fx.capture import autocast_state, captured, flat_arguments, holds_for
from bwsk_fx.errors import CaptureError, RegionError
from bwsk_fx.passes.find_regions import FindRegions
from bwsk_fx.passes.fuse_regions import fuse_regions
from bwsk_fx.passes.type_nodes import type_nodes
from bwsk_fx.planning.options import PlanKeywords, PlanOptions, plan_options
from bwsk_fx.signature import HOOKS

MODES = ("conventional", "analyzed", "reversible")
_STATE = "_bwsk_applied"
Model = TypeVar("Model", bound=nn.Module)
# The captured graph, what it has become, and which attributes of modules are constants of it.
_Known: TypeAlias = tuple[fx.GraphModule, fx.GraphModule, ReadAttributes]


@dataclass
class Applied:
    """The mode of a model, and the graphs that it has been captured into so far.

    Attributes:
        mode: `analyzed` or `reversible`.
        plan: What the plan of the reversible mode is asked for.
        granularity: What becomes one region.
        original: The model's own class.
        graph: The captured, labelled graph of the latest training step; None before the first.
        rewritten: What that step ran: `graph` itself, or its fused form.
    """

    mode: str
    plan: PlanOptions
    granularity: str
    original: type[nn.Module]
    graph: fx.GraphModule | None = None
    rewritten: fx.GraphModule | None = None
    _graphs: dict[Hashable, list[_Known]] = field(default_factory=dict, repr=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Applied:
        # The copy of a model captures itself anew: these graphs hold the modules of the first.
        return Applied(self.mode, self.plan, self.granularity, self.original)

    def __reduce__(self) -> tuple[Any, ...]:
        return Applied, (self.mode, self.plan, self.granularity, self.original)

    def run(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a training step's forward pass in this mode; without gradients, the model's own."""
        if not torch.is_grad_enabled():
            return self.original.forward(model, *args, **kwargs)
        if getattr(model, "_is_replica", False):
            raise RegionError("a rewritten model cannot run under nn.DataParallel; use DistributedDataParallel")
        require_gathered(model)
        # Bound, so that the first parameter may have any name.
        inputs = flat_arguments(inspect.signature(self.original.forward.__get__(model)), args, kwargs)
        self.graph, self.rewritten, _ = self._graphs_for(model, inputs)
        self.rewritten.training = model.training
        # What `load_state_dict(assign=True)` or a conversion has put in place of the captured ones.
        self.rewritten._parameters.update(model._parameters)
        self.rewritten._buffers.update(model._buffers)
        return self.rewritten(**{name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)})

    def _graphs_for(self, model: nn.Module, inputs: dict[str, Any]) -> _Known:
        """Return the captured graph and what it has become, captured now where no earlier one holds."""
        known = self._graphs.setdefault(_key(model, inputs), [])
        found = next((each for each in known if holds_for(each[0], inputs)), None)
        if found is not None and (changed := found[2].changed()) is not None:
            warnings.warn(
                f"attribute '{changed}' of this {type(model).__name__} has changed since the model was captured, and "
                "Python code reads it: the model is captured and planned anew; make what changes often a buffer",
                stacklevel=4,
            )
            known.remove(found)
            found = None
        if found is None:
            with unseen_by_hooks():
                found = self._rewrite(model, inputs)
            known.append(found)
        return found

    def _rewrite(self, model: nn.Module, inputs: dict[str, Any]) -> _Known:
        require_no_fsdp1(model)
        with _as_it_was(model, self.original):
            graph, attributes = captured(model, inputs)
        type_nodes(graph)
        if self.mode == "analyzed":
            return graph, graph, attributes
        return graph, fuse_regions(graph, granularity=self.granularity, **asdict(self.plan)), attributes


def apply(
    model: Model,
    mode: str = "reversible",
    *,
    budget: float | None = None,
    granularity: str = "block",
    **options: Unpack[PlanKeywords],
) -> Model:
    """Put a model into a mode, in place.

    The model keeps its class name, its parameters, its `state_dict` keys and its signature, so that
    `save_pretrained`, `Trainer` and `DistributedDataParallel` work as before. It is captured in its first training
    step, once for each kind of input; calls under `torch.no_grad()` run the model's own forward method.

    Args:
        model: Any module that `capture` takes.
        mode: `reversible` trains with reversible regions; `analyzed` runs the captured graph with every node
            labelled; `conventional` takes an earlier mode back.
        budget: For `reversible`, see `fuse_regions`.
        granularity: For `reversible`, see `fuse_regions`.
        options: For `reversible`, see `fuse_regions`.

    Returns:
        The model.

    Raises:
        RegionError: The mode is unknown.
        PlanError: An option is out of range.
    """
    require_model(model, RegionError)
    if mode not in MODES:
        raise RegionError(f"mode is {mode!r}: expected one of {', '.join(map(repr, MODES))}")
    FindRegions(granularity)  # checks it
    plan = plan_options(budget, **options)
    if applied(model) is not None:
        restore(model)
    original = type(model)
    if mode != "conventional":
        model.__dict__[_STATE] = Applied(mode, plan, granularity, original)
        model.__class__ = _applied_class(original)  # type: ignore[arg-type, assignment]
    return model


def restore(model: Model) -> Model:
    """Take back what `apply` did, in place.

    Class and forward method are what they were; parameters, buffers and submodules are the same objects throughout.
    A wrapper that was put on the forward method in the meantime, as accelerate does for autocast, stays, and runs the
    model's own forward method from now on.

    Returns:
        The model.

    Raises:
        RegionError: The model is in no mode, or its class has been changed again since.
    """
    require_model(model, RegionError)
    state = applied(model)
    if state is None:
        raise RegionError(f"this {type(model).__name__} is in no mode: put it into one with apply first")
    if type(model) is not _applied_class(state.original):  # type: ignore[arg-type]
        raise RegionError(
            f"the model's class has become {type(model).__name__} since apply, as fully_shard does: take that off first"
        )
    del model.__dict__[_STATE]
    model.__class__ = state.original  # type: ignore[assignment]
    return model


def applied(model: nn.Module) -> Applied | None:
    """Return the mode that `apply` put a model into; None for a model as it was."""
    return vars(model).get(_STATE) if isinstance(model, nn.Module) else None


@functools.cache
def _applied_class(original: type[nn.Module]) -> type[nn.Module]:
    @functools.wraps(original.forward)
    @torch.compiler.disable(reason="bwsk_fx.apply has planned this model, and a compiler would plan it again")
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        state = applied(self)
        # Whoever has bound this method calls it after `restore` too.
        return original.forward(self, *args, **kwargs) if state is None else state.run(self, args, kwargs)

    def reduced(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        reduction = original.__reduce_ex__(self, protocol)
        assert isinstance(reduction, tuple)  # a string names a global, which a module is not
        make, args, *rest = reduction
        # By name, a pickle would find the original class.
        return (_remade, (original, *args[1:]), *rest) if args[:1] == (type(self),) else (make, args, *rest)

    # Whoever unwraps a forward method, as accelerate does, has to stop here.
    del forward.__wrapped__
    setattr(forward, APPLIED, True)
    forward.__signature__ = inspect.signature(original.forward)  # type: ignore[attr-defined]
    # The name is part of what save_pretrained writes.
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    return type(original.__name__, (original,), {"forward": forward, "__reduce_ex__": reduced, **names})


def _remade(original: type[nn.Module], *args: Any) -> nn.Module:
    """Make the empty module that a pickle or a deep copy of a model in a mode fills."""
    model = original.__new__(original, *args)
    model.__class__ = _applied_class(original)  # type: ignore[arg-type, assignment]
    return model


@contextmanager
def _as_it_was(model: nn.Module, original: type[nn.Module]) -> Iterator[None]:
    """Give a model its own class back for a while, without forward methods and hooks that others have put on it.

    Its hooks run around the call that captures it, and those of FSDP would free its parameters inside.
    """
    rewritten, replaced = type(model), model.__dict__.pop("forward", None)
    hooks = {name: model.__dict__[name] for name in HOOKS}
    model.__class__ = original
    model.__dict__.update({name: OrderedDict() for name in HOOKS})
    try:
        yield
    finally:
        model.__class__ = rewritten
        model.__dict__.update(hooks)
        if replaced is not None:
            model.__dict__["forward"] = replaced


def _key(model: nn.Module, inputs: dict[str, Any]) -> Hashable:
    """Tell models and kinds of input apart: submodules, their modes, hooks and tensors, everything but the batch size.

    Of the batch size only equality counts, and a one among larger ones, which capture does not take for a batch.
    """
    firsts = {value.shape[0] for value in inputs.values() if isinstance(value, torch.Tensor) and value.dim()}
    sizes = {1: 1 if firsts == {1} else 0}
    # Those with hooks of their own stay outside of regions; hooks of the model run around its graph.
    modules = tuple(
        (id(module), module.training, module is not model and is_hooked(module), *_tensor_kinds(module))
        for module in model.modules()
    )
    kinds = tuple((name, _kind(name, value, sizes)) for name, value in inputs.items())
    # A model's own code may read dtypes, which autocast decides.
    return modules, autocast_state(), kinds


def _tensor_kinds(module: nn.Module) -> Iterator[Hashable]:
    """Yield sizes and dtypes of a module's own tensors, which Python code reads: embeddings may be resized."""
    for tensors in (module._parameters, module._buffers):
        yield from (None if tensor is None else (tensor.shape, tensor.dtype) for tensor in tensors.values())


def _kind(name: str, value: Any, sizes: dict[int, int]) -> Hashable:
    if isinstance(value, torch.Tensor):
        batch = sizes.setdefault(value.shape[0], len(sizes)) if value.dim() else None
        return batch, tuple(value.shape[1:]), value.dtype, value.device, value.requires_grad
    if value is None or isinstance(value, (bool, int, float, str)):
        return type(value), value
    raise CaptureError(
        f"argument '{name}' is a {type(value).__name__}: a rewritten model takes tensors, numbers, strings and None"
    )
