"""What a training step keeps and holds: bytes saved for the backward pass, and peak live tensor bytes.

Several figures, because each hides what the others show. *Saved bytes* say what the forward pass leaves for the
backward pass, *peak bytes* what is alive at the worst moment of a step, *static bytes* what the model weighs
before it computes anything. The timeline shows where in the step the bytes are.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from bwsk_fx._storage_watch import CopyWatch, Recording, StorageRecorder, tensors_in

Inputs = Mapping[str, Any] | tuple[Any, ...] | Tensor


@dataclass(frozen=True)
class StepMemory:
    """Memory of one training step, forward and backward, without the optimizer.

    Attributes:
        saved_bytes: see `saved_for_backward`.
        peak_bytes: see `peak_live_bytes`.
        peak_activation_bytes: the same peak with the parameters' gradients left out, so that it compares
            what two ways of running the same weights hold beyond them.
        static_bytes: distinct storages of parameters and buffers.
        parameter_bytes: distinct storages of parameters alone.
        gradient_bytes: distinct storages of the parameters' gradients after the step.
        weight_copy_bytes: the part of `saved_bytes` in copies of parameters, see `saved_weight_copies`.
        timeline: the live bytes of the step, with the gradients.
    """

    saved_bytes: int
    peak_bytes: int
    peak_activation_bytes: int
    static_bytes: int
    parameter_bytes: int
    gradient_bytes: int
    weight_copy_bytes: int
    timeline: Timeline

    @property
    def buffer_bytes(self) -> int:
        """Distinct storages of buffers that are no parameter's."""
        return self.static_bytes - self.parameter_bytes

    @property
    def activation_bytes(self) -> int:
        """What the forward pass keeps for the backward pass besides copies of parameters."""
        return self.saved_bytes - self.weight_copy_bytes


