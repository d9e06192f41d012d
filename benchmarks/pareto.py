"""What does each way to save activation memory cost in time, and what in accuracy?

Every variant of `peers.py` trains one ViT: forward, backward and a fused AdamW step, with a gradient scaler in fp16.
Per variant:

* *ms* and *ratio*: median step time, and median of its ratio to eager's in the same round, both with the distance
  between quartiles (IQR). Every variant runs once per round, so that a busy machine slows all of them alike.
* *kept MiB*: bytes that the forward pass leaves for the backward pass, weights excluded and their half-precision
  copies included, see `bwsk_fx.measure`; *units* are the same in half-precision token×hidden tensors per layer.
* *peak MiB*: what one forward and backward pass allocates at its peak, gradients included: CUDA's allocator, or on the
  CPU live tensor bytes. The latter cannot be seen inside compiled code.
* *error*: distance of all gradients to those in float64, over the same distance of eager's; the result file also has
  the *relative error*, that distance over the length of all gradients.
* *max batch*, with `--max-batch`: the largest batch whose step, with weights, gradients and optimizer states, stays
  within `--memory` GiB. Measured on CUDA; on the CPU an estimate from the peaks at two batch sizes.

    python benchmarks/pareto.py
"""

from __future__ import annotations

import argparse
import copy
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from common import Shape, checkpointed, parser, report, shape_of
from pareto_plot import plot
from peers import FLOOR, Variant, budget_label, inductor_problem, methods, variants
from step_time import timed
from torch import Tensor, nn
from transformers import ViTForImageClassification

from bwsk_fx.measure import peak_live_bytes, static_bytes

QUESTION = "pareto"
ON_CPU = Shape(layers=6, hidden=192, batch=4, image=224, precision="bf16")
ON_CUDA = Shape(layers=12, hidden=768, batch=64, image=224, precision="fp16")
BUDGETS = [0.0, 0.05, 0.1, 0.15, 0.2, 0.25, FLOOR]
WARM_UP = 3
# Half-precision gradients of a mean are too small in fp16; a GradScaler ends near this.
FP16_LOSS_SCALE = 1024.0
# Of AdamW, per byte of parameters.
OPTIMIZER_BYTES = 2
# Times the batch: at small batches gradients, not activations, make the peak.
FITTED_AT = 8
UNSEEN = "the peak inside compiled code is not visible on this device"

Inputs = dict[str, Tensor]


