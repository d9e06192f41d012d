"""`BwskCallback`: a mode for transformers' `Trainer`, and its figures in whatever the Trainer reports to."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any, Unpack
from weakref import WeakSet

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer import DEFAULT_CALLBACKS

import bwsk_fx
from bwsk_fx import measure
from bwsk_fx.errors import RegionError, TrainingError
from bwsk_fx.passes.find_regions import FindRegions
from bwsk_fx.planning.options import PlanKeywords, plan_options
from bwsk_fx.training.config import Mode
from bwsk_fx.training.modes import ratios, require_effect

PLAN_FILE = "bwsk_plan.json"
_MODES = (Mode.ANALYZED, Mode.REVERSIBLE)
# Typing a graph replaces its verdicts, and `apply` left those of the last one.
_RULESETS = ("published", "sound")


class BwskCallback(TrainerCallback):
    """Trains a `Trainer`'s model in a mode, shows that the mode took effect, and reports what it keeps.

    The mode is applied when the Trainer has been made, before anything wraps the model, and taken back at the end of
    `train()`. The plan is written to `bwsk_plan.json` in `args.output_dir`, after the first optimizer step and, with
    batches of other sizes, at the end. After the first step these figures are added to the next log:

    - `bwsk_saved_bytes`: what a forward pass keeps for the backward pass, see `bwsk_fx.measure.saved_for_backward`
    - `bwsk_kept_bytes`, `bwsk_conventional_bytes`, `bwsk_regions`: what the plan keeps in its regions, what eager
      execution keeps there, and how many they are; in the reversible mode
    - `bwsk_s_ratio_sound`, `bwsk_k_ratio_sound`, `bwsk_s_ratio_published`, `bwsk_k_ratio_published`

    On CUDA every log gets `bwsk_peak_bytes`, the allocator's peak so far.
    """

    def __init__(
        self,
        mode: str = "reversible",
        *,
        restore: bool = True,
        budget: float | None = None,
        granularity: str = "block",
        **options: Unpack[PlanKeywords],
    ) -> None:
        """Check the options; nothing is applied yet.

        Args:
            mode: `reversible` or `analyzed`, see `bwsk_fx.apply`.
            restore: Whether the end of `train()` takes the mode back, if this callback applied it.
            budget: See `bwsk_fx.apply`.
            granularity: See `bwsk_fx.apply`.
            options: See `bwsk_fx.apply`.

        Raises:
            RegionError: There is no such mode to train in.
            PlanError: An option is out of range.
        """
        if mode not in _MODES:
            raise RegionError(f"mode is {mode!r}: expected one of {', '.join(repr(one.value) for one in _MODES)}")
        FindRegions(granularity)  # checks it
        self._mode, self._granularity, self._restore = Mode(mode), granularity, restore
        self._plan = plan_options(budget, **options)
        self._keywords: dict[str, Any] = {"budget": budget, "granularity": granularity, **options}
        self._model: nn.Module | None = None
        self._is_ours = False
        self._first = _FirstInputs()
        self._state: Any = None
        self._figures: dict[str, float] | None = None
        self._reported = False

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Apply the mode while the model is bare: autocast and compilers bind the forward method that they find."""
        self._enter(model)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Find the model inside what has been wrapped around it, and put it into the mode again after a restore."""
        inner = model if _in_a_mode(model) is not None else self._met_before(model)
        applied = bwsk_fx.applied(self._enter(inner))
        assert applied is not None
        # A graph of an earlier training would pass for an effect of this one.
        applied.graph = applied.rewritten = None
        self._state, self._figures, self._reported = state, None, False
        self._first.watch(model)
        _TRAINING.add(self)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raise a TrainingError when the first step did not run in the mode."""
        if self._figures is None:
            require_effect(self._model, self._mode)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """After the first step, when no gradients are held, measure and write the plan."""
        if self._figures is not None:
            return
        self._figures = self._plan_figures() | self._ratio_figures()
        self._figures["bwsk_saved_bytes"] = measure.saved_for_backward(model, self._first.take())
        self._write_plan(args, state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the plan with all kinds of input that were met, and take the mode back if this callback applied it."""
        if self._figures is not None:
            self._write_plan(args, state)
        _TRAINING.discard(self)
        self._first.forget()
        if not (self._restore and self._is_ours and self._model is not None):
            return
        try:
            bwsk_fx.restore(self._model)
        except RegionError as error:
            # The training is over and must not be lost for this.
            warnings.warn(f"{error}; the model stays in its mode", stacklevel=2)

    def add_to(self, logs: dict[str, float], args: Any, state: Any) -> None:
        """Add what is to be reported to the logs of a Trainer whose state is `state`."""
        if state is not self._state or self._figures is None:
            return
        figures = {} if self._reported else self._figures
        if args.device.type == "cuda":
            figures = figures | {"bwsk_peak_bytes": torch.cuda.max_memory_allocated(args.device)}
        self._reported = True
        logs.update(figures)
        # The Trainer has copied the logs already.
        state.log_history[-1].update(figures)

    def _enter(self, model: nn.Module) -> nn.Module:
        """Apply the mode, unless the model, or a part of it, is in this very mode already."""
        found = _in_a_mode(model)
        if found is None:
            self._model, self._is_ours = bwsk_fx.apply(model, self._mode.value, **self._keywords), True
            return self._model
        self._require_same(found)
        if found is not self._model:
            self._model, self._is_ours = found, False
        return found

    def _met_before(self, model: nn.Module) -> nn.Module:
        if self._model is None or all(module is not self._model for module in model.modules()):
            raise TrainingError(
                "BwskCallback has not seen this model before the Trainer prepared it: pass the callback as "
                "Trainer(callbacks=[...]), not to add_callback; with model_init, call bwsk_fx.apply in it as well"
            )
        return self._model

    def _require_same(self, model: nn.Module) -> None:
        state: Any = bwsk_fx.applied(model)
        there, wanted = (state.mode, state.granularity, state.plan), (self._mode.value, self._granularity, self._plan)
        if there != wanted:
            raise TrainingError(
                f"the {type(model).__name__} is in mode {_described(*there)}, and BwskCallback was asked for "
                f"{_described(*wanted)}: call bwsk_fx.restore(model) first, or give both the same options"
            )

    def _write_plan(self, args: Any, state: Any) -> None:
        if self._mode is Mode.REVERSIBLE and state.is_world_process_zero:
            bwsk_fx.save_plan(self._model, Path(args.output_dir, PLAN_FILE))  # type: ignore[arg-type]

    def _plan_figures(self) -> dict[str, float]:
        if self._mode is not Mode.REVERSIBLE:
            return {}
        report = bwsk_fx.explain_saved(self._model)  # type: ignore[arg-type]
        return {
            "bwsk_kept_bytes": report.kept_bytes,
            "bwsk_conventional_bytes": report.totals.conventional_bytes,
            "bwsk_regions": len(report.regions),
        }

    def _ratio_figures(self) -> dict[str, float]:
        found = {ruleset: ratios(self._model, ruleset) for ruleset in _RULESETS}
        s = {f"bwsk_s_ratio_{ruleset}": one.s for ruleset, one in found.items()}
        return s | {f"bwsk_k_ratio_{ruleset}": one.k for ruleset, one in found.items()}


class _FirstInputs:
    """Keeps what a model is first called with."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._inputs: Any = None

    def watch(self, model: nn.Module) -> None:
        self.forget()
        self._handle = model.register_forward_pre_hook(self._keep, with_kwargs=True)

    def take(self) -> Any:
        inputs = self._inputs
        self.forget()
        return inputs

    def forget(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle = self._inputs = None

    def _keep(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Evaluation may come first.
        if torch.is_grad_enabled() and self._inputs is None:
            self._inputs = dict(zip(inspect.signature(model.forward).parameters, args, strict=False)) | kwargs


class _AheadOfTrackers(TrainerCallback):
    """Adds figures to logs before the trackers of `report_to` see them.

    A Trainer calls its default callbacks first, then those trackers, and those that it was given last, so that what
    `BwskCallback.on_log` added would reach no tracker.
    """

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        for callback in list(_TRAINING):
            callback.add_to(logs, args, state)


_TRAINING: WeakSet[BwskCallback] = WeakSet()
DEFAULT_CALLBACKS.append(_AheadOfTrackers)


def _in_a_mode(model: nn.Module) -> nn.Module | None:
    return next((module for module in model.modules() if bwsk_fx.applied(module) is not None), None)


def _described(mode: str, granularity: str, plan: object) -> str:
    return f"'{mode}' ({plan}, granularity='{granularity}')"