@dataclass(frozen=True)
class Timeline:
    """Live tensor bytes of one training step, as `peak_live_bytes` counts them.

    Attributes:
        live_bytes: bytes alive after each allocation and each release of a storage, in order, above those that were
            alive before the step.
        forward_events: how many of them the forward pass made; the rest is the backward pass's.
    """

    live_bytes: tuple[int, ...]
    forward_events: int

    def highest(self, points: int) -> list[int]:
        """The place of the highest point in each of at most so many stretches of events; the peak is among them."""
        live = self.live_bytes
        stride = -(-len(live) // points) or 1
        stretches = (range(start, min(start + stride, len(live))) for start in range(0, len(live), stride))
        return [max(stretch, key=live.__getitem__) for stretch in stretches]


def saved_for_backward(model: nn.Module, inputs: Inputs, autocast_dtype: torch.dtype | None = None) -> int:
    """Bytes that one forward pass keeps for its backward pass.

    Counted: every distinct storage that autograd saves, at its full size (a saved view keeps its whole base
    alive), through `torch.autograd.graph.saved_tensors_hooks`; that covers built-in operators and
    `ctx.save_for_backward` of custom Functions. Copies of weights, such as the half-precision casts that
    autocast makes, are counted, and so is an input that an operator saves. Not counted: the storages of the
    model's own parameters and buffers, which are there anyway, and tensors that a Function puts on `ctx` by
    other means.

    The model runs as it is (call `train()` before) and is left as it was: gradients, buffers, random state.

    Args:
        model: the model; its output must be a loss, or carry one as `loss` or as its first element.
        inputs: what the model is called with: keyword arguments, positional arguments, or one tensor.
        autocast_dtype: run under autocast with this dtype, as mixed-precision training does.

    Returns:
        The number of bytes.
    """
    with _undisturbed(model):
        # Captured graphs and kernels that are built on the first call must not be part of the figure.
        _forward(model, inputs, autocast_dtype)
        return _saved_bytes(model, inputs, autocast_dtype)


def saved_weight_copies(model: nn.Module, inputs: Inputs, autocast_dtype: torch.dtype | None = None) -> int:
    """The part of `saved_for_backward` that is made of copies of the model's own parameters.

    Counted: the storages that autograd saves and that `aten._to_copy` (a cast) or `aten.clone` (a copy, or another
    layout) made of a parameter, or of such a copy. Under autocast these are the half-precision weights. A copy of a
    parameter that was expanded first, as one for every sample, is an activation. Not seen: copies that code
    that Inductor generated makes.

    Args:
        model: as for `saved_for_backward`.
        inputs: as for `saved_for_backward`.
        autocast_dtype: as for `saved_for_backward`.

    Returns:
        The number of bytes.
    """
    with _undisturbed(model):
        _forward(model, inputs, autocast_dtype)
        return _saved_weight_copies(model, inputs, autocast_dtype)


def peak_live_bytes(
    model: nn.Module,
    inputs: Inputs,
    autocast_dtype: torch.dtype | None = None,
    *,
    count_gradients: bool = True,
) -> int:
    """The most bytes of tensors alive at one time during a forward and a backward pass.

    Counted: distinct storages of every tensor that an operator returns during the step, also inside custom
    autograd Functions and in the backward pass, from its creation until its storage is freed. Not counted:
    what was alive before (parameters, buffers, inputs), work space inside a single kernel, and what code that
    Inductor generated holds while it runs. The figure is exact and repeatable on the CPU; on CUDA `measure` reports
    the allocator's own peak instead.

    Args:
        model: as for `saved_for_backward`.
        inputs: as for `saved_for_backward`.
        autocast_dtype: as for `saved_for_backward`.
        count_gradients: whether the gradients of parameters, which accumulate during the backward pass, count.

    Returns:
        The number of bytes.
    """
    with _undisturbed(model):
        _step(model, inputs, autocast_dtype)
        recording = _record_step(model, inputs, autocast_dtype)
    return recording.peak() if count_gradients else recording.peak(without=recording.kept)


def static_bytes(model: nn.Module) -> int:
    """Bytes of the distinct storages of the model's parameters and buffers; tied weights count once."""
    return _bytes_of(itertools.chain(model.parameters(), model.buffers()))


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the distinct storages of the tensors in an optimizer's state, step counters included.

    The state is empty before the first step.
    """
    return _bytes_of(tensors_in(list(optimizer.state.values())))


def measure(model: nn.Module, inputs: Inputs, autocast_dtype: torch.dtype | None = None) -> StepMemory:
    """All memory figures of one training step; the model is left as it was.

    On CUDA `peak_bytes` is what `torch.cuda.max_memory_allocated` rises by during the step, work space and
    rounding of the allocator included; elsewhere it is `peak_live_bytes`.
    """
    with _undisturbed(model):
        _step(model, inputs, autocast_dtype)
        saved = _saved_bytes(model, inputs, autocast_dtype)
        weight_copies = _saved_weight_copies(model, inputs, autocast_dtype)
        recording = _record_step(model, inputs, autocast_dtype)
        # Now: freeing the gradients is no longer part of the step.
        timeline = Timeline(recording.live_bytes(), recording.forward_events)
        gradients = _bytes_of(parameter.grad for parameter in model.parameters() if parameter.grad is not None)
        _drop_gradients(model)
        peak = _cuda_peak(model, inputs, autocast_dtype) if _device(model).type == "cuda" else recording.peak()
    return StepMemory(
        saved_bytes=saved,
        peak_bytes=peak,
        peak_activation_bytes=recording.peak(without=recording.kept),
        static_bytes=static_bytes(model),
        parameter_bytes=_bytes_of(model.parameters()),
        gradient_bytes=gradients,
        weight_copy_bytes=weight_copies,
        timeline=timeline,
    )


def _saved_weight_copies(model: nn.Module, inputs: Inputs, autocast_dtype: torch.dtype | None) -> int:
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if watch.knows(storage):
            sizes[storage._cdata] = storage.nbytes()
        return tensor

    with CopyWatch(model.parameters()) as watch, saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = _forward(model, inputs, autocast_dtype)
    # Until here the graph holds what it saved, so that no address was used twice.
    del loss
    return sum(sizes.values())


def _saved_bytes(model: nn.Module, inputs: Inputs, autocast_dtype: torch.dtype | None) -> int:
    own = _own_storages(model)
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        # Holding the storage keeps its address from being used again before the sum is taken.
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = _forward(model, inputs, autocast_dtype)
    total = sum(storage.nbytes() for storage in saved.values())
    del loss
    return total


def _record_step(model: nn.Module, inputs: Inputs, autocast_dtype: torch.dtype | None) -> Recording:
    _drop_gradients(model)
    known = set(_own_storages(model))
    known.update(tensor.untyped_storage()._cdata for tensor in tensors_in(inputs))
    with StorageRecorder(known) as recorder:
        loss = _forward(model, inputs, autocast_dtype)
        recorder.recording.forward_events = len(recorder.recording.events)
        loss.backward()
        del loss
    gradients = (parameter.grad for parameter in model.parameters() if parameter.grad is not None)
    serials = (recorder.serial_of(gradient) for gradient in gradients)
    recorder.recording.kept = frozenset(serial for serial in serials if serial is not None)
    return recorder.recording


def _cuda_peak(model: nn.Module, inputs: Inputs, autocast_dtype: torch.dtype | None) -> int:
    device = _device(model)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    _step(model, inputs, autocast_dtype)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _step(model: nn.Module, inputs: Inputs, autocast_dtype: torch.dtype | None) -> None:
    _forward(model, inputs, autocast_dtype).backward()


def _forward(model: nn.Module, inputs: Inputs, autocast_dtype: torch.dtype | None) -> Tensor:
    with torch.enable_grad(), _autocast(_device(model), autocast_dtype):
        if isinstance(inputs, Mapping):
            output = model(**inputs)
        else:
            output = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    return loss_of(output)


def loss_of(output: Any) -> Tensor:
    """The loss of a model's output: its `loss`, or its first element, summed up where it is not a number."""
    loss = getattr(output, "loss", None)
    if loss is None:
        loss = output if isinstance(output, Tensor) else output[0]
    # A model without a loss still has a backward pass; a sum reaches every element of its output.
    return loss if loss.dim() == 0 else loss.float().sum()


def _autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Gives gradients, buffers and random state back as they were."""
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    _drop_gradients(model)
    device = _device(model)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def _drop_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = None


def _own_storages(model: nn.Module) -> dict[int, torch.UntypedStorage]:
    tensors = itertools.chain(model.parameters(), model.buffers())
    return {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
