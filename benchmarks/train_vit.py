"""Does a ViT learn the same in all three modes, and what does a training step take in each?

A ViT is trained from scratch on scikit-learn's digits, enlarged: AdamW (fused), clipped gradients, warm-up and cosine,
with a gradient scaler in fp16. All variants take every step side by side, on the same batch and in another order each
time, so that a busy machine slows all of them alike. Per variant:

* *loss*: mean training loss of the last steps; *drift* is the largest distance, over the steps, of its running mean to
  that of the conventional mode.
* *accuracy*: on a fifth of the digits that is not trained on.
* *kept MiB*: bytes that the forward pass leaves for the backward pass, see `bwsk_fx.measure`.
* *peak MiB*: what a forward and backward pass allocates at its peak, gradients included; *peak* is the same over the
  conventional mode's. *all MiB* adds weights and optimizer states.
* *ms* and *step*: median step time, and median of its ratio to the conventional mode's in the same step, with the
  distance between quartiles (IQR).

    python benchmarks/train_vit.py
"""

from __future__ import annotations

import argparse
import copy
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from common import Shape, checkpointed, parser, report, shape_of
from pareto import loss_of, median_and_spread
from sklearn.datasets import load_digits
from step_time import timed
from torch import Tensor, nn
from torch.nn import functional as F
from train_vit_plot import plot, running_mean
from transformers import get_cosine_schedule_with_warmup

import bwsk_fx
from bwsk_fx.measure import StepMemory, measure

QUESTION = "train-vit"
ON_CPU = Shape(layers=6, hidden=192, batch=16, image=64, precision="bf16")
# The published size, batch and precision.
ON_CUDA = Shape(layers=12, hidden=768, batch=16, image=224, precision="fp16")
BASELINE = "conventional"
WARM_UP = 3
WARM_UP_SHARE = 0.1
TEST_SHARE = 0.2
INK = 16.0


def main(arguments: Sequence[str] | None = None) -> None:
    options = parsed(arguments)
    shape, data = shape_of(options), Digits(options.device, options.image)
    base = shape.model(options.device)
    learners = [Learner(name, model, options) for name, model in variants(base, options.budgets)]
    for learner in learners:
        learner.memory = measure(learner.model, data.first(options.batch), shape.dtype)
        print(f"{learner.name}: measured", flush=True)
    train_side_by_side(learners, data, options)
    rows = [row_of(learner, learners[0], data, options) for learner in learners]
    print(f"drawn to {plot(report(QUESTION, options, rows, COLUMNS)).name}")


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the options; the default shape follows the device."""
    reader = parser(__doc__, ON_CPU)
    reader.add_argument("--steps", type=int, default=300)
    reader.add_argument("--learning-rate", type=float, default=3e-4)
    reader.add_argument("--max-grad-norm", type=float, default=1.0)
    reader.set_defaults(budgets=[0.0, 0.1, 0.2])
    if reader.parse_args(arguments).device.startswith("cuda"):
        reader.set_defaults(**vars(ON_CUDA))
    options = reader.parse_args(arguments)
    if options.steps <= WARM_UP:
        reader.error(f"--steps must be more than {WARM_UP}, which are not timed")
    return options


def variants(base: nn.Module, budgets: Sequence[float]) -> Iterator[tuple[str, nn.Module]]:
    """Yield the three modes, the reversible one at each budget, and checkpoints for comparison."""
    yield BASELINE, copy.deepcopy(base)
    yield "analyzed", bwsk_fx.apply(copy.deepcopy(base), "analyzed")
    for budget in budgets:
        yield f"reversible, budget {budget:g}", bwsk_fx.apply(copy.deepcopy(base), "reversible", budget=budget)
    yield "checkpoint per block", checkpointed(copy.deepcopy(base))


class Digits:
    """scikit-learn's handwritten digits on a device, enlarged batch by batch."""

    def __init__(self, device: str, image: int) -> None:
        bunch, self._image = load_digits(), image
        order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(0))
        # From -1 to 1, as ViT's image processor has it.
        pixels = torch.from_numpy(bunch.images).float()[order, None] / (INK / 2) - 1
        self._pixels, self._labels = pixels.to(device), torch.from_numpy(bunch.target)[order].to(device)
        self._trained_on = len(order) - round(TEST_SHARE * len(order))

    def first(self, size: int) -> dict[str, Tensor]:
        """Return the first `size` training samples."""
        return self._batch(torch.arange(size))

    def batches(self, size: int) -> Iterator[dict[str, Tensor]]:
        """Yield full batches for ever, in another order in every epoch."""
        generator = torch.Generator().manual_seed(1)
        while True:
            for batch in torch.randperm(self._trained_on, generator=generator).split(size):
                if len(batch) == size:
                    yield self._batch(batch)

    def accuracy(self, model: nn.Module, size: int, dtype: torch.dtype | None) -> float:
        """Return the share of the test samples that `model` gets right."""
        right = 0
        model.eval()
        with torch.no_grad(), torch.autocast(self._labels.device.type, dtype=dtype, enabled=dtype is not None):
            for indices in torch.arange(self._trained_on, len(self._labels)).split(size):
                batch = self._batch(indices)
                right += int((model(batch["pixel_values"]).logits.argmax(-1) == batch["labels"]).sum())
        return right / (len(self._labels) - self._trained_on)

    def _batch(self, indices: Tensor) -> dict[str, Tensor]:
        indices = indices.to(self._labels.device)
        enlarged = F.interpolate(self._pixels[indices], size=(self._image, self._image), mode="bilinear")
        return {"pixel_values": enlarged.repeat(1, 3, 1, 1), "labels": self._labels[indices]}


