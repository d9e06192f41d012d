"""Capture: `nn.Module` to torch-level `torch.fx.GraphModule`, by running the model once and recording.

The model runs on fake tensors with a symbolic batch size, so nothing is computed and the graph holds for other
batch sizes. Leaf modules become `call_module` nodes under their original paths.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from bwsk_fx import _torch_private as private
from bwsk_fx._attributes import ReadAttributes
from bwsk_fx._hooks import lost_hook, without_hooks
from bwsk_fx._recorder import Recorder, default_is_leaf
from bwsk_fx._side_effects import emptied_caches, kept_attributes
from bwsk_fx._source_lines import function_in, user_frame
from bwsk_fx._state_watch import kept_python_states
from bwsk_fx.arguments import require_examples, require_model, require_not_applied
from bwsk_fx.errors import CaptureError, first_line
from bwsk_fx.graphs import before_each_call
from bwsk_fx.signature import tensors_of

ExampleInputs = torch.Tensor | Sequence[Any] | Mapping[str, Any]
_HOOKS = "saved_tensor_hooks"
_HOOK_ADVICE = (
    "which a graph of torch calls would not run: remove it, register it on a leaf module (see is_leaf of capture) "
    "or, with apply, on the model itself"
)
AutocastState = tuple[tuple[str, torch.dtype | None], ...]


def capture(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    is_leaf: Callable[[nn.Module], bool] = default_is_leaf,
) -> fx.GraphModule:
    """Record `model` as a torch-level graph.

    Args:
        model: Any module; its parameters, buffers and submodules are shared with the result, not copied.
        example_inputs: One tensor, positional inputs, or keyword inputs. Tensors become placeholders whose first
            dimension is the symbolic batch; anything else is a constant of the graph.
        is_leaf: Which submodules become one `call_module` node: by default those of `torch.nn` and those
            without children. A leaf may branch on data: it is then run on random data of several batch sizes for
            the shapes of its result, which must follow from the batch size.

    Returns:
        A `GraphModule` with the same `state_dict` keys as `model`. Every node carries `meta["val"]` (fake
        tensors), `meta["nn_module_stack"]` and the user's source line as `stack_trace`.

    Raises:
        CaptureError: The model branches on data, fails on the inputs, or returns something that is not made of
            tensors; the message names the source line.
    """
    return captured(model, example_inputs, is_leaf=is_leaf)[0]


def captured(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    is_leaf: Callable[[nn.Module], bool] = default_is_leaf,
) -> tuple[fx.GraphModule, ReadAttributes]:
    """Do what `capture` does, and return which attributes of modules are constants of the graph as well."""
    with private.ONE_AT_A_TIME:
        return _captured(model, example_inputs, is_leaf)


def _captured(
    model: nn.Module, example_inputs: ExampleInputs, is_leaf: Callable[[nn.Module], bool]
) -> tuple[fx.GraphModule, ReadAttributes]:
    require_model(model, CaptureError)
    require_not_applied(model)
    if not callable(is_leaf):
        raise CaptureError(f"is_leaf is a {type(is_leaf).__name__}: expected a function that takes a module")
    _require_whole_parameters(model)
    inputs, graph_module, guard, attributes = _record_any_batch(model, _bind(model, example_inputs), is_leaf)
    _warn_of_hooks(model, graph_module)
    if not _depends_on_mode(model, inputs, is_leaf, graph_module):
        guard = replace(guard, training=None)
    before_each_call(graph_module, guard)
    return graph_module, attributes


@dataclass(frozen=True)
class GraphGuard:
    """Forward pre-hook that refuses inputs and modes for which the graph was not captured.

    Attributes:
        training: The only mode the graph is valid in, or None when it holds in both.
        autocast: The only autocast state it is valid in, as (device type, dtype or None) pairs; None when it holds
            in all.
        conditions: Conditions on batch symbols that the model's Python code branched on.
        symbols: Batch symbol to (placeholder name, dimension).
        open_modules: Paths of the modules whose Python code was recorded: nothing calls them, so that hooks on them
            would not run.
        ones: Inputs whose first size was one beside larger ones, which only that size broadcasts like.
    """

    training: bool | None
    autocast: AutocastState | None
    conditions: tuple[Any, ...]
    symbols: tuple[tuple[Any, tuple[str, int]], ...]
    open_modules: tuple[str, ...]
    ones: tuple[str, ...] = ()

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Raise `CaptureError` where the captured control flow does not hold, or a hook would not run."""
        if lost := lost_hook(_present(module, self.open_modules)):
            raise CaptureError(f"{lost}, {_HOOK_ADVICE}")
        if self.training is not None and module.training != self.training:
            modes = {True: "train", False: "eval"}
            raise CaptureError(
                f"this graph was captured in {modes[self.training]} mode and the model computes something else in "
                f"{modes[module.training]} mode outside its leaf modules (dropout inside attention, for example); "
                "put the model in that mode and capture it again"
            )
        if self.autocast is not None and self.autocast != autocast_state():
            raise CaptureError(
                f"this graph was captured under autocast {_in_words(self.autocast)} and is run under "
                f"{_in_words(autocast_state())}: the model's Python code casts to the dtype of an activation, "
                "which autocast decides; capture it again inside the autocast block that it runs in"
            )
        if self.conditions or self.ones:
            names = [node.target for node in module.graph.find_nodes(op="placeholder")]  # type: ignore[union-attr, operator]
            if broken := self.broken(dict(zip(names, args, strict=False)) | kwargs):
                raise CaptureError(f"{broken}; capture it again with inputs of this size")

    def broken(self, inputs: Mapping[str, Any]) -> str | None:
        """Say which condition on sizes some inputs do not fulfil; None where the graph holds for them."""
        for name in self.ones:
            if name in inputs and inputs[name].shape[0] != 1:
                return (
                    f"the captured graph requires the first size of '{name}' to be 1, where it is now "
                    f"{inputs[name].shape[0]}"
                )
        if not self.conditions:
            return None
        sizes = {symbol: inputs[name].shape[dim] for symbol, (name, dim) in self.symbols}
        for condition in self.conditions:
            if condition.subs(sizes) == False:  # noqa: E712 (a sympy truth value)
                found = ", ".join(
                    f"{symbol} is dimension {dim} of '{name}', now {sizes[symbol]}"
                    for symbol, (name, dim) in self.symbols
                )
                return (
                    f"the captured graph requires {condition}, where {found}: the model's code, or an operator such as "
                    "squeeze, branches on this size"
                )
        return None