def main(arguments: Sequence[str] | None = None) -> None:
    # Every compiled variant is another compilation of one forward method.
    torch._dynamo.config.recompile_limit = 64
    options = parsed(arguments)
    shape, problem = shape_of(options), inductor_problem(options.device)
    # Inductor's C++ for packing bits is slower than PyTorch's own operators.
    fuse = _is_cuda(options.device) and problem is None
    chosen = [v for v in variants(options.budgets, fuse=fuse) if v.method in options.only]
    base = shape.model(options.device)
    subjects = [Subject(v, problem if v.is_compiled else None) for v in chosen]
    usable = [subject for subject in subjects if subject.problem is None]
    judge = Judge(base, shape, options.device)
    for subject in usable:
        began = time.perf_counter()
        judge.examine(subject)
        print(f"{subject.variant.name}: ready after {time.perf_counter() - began:.1f} s", flush=True)
    race(usable, shape.inputs(options.device), shape.dtype, options)
    for subject in usable:
        subject.retire()
    if options.max_batch:
        for subject in usable:
            subject.max_batch = max_batch(subject.variant, base, shape, options)
    rows = [subject.row(usable[0].seconds, shape) for subject in subjects]
    options.budgets = [budget_label(budget) for budget in options.budgets]
    path = report(QUESTION, options, rows, COLUMNS)
    for row in rows:
        if row["note"]:
            print(f"{row['variant']}: {row['note']}")
    print(f"drawn to {plot(path).name}")


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the options; the default shape follows the device."""
    reader = parser(__doc__, ON_CPU)
    reader.add_argument("--rounds", type=int, default=20)
    names = methods()
    reader.add_argument("--only", nargs="+", choices=names, default=names, metavar="METHOD", help=", ".join(names))
    reader.add_argument("--max-batch", action="store_true", help="find the largest batch that fits, too")
    reader.add_argument("--memory", type=float, default=16.0, help="GiB that --max-batch may use")
    reader.set_defaults(budgets=BUDGETS)
    if _is_cuda(reader.parse_args(arguments).device):
        reader.set_defaults(**vars(ON_CUDA))
    options = reader.parse_args(arguments)
    options.only = list(dict.fromkeys(["eager", *options.only]))
    return options


@dataclass
class Subject:
    """A variant and everything that is found out about it; `problem` says why it cannot run."""

    variant: Variant
    problem: str | None = None
    model: nn.Module | None = None
    kept: int | None = None
    peak: int | None = None
    error: float | None = None
    relative_error: float | None = None
    max_batch: int | None = None
    seconds: list[float] = field(default_factory=list)

    def retire(self) -> None:
        """Free the model, so that the memory of the others can be measured."""
        self.model = None

    def row(self, eagers: Sequence[float], shape: Shape) -> dict[str, Any]:
        """Return the row of the result file."""
        kept, peak = (None if size is None else size / 2**20 for size in (self.kept, self.peak))
        ratios = [own / eager for own, eager in zip(self.seconds, eagers, strict=bool(self.seconds))]
        milliseconds = [1000 * seconds for seconds in self.seconds]
        unseen = UNSEEN if self.kept is not None and self.peak is None else ""
        return {
            "variant": self.variant.name,
            "method": self.variant.method,
            "setting": self.variant.setting,
            **dict(zip(("ms", "ms IQR"), median_and_spread(milliseconds), strict=True)),
            **dict(zip(("ratio", "ratio IQR"), median_and_spread(ratios), strict=True)),
            "kept MiB": kept,
            "units": None if self.kept is None else self.kept / shape.unit_bytes,
            "peak MiB": peak,
            "error": self.error,
            "relative error": self.relative_error,
            "max batch": self.max_batch,
            "note": self.problem or self.variant.note or unseen,
        }


class Judge:
    """Measures memory and gradients of one variant after another, on the same weights and images."""

    def __init__(self, base: ViTForImageClassification, shape: Shape, device: str) -> None:
        self.base, self.dtype, self.device = base, shape.dtype, device
        self.inputs = shape.inputs(device)
        # Checkpoints change no bit and let a batch of images fit in float64.
        doubled = checkpointed(copy.deepcopy(base).double())
        wide = {"pixel_values": self.inputs["pixel_values"].double(), "labels": self.inputs["labels"]}
        self._exact = gradients(doubled, wide, None)
        self._eager = gradients(copy.deepcopy(base), self.inputs, self.dtype)

    def examine(self, subject: Subject) -> None:
        """Build the variant's model and fill in what it keeps, holds and gets wrong."""
        variant = subject.variant
        subject.model = model = variant.applied_to(self.base)
        found = gradients(model, self.inputs, self.dtype)
        eagers = {name: self._eager[name] for name in found}
        error = distance(found, self._exact)
        subject.error = error / distance(eagers, self._exact)
        subject.relative_error = error / length({name: self._exact[name] for name in found})
        model.zero_grad(set_to_none=True)
        del found
        subject.kept = variant.saved_bytes(model, self.inputs, self.dtype)
        if _is_cuda(self.device):
            subject.peak = allocated_peak(lambda: backward(model, self.inputs, self.dtype), above_start=True)
            model.zero_grad(set_to_none=True)
        elif not variant.is_compiled:
            subject.peak = peak_live_bytes(model, self.inputs, self.dtype)