@dataclass
class Learner:
    """A variant in training."""

    name: str
    model: nn.Module
    options: argparse.Namespace
    memory: StepMemory | None = None
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        options, device = self.options, self.options.device.split(":")[0]
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=options.learning_rate, fused=True)
        warm_up = round(WARM_UP_SHARE * options.steps)
        self._schedule = get_cosine_schedule_with_warmup(self._optimizer, warm_up, options.steps)
        self._scaler = torch.amp.GradScaler(device, enabled=options.precision == "fp16")

    def step(self, batch: dict[str, Tensor]) -> None:
        """Train on one batch."""
        loss = loss_of(self.model, batch, shape_of(self.options).dtype)
        self._scaler.scale(loss).backward()
        self._scaler.unscale_(self._optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.options.max_grad_norm)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._schedule.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.losses.append(loss.item())

    @property
    def state_bytes(self) -> int:
        """Bytes of the optimizer's states."""
        states = self._optimizer.state.values()
        return sum(value.nbytes for state in states for value in state.values() if isinstance(value, Tensor))


def train_side_by_side(learners: Sequence[Learner], data: Digits, options: argparse.Namespace) -> None:
    """Train all variants, one step of each at a time."""
    order, batches = random.Random(0), data.batches(options.batch)
    for number, batch in zip(range(options.steps), batches, strict=False):
        for learner in order.sample(learners, len(learners)):
            learner.seconds.append(timed(lambda learner=learner, batch=batch: learner.step(batch), options.device))
        if (number + 1) % 50 == 0:
            shown = ", ".join(f"{learner.losses[-1]:.3f}" for learner in learners)
            print(f"step {number + 1} of {options.steps}: losses {shown}", flush=True)


def row_of(learner: Learner, baseline: Learner, data: Digits, options: argparse.Namespace) -> dict[str, Any]:
    """Return a variant's row, relative to the conventional mode."""
    memory, conventional = learner.memory, baseline.memory
    assert memory is not None
    assert conventional is not None
    ratios = [own / other for own, other in zip(learner.seconds, baseline.seconds, strict=True)][WARM_UP:]
    ratio, spread = median_and_spread(ratios)
    mean, baseline_mean = running_mean(learner.losses), running_mean(baseline.losses)
    fixed = memory.static_bytes + learner.state_bytes
    return {
        "variant": learner.name,
        "loss": mean[-1],
        "drift": max(abs(own - other) for own, other in zip(mean, baseline_mean, strict=True)),
        "accuracy": data.accuracy(learner.model, options.batch, shape_of(options).dtype),
        "kept MiB": memory.saved_bytes / 2**20,
        "peak MiB": memory.peak_bytes / 2**20,
        "peak": memory.peak_bytes / conventional.peak_bytes,
        "all MiB": (fixed + memory.peak_bytes) / 2**20,
        "ms": 1000 * (median_and_spread(learner.seconds[WARM_UP:])[0] or 0.0),
        "step": ratio,
        "step IQR": spread,
        "losses": learner.losses,
    }


COLUMNS: dict[str, Callable[[Any], str]] = {
    "variant": str,
    **dict.fromkeys(("loss", "drift"), "{:.4f}".format),
    "accuracy": "{:.2%}".format,
    **dict.fromkeys(("kept MiB", "peak MiB"), "{:.2f}".format),
    "peak": "{:.3f}".format,
    "all MiB": "{:.2f}".format,
    "ms": "{:.1f}".format,
    **dict.fromkeys(("step", "step IQR"), "{:.3f}".format),
}


if __name__ == "__main__":
    main()