def holds_for(graph_module: fx.GraphModule, inputs: Mapping[str, Any]) -> bool:
    """Whether a captured graph, or what passes made of it, is right for inputs of these sizes."""
    guards = (hook for hook in graph_module._forward_pre_hooks.values() if isinstance(hook, GraphGuard))
    return all(guard.broken(inputs) is None for guard in guards)


def _present(module: nn.Module, paths: Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
    """Yield the submodules at some paths; a stage of a pipeline has some of the model's modules only."""
    for path in paths:
        found: nn.Module | None = module
        for name in path.split("."):
            found = None if found is None else found._modules.get(name)
        if found is not None:
            yield path, found


def _bind(model: nn.Module, example_inputs: ExampleInputs) -> dict[str, Any]:
    require_examples(example_inputs)
    signature = inspect.signature(model.forward)
    if isinstance(example_inputs, torch.Tensor):
        example_inputs = (example_inputs,)
    args, kwargs = ((), example_inputs) if isinstance(example_inputs, Mapping) else (example_inputs, {})
    try:
        return flat_arguments(signature, args, kwargs)
    except TypeError as error:
        raise CaptureError(f"the example inputs do not fit {type(model).__name__}.forward: {error}") from error


def flat_arguments(signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Bind a call's arguments to parameter names, those of `**kwargs` included.

    Raises:
        TypeError: The arguments do not fit.
        CaptureError: The signature takes `*args`, which have no names.
    """
    flat: dict[str, Any] = {}
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            flat.update(value)
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            raise CaptureError(f"this forward method takes *{name}: pass its inputs by keyword")
        else:
            flat[name] = value
    return flat


def _record_any_batch(
    model: nn.Module, inputs: dict[str, Any], is_leaf: Callable[[nn.Module], bool]
) -> tuple[dict[str, Any], fx.GraphModule, GraphGuard, ReadAttributes]:
    """Record `model`, for a batch of one alone where it does something else with that; the inputs used come first."""
    several = _without_single_batch(inputs)
    try:
        graph_module, guard, attributes = _record(model, several, is_leaf)
    except CaptureError:
        if several is inputs:
            raise
    else:
        if several is inputs or guard.broken(inputs) is None:
            return several, graph_module, guard, attributes
    return inputs, *_record(model, inputs, is_leaf)


def _record(
    model: nn.Module, inputs: Mapping[str, Any], is_leaf: Callable[[nn.Module], bool]
) -> tuple[fx.GraphModule, GraphGuard, ReadAttributes]:
    """Run `model` once on fakes; the random state and the model's own tensors stay as they are."""
    mode = private.fake_mode()
    fakes = {name: private.fake_tensor(mode, tensor) for name, tensor in _own_tensors(model).items()}
    recorder = Recorder(model, fakes, tensors_of(model), is_leaf)
    _require_no_lost_hook(model, recorder)
    with (
        kept_attributes(model),
        emptied_caches(model),
        without_hooks(model),
        torch.random.fork_rng(devices=()),
        kept_python_states(),
        mode,
        private.python_kernels(),
        private.swapped_parameters(model, fakes),
    ):
        arguments = {name: _placeholder(recorder, mode, name, value) for name, value in inputs.items()}
        _run(model, recorder, arguments)
        attributes = ReadAttributes.of(model, recorder.attributes_read)
    # Once more: leaves that are called with modules have turned out to be open.
    open_modules = _require_no_lost_hook(model, recorder)
    graph_module = _assemble(model, recorder)
    graph_module.meta[_HOOKS] = recorder.saved_tensor_hooks
    autocast = autocast_state() if recorder.uses_dtype else None
    symbols = tuple(recorder.sizes.symbols.items())
    open_paths = tuple(path for path, _ in open_modules if path)
    ones = tuple(name for name, value in inputs.items() if _first_size(value) == 1)
    guard = GraphGuard(model.training, autocast, tuple(recorder.sizes.conditions), symbols, open_paths, ones)
    # Those that the run itself has changed, caches for example, are as they were again.
    return graph_module, guard, attributes.still()


def _require_no_lost_hook(model: nn.Module, recorder: Recorder) -> tuple[tuple[str, nn.Module], ...]:
    """Return the modules whose code is recorded, none of which carries a hook."""
    open_modules = tuple(recorder.open_modules())
    if lost := lost_hook(open_modules):
        raise CaptureError(f"cannot capture {type(model).__name__}: {lost}, {_HOOK_ADVICE}")
    return open_modules


def _first_size(value: Any) -> int | None:
    return value.shape[0] if isinstance(value, torch.Tensor) and value.dim() else None


def _run(model: nn.Module, recorder: Recorder, arguments: dict[str, Any]) -> None:
    # Of all modules: which of the leaves are recorded call by call shows when they are called.
    buffers = {name: module._buffers.copy() for name, module in model.named_modules(remove_duplicate=False)}
    numbers = {name: _numbers(module) for name, module in model.named_modules(remove_duplicate=False)}
    try:
        with recorder:
            output = model(**arguments)
        recorder.finish(output)
        for name, module in recorder.open_modules():
            _require_same_buffers(name, module, buffers[name])
            _warn_of_numbers(name, module, numbers[name])
    except Exception as error:
        raise CaptureError(_explain(model, error)) from error


def _warn_of_hooks(model: nn.Module, graph_module: fx.GraphModule) -> None:
    if places := graph_module.meta.pop(_HOOKS):
        warnings.warn(
            f"{type(model).__name__} uses torch.utils.checkpoint or other hooks on saved tensors, which the captured "
            f"graph does without: plans decide on what is recomputed; switch them off "
            f"(gradient_checkpointing_disable() in transformers) to silence this. First at {places[0]}",
            stacklevel=5,
        )


def _require_same_buffers(path: str, module: nn.Module, before: Mapping[str, Any]) -> None:
    for name, tensor in module._buffers.items():
        if tensor is not before.get(name):
            raise CaptureError(
                f"{type(module).__name__}.forward gives buffer '{f'{path}.{name}'.lstrip('.')}' a new tensor, which a "
                "graph cannot; write into the old one with copy_ or another in-place method"
            )


def _numbers(module: nn.Module) -> dict[str, float]:
    plain = (int, float)
    return {name: value for name, value in vars(module).items() if type(value) in plain}


def _warn_of_numbers(path: str, module: nn.Module, before: Mapping[str, float]) -> None:
    now = _numbers(module)
    for name, value in before.items():
        if now.get(name, value) != value:
            warnings.warn(
                f"{type(module).__name__}.forward changes the number '{f'{path}.{name}'.lstrip('.')}' from {value} to "
                f"{now[name]}, which a graph does in no later step; make it a buffer and change that in place",
                stacklevel=7,
            )


def _own_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _require_whole_parameters(model: nn.Module) -> None:
    for name, tensor in _own_tensors(model).items():
        if hasattr(tensor, "full_tensor"):
            raise CaptureError(
                f"'{name}' is a DTensor, which a graph cannot hold: capture the model before fully_shard or "
                "parallelize_module. To train with regions, use bwsk_fx.parallel.fully_shard_blocks, which puts them "
                "into the blocks that FSDP2 gathers, or tensor_parallel, which shards the graph itself"
            )


def _without_single_batch(inputs: dict[str, Any]) -> dict[str, Any]:
    """Double inputs whose batch is one, which operators would broadcast: the symbol stands for any size anyway."""
    if {*map(_first_size, inputs.values())} - {None} != {1}:
        return inputs
    return {name: value if _first_size(value) is None else torch.cat([value, value]) for name, value in inputs.items()}


def _placeholder(recorder: Recorder, mode: Any, name: str, value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        if any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(value)):
            raise CaptureError(f"input '{name}' is a {type(value).__name__} of tensors; inputs are single tensors")
        return value
    # A one among larger batches is there to be broadcast, and stays one.
    batched = value.dim() and value.shape[0] > 1
    return recorder.add_placeholder(name, private.fake_tensor(mode, value, dynamic_dims=(0,) if batched else ()))


def autocast_state() -> AutocastState:
    """Return the autocast dtype of each kind of device; None where autocast is off."""
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    return tuple(
        (device, torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None) for device in devices
    )


def _in_words(state: AutocastState) -> str:
    return ", ".join(f"{device} {str(dtype).removeprefix('torch.') if dtype else 'off'}" for device, dtype in state)


def _assemble(model: nn.Module, recorder: Recorder) -> fx.GraphModule:
    graph_module = fx.GraphModule(recorder.constants_root(), recorder.graph, class_name=type(model).__name__)
    # The model's own children, not copies: paths, tied parameters, non-persistent buffers and order all stay.
    for name in ("_modules", "_parameters", "_buffers"):
        own, found = getattr(model, name), getattr(graph_module, name)
        # fx has put bare modules there, in the order in which the graph calls what is in them.
        constants = {path: member for path, member in found.items() if path not in own}
        found.clear()
        found.update({**own, **constants})
    graph_module._non_persistent_buffers_set.update(model._non_persistent_buffers_set, recorder.constants)
    graph_module.training = model.training
    graph_module.graph.lint()
    return graph_module


def _depends_on_mode(
    model: nn.Module,
    inputs: Mapping[str, Any],
    is_leaf: Callable[[nn.Module], bool],
    captured: fx.GraphModule,
) -> bool:
    """Whether the other of train and eval mode records another graph; a model that fails there counts as yes."""
    modes = {module: module.training for module in model.modules()}
    model.train(not model.training)
    try:
        other, *_ = _record(model, inputs, is_leaf)
    except CaptureError:
        return True
    finally:
        for module, training in modes.items():
            module.training = training
    return other.code != captured.code


def _explain(model: nn.Module, error: Exception) -> str:
    cause = first_line(error)
    if not isinstance(error, CaptureError):
        cause = f"{type(error).__name__}: {cause}{_advice(error)}"
    place = user_frame(error.__traceback__)
    return ": ".join(part for part in (f"cannot capture {type(model).__name__}", place, cause) if part)


def _advice(error: Exception) -> str:
    """Return what a user can do about an error of PyTorch's own, where that is known."""
    if operator := function_in(error.__traceback__, "_higher_order_ops/"):
        return (
            f" ({operator} runs functions that a graph of torch calls cannot hold; choose with torch.where, or write "
            "the loop in Python)"
        )
    if isinstance(error, private.data_dependent_errors()):
        return (
            " (Python code takes the value of a tensor, which differs from step to step; choose with torch.where, or "
            "let is_leaf name the module that does it)"
        )
    return ""