def gradients(model: nn.Module, inputs: Inputs, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Return the gradients of all parameters that have one, in float64, by name."""
    scale = FP16_LOSS_SCALE if dtype is torch.float16 else 1.0
    model.zero_grad(set_to_none=True)
    backward(model, inputs, dtype, scale)
    named = ((name, parameter.grad) for name, parameter in model.named_parameters())
    return {name: gradient.double() / scale for name, gradient in named if gradient is not None}


def distance(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Return the Euclidean distance of the gradients in `found` to those of the same names in `exact`."""
    return length({name: gradient - exact[name] for name, gradient in found.items()})


def length(gradients: dict[str, Tensor]) -> float:
    """Return the Euclidean norm of all tensors together."""
    return sum(float(gradient.square().sum()) for gradient in gradients.values()) ** 0.5


def backward(model: nn.Module, inputs: Inputs, dtype: torch.dtype | None, scale: float = 1.0) -> None:
    """Run a forward and a backward pass."""
    (loss_of(model, inputs, dtype) * scale).backward()


def loss_of(model: nn.Module, inputs: Inputs, dtype: torch.dtype | None) -> Tensor:
    """Run a forward pass."""
    with torch.autocast(inputs["labels"].device.type, dtype=dtype, enabled=dtype is not None):
        return model(**inputs).loss


def step_of(model: nn.Module, inputs: Inputs, dtype: torch.dtype | None) -> Callable[[], None]:
    """Return a function that trains `model` for one step, as mixed-precision training does."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    scaler = torch.amp.GradScaler(inputs["labels"].device.type, enabled=dtype is torch.float16)

    def step() -> None:
        scaler.scale(loss_of(model, inputs, dtype)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return step


def race(subjects: Sequence[Subject], inputs: Inputs, dtype: torch.dtype | None, options: argparse.Namespace) -> None:
    """Time all variants in rounds, each in another order, so that none always follows the same one."""
    steps = [(subject, step_of(subject.model, inputs, dtype)) for subject in subjects if subject.model is not None]
    order = random.Random(0)
    for round_number in range(WARM_UP + options.rounds):
        for subject, step in order.sample(steps, len(steps)):
            seconds = timed(step, options.device)
            if round_number >= WARM_UP:
                subject.seconds.append(seconds)


def median_and_spread(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Return the median and the distance between the quartiles; None for no values."""
    if not values:
        return None, None
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    return float(middle), float(high - low)


def allocated_peak(step: Callable[[], None], *, above_start: bool) -> int:
    """Bytes that CUDA's allocator hands out at the worst moment of a step."""
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if above_start else 0
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def max_batch(
    variant: Variant, base: ViTForImageClassification, shape: Shape, options: argparse.Namespace
) -> int | None:
    """Find the largest batch that fits into `options.memory` GiB; None where it cannot be known."""
    limit = options.memory * 2**30
    if _is_cuda(options.device):
        # What others hold is not the variant's.
        limit += torch.cuda.memory_allocated()
        model = variant.applied_to(base)
        return largest_batch(lambda batch: _cuda_step_peak(model, shape, batch, options.device), limit, shape.batch)
    if variant.is_compiled:
        return None
    model = variant.applied_to(base)
    batch = FITTED_AT * shape.batch
    first, second = (
        peak_live_bytes(model, resized(shape, size).inputs(options.device), shape.dtype) for size in (batch, 2 * batch)
    )
    fixed = static_bytes(model) + OPTIMIZER_BYTES * sum(parameter.nbytes for parameter in model.parameters())
    return fitted_batch(batch, first + fixed, second + fixed, limit)


def fitted_batch(batch: int, peak: float, peak_of_twice: float, limit: float) -> int:
    """Estimate the largest batch within `limit` bytes from the peaks at a batch and at twice that batch."""
    per_image = (peak_of_twice - peak) / batch
    return max(0, int((limit - peak) / per_image + batch))


def largest_batch(peak_of: Callable[[int], float], limit: float, first: int) -> int:
    """Find the largest batch whose peak is at most `limit`, for peaks that grow with the batch.

    The search doubles `first` until a batch does not fit, then interpolates between the largest batch that fits and
    the smallest that does not; a peak may be infinite.
    """
    low, high, batch = (0, 0.0), None, first
    while high is None or high[0] - low[0] > 1:
        peak = peak_of(batch)
        if peak <= limit:
            low = (batch, peak)
        else:
            high = (batch, peak)
        batch = 2 * batch if high is None else _between(low, high, limit)
    return low[0]


def _between(low: tuple[int, float], high: tuple[int, float], limit: float) -> int:
    share = (limit - low[1]) / (high[1] - low[1]) if np.isfinite(high[1]) and low[0] else 0.5
    return min(max(low[0] + int(share * (high[0] - low[0])), low[0] + 1), high[0] - 1)


def _cuda_step_peak(model: nn.Module, shape: Shape, batch: int, device: str) -> float:
    torch.cuda.empty_cache()
    # Every batch size compiles anew, and Dynamo limits how often one model may.
    torch.compiler.reset()
    try:
        step = step_of(model, resized(shape, batch).inputs(device), shape.dtype)
        return allocated_peak(step, above_start=False)
    except torch.OutOfMemoryError:
        return float("inf")
    finally:
        model.zero_grad(set_to_none=True)


def resized(shape: Shape, batch: int) -> Shape:
    """Return the shape with another batch size."""
    return Shape(shape.layers, shape.hidden, batch, shape.image, shape.precision)


def _is_cuda(device: str) -> bool:
    return device.startswith("cuda")


def _figure(digits: int) -> Callable[[float | None], str]:
    return lambda value: "" if value is None else f"{value:.{digits}f}"


COLUMNS: dict[str, Callable[[Any], str]] = {
    "variant": str,
    **dict.fromkeys(("ms", "ms IQR"), _figure(1)),
    **dict.fromkeys(("ratio", "ratio IQR"), _figure(3)),
    **dict.fromkeys(("kept MiB", "units", "peak MiB"), _figure(2)),
    "error": _figure(3),
    "max batch": _figure(0),
}


if __name__ == "__main__":
    main()
