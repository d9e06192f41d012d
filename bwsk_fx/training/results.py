"""What is written down about a trained variant: the published keys, and what makes them comparable."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers

from bwsk_fx.measure import StepMemory, Timeline
from bwsk_fx.training import processes
from bwsk_fx.training.config import Variant
from bwsk_fx.training.modes import Ratios
from bwsk_fx.training.trainer import Outcome

# The published loss curve of a long training would be mostly file; one step in so many is plenty to plot.
CURVE_POINTS = 1000


@dataclass(frozen=True)
class VariantResult:
    """One `training_results.json`; the fields down to `parallelism_ratio` are the published ones.

    Attributes:
        model_slug: the model's name.
        experiment: `finetune` or `scratch`.
        mode: the published name of the mode.
        final_train_loss: loss of the last step.
        best_val_metric: best validation accuracy.
        test_metric: test accuracy of the weights of the best validation accuracy.
        metric_name: always `accuracy`.
        epochs_completed: completed epochs, the last one possibly in part.
        total_steps: optimizer steps.
        early_stopped: whether validation ended the training.
        wall_time_s: from the finished data to the tested model: capture, planning, measuring, training, evaluation,
            checkpoints. Of a variant that was resumed, the sum over processes; its file has `resumed_at_steps`.
        peak_memory_mb: on CUDA the allocator's peak in a step above what was there, on a CPU peak live tensor bytes.
        nan_count: steps whose loss was not finite.
        erasure_budget: K ratio under the `published` ruleset; 0 in the conventional mode, as published.
        parallelism_ratio: S ratio under the `published` ruleset; 0 in the conventional mode, as published.
        sound_s_ratio: S ratio under the `sound` ruleset.
        sound_k_ratio: K ratio under the `sound` ruleset.
        saved_for_backward_bytes: kept by one forward pass at the full batch size.
        peak_activation_bytes: peak live tensor bytes of a step without parameters and their gradients.
        static_bytes: parameters and buffers.
        memory_breakdown_bytes: what training holds, by kind, see `memory_breakdown`.
        preparation_time_s: the part of `wall_time_s` before the first training step.
        step_time_s: median time of a training step.
        loss_curve: step numbers and losses.
        accuracy_curve: step numbers and validation accuracies.
        memory_timeline: live bytes of one step, see `memory_timeline`.
        configuration: everything that decides the weights; a rerun is skipped when it is the same.
        environment: versions and device.
    """

    model_slug: str
    experiment: str
    mode: str
    final_train_loss: float
    best_val_metric: float
    test_metric: float
    metric_name: str
    epochs_completed: float
    total_steps: int
    early_stopped: bool
    wall_time_s: float
    peak_memory_mb: float
    nan_count: int
    erasure_budget: float
    parallelism_ratio: float
    sound_s_ratio: float
    sound_k_ratio: float
    saved_for_backward_bytes: int
    peak_activation_bytes: int
    static_bytes: int
    memory_breakdown_bytes: dict[str, int]
    preparation_time_s: float
    step_time_s: float
    loss_curve: dict[str, list[float]]
    accuracy_curve: dict[str, list[float]]
    memory_timeline: dict[str, Any]
    configuration: dict[str, Any]
    environment: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The object that the file holds."""
        return asdict(self)


@dataclass(frozen=True)
class Measured:
    """What is known about a variant besides the outcome of its training."""

    memory: StepMemory
    published: Ratios
    sound: Ratios
    preparation_time_s: float
    wall_time_s: float


def variant_result(
    variant: Variant, slug: str, outcome: Outcome, measured: Measured, configuration: dict[str, Any]
) -> VariantResult:
    """Puts the results of a variant together."""
    return VariantResult(
        model_slug=slug,
        experiment=variant.experiment.value,
        mode=variant.mode.published_name,
        final_train_loss=outcome.losses[-1],
        best_val_metric=outcome.best_accuracy,
        test_metric=outcome.test_accuracy,
        metric_name="accuracy",
        epochs_completed=outcome.epochs,
        total_steps=len(outcome.losses),
        early_stopped=outcome.early_stopped,
        wall_time_s=measured.wall_time_s,
        peak_memory_mb=measured.memory.peak_bytes / 2**20,
        nan_count=outcome.nan_count,
        erasure_budget=measured.published.k,
        parallelism_ratio=measured.published.s,
        sound_s_ratio=measured.sound.s,
        sound_k_ratio=measured.sound.k,
        saved_for_backward_bytes=measured.memory.saved_bytes,
        peak_activation_bytes=measured.memory.peak_activation_bytes,
        static_bytes=measured.memory.static_bytes,
        memory_breakdown_bytes=memory_breakdown(measured.memory, outcome.optimizer_bytes),
        preparation_time_s=measured.preparation_time_s,
        step_time_s=outcome.step_time_s,
        loss_curve=_loss_curve(outcome.losses),
        accuracy_curve={
            "step": [step for step, _ in outcome.accuracies],
            "accuracy": [accuracy for _, accuracy in outcome.accuracies],
        },
        memory_timeline=memory_timeline(measured.memory.timeline),
        configuration=configuration,
        environment=environment(),
    )


def memory_breakdown(memory: StepMemory, optimizer_bytes: int) -> dict[str, int]:
    """What training holds, in bytes and by kind; every figure counts whole storages, each once.

    `parameters` and `buffers` are the model's own. `gradients` are the parameters' after a step, `optimizer` is its
    state after the training. What a forward pass keeps for the backward pass is `weight_copies` (casts and copies of
    parameters, as autocast makes) and `activations` (everything else); they add up to `saved_for_backward_bytes`.
    The kinds are not all alive at one time, so their sum is no peak.
    """
    return {
        "parameters": memory.parameter_bytes,
        "buffers": memory.buffer_bytes,
        "gradients": memory.gradient_bytes,
        "optimizer": optimizer_bytes,
        "activations": memory.activation_bytes,
        "weight_copies": memory.weight_copy_bytes,
    }


def memory_timeline(timeline: Timeline) -> dict[str, Any]:
    """The live bytes of a step as a curve of at most `CURVE_POINTS` points.

    `event` counts allocations and releases of tensors from 1, `live_bytes` is what was alive after it, above what was
    there before the step. `events` is their number, and the backward pass comes after `forward_events` of them. Of a
    longer step the curve has the maximum of each stretch of events, so its maximum is the step's.
    """
    live, kept = timeline.live_bytes, timeline.highest(CURVE_POINTS)
    return {
        "event": [index + 1 for index in kept],
        "live_bytes": [live[index] for index in kept],
        "events": len(live),
        "forward_events": timeline.forward_events,
    }


def environment() -> dict[str, Any]:
    """Versions, the device's name, and how many processes trained; memory and step time are those of one of them."""
    on_cuda = processes.device().type == "cuda"
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if on_cuda else f"CPU ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "processes": processes.count(),
    }


def _loss_curve(losses: tuple[float, ...]) -> dict[str, list[float]]:
    stride = -(-len(losses) // CURVE_POINTS)
    steps = range(0, len(losses), stride)
    return {"step": [step + 1 for step in steps], "loss": [losses[step] for step in steps]}
