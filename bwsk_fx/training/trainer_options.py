"""Further options of transformers' `TrainingArguments`: which ones a run takes, and what to use for the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from bwsk_fx.errors import TrainingError
from bwsk_fx.training.values import closest, mismatch

LOGS = "logs"

# What a run sets itself, and what to do instead.
_INSTEAD: dict[str, tuple[str, ...]] = {
    "use --output": ("output_dir",),
    "use --epochs": ("num_train_epochs", "max_steps"),
    "use --batch-size": ("per_device_train_batch_size", "auto_find_batch_size"),
    "use --learning-rate": ("learning_rate",),
    "use --schedule": ("lr_scheduler_type",),
    "use --warmup": ("warmup_steps", "warmup_ratio"),
    "use --weight-decay": ("weight_decay",),
    "use --clip": ("max_grad_norm",),
    "use --seed": ("seed", "data_seed"),
    "use --precision": ("bf16", "fp16", "bf16_full_eval", "fp16_full_eval"),
    "use --patience, which always brings the best weights back": (
        "load_best_model_at_end",
        "metric_for_best_model",
        "greater_is_better",
    ),
    "use --evaluation-steps": ("eval_strategy", "eval_steps", "eval_delay"),
    "use --modes, which decide what is kept for the backward pass": (
        "activation_checkpointing",
        "activation_checkpointing_kwargs",
        "gradient_checkpointing",
        "gradient_checkpointing_kwargs",
    ),
    "use gradient_accumulation_steps": ("accelerator_config",),
    "the same command goes on where a run was cut off": (
        "resume_from_checkpoint",
        "ignore_data_skip",
        "restore_callback_states_from_checkpoint",
    ),
    "a run writes checkpoints at its evaluations": (
        "save_strategy",
        "save_steps",
        "save_total_limit",
        "save_only_model",
        "save_on_each_node",
        "enable_jit_checkpoint",
    ),
    "every variant is trained, validated and tested": ("do_train", "do_eval", "do_predict", "prediction_loss_only"),
    "a run shows its own progress": ("disable_tqdm", "log_level", "log_level_replica"),
    "a run uploads nothing": (
        "push_to_hub",
        "hub_token",
        "hub_private_repo",
        "hub_model_id",
        "hub_strategy",
        "hub_always_push",
        "hub_revision",
    ),
    "processes and devices are the launcher's to choose, torchrun's or accelerate's; CUDA_VISIBLE_DEVICES hides some": (
        "use_cpu",
        "local_rank",
        "fsdp",
        "fsdp_config",
        "deepspeed",
        "parallelism_config",
    ),
    "a run computes its accuracies from all samples of a split": (
        "dataloader_drop_last",
        "eval_do_concat_batches",
        "batch_eval_metrics",
        "include_for_metrics",
        "remove_unused_columns",
        "label_names",
    ),
    "training samples are shuffled by --seed": ("train_sampling_strategy", "length_column_name"),
    "it is for language models": ("neftune_noise_alpha", "use_liger_kernel", "liger_kernel_config"),
}
_REFUSED = {name: instead for instead, names in _INSTEAD.items() for name in names}

# What can be different when a run goes on, since weights do not depend on it.
_WITHOUT_EFFECT = frozenset(
    {
        "report_to",
        "run_name",
        "project",
        "logging_strategy",
        "logging_steps",
        "logging_first_step",
        "logging_nan_inf_filter",
        "dataloader_num_workers",
        "dataloader_pin_memory",
        "dataloader_persistent_workers",
        "dataloader_prefetch_factor",
    }
)


def deciding(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that weights can depend on, by name."""
    return {name: settings[name] for name in sorted(settings) if name not in _WITHOUT_EFFECT}


def logged(settings: Mapping[str, Any]) -> bool:
    """Whether a run with these settings logs its losses to a tracker."""
    return settings.get("report_to", "none") not in (None, "none", [], ["none"])


def log_into(trainer: Any, folder: Path) -> None:
    """Gives the files of TensorBoard a folder to stay in, unless TENSORBOARD_LOGGING_DIR names one.

    Trainer would put them beside its checkpoints, which are removed at the end.
    """
    from transformers.integrations import TensorBoardCallback

    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(folder)


def require_valid(settings: Mapping[str, Any], schedules: Sequence[str]) -> None:
    """Raises a TrainingError for settings and schedules that transformers would not train with.

    Args:
        settings: fields of `TrainingArguments`, beside those that a run sets itself.
        schedules: names of learning rate schedules.
    """
    if settings:
        _require_taken(settings)
    for schedule in schedules:
        _require_schedule(schedule, settings.get("lr_scheduler_kwargs"))
    if settings:
        _require_buildable(settings)


def _require_taken(settings: Mapping[str, Any]) -> None:
    from transformers import TrainingArguments

    hints = get_type_hints(TrainingArguments)
    free = sorted(TrainingArguments.__dataclass_fields__.keys() - _REFUSED.keys())
    for name, value in settings.items():
        if name in _REFUSED:
            raise TrainingError(f"--trainer {name} is not taken: {_REFUSED[name]}")
        if name not in free:
            raise TrainingError(f"--trainer does not know '{name}'; {_meant(name, free)}")
        if words := mismatch(value, hints[name]):
            raise TrainingError(f"--trainer {name} must be {words}, not {value!r}")
    if settings.get("gradient_accumulation_steps", 1) < 1:
        raise TrainingError("--trainer gradient_accumulation_steps must be at least 1")


def _meant(name: str, free: list[str]) -> str:
    near = closest(name, [*free, *_REFUSED])
    return near if near.startswith("did you mean") else "it takes fields of transformers' TrainingArguments"


def _require_schedule(schedule: str, keywords: Any) -> None:
    import torch
    from transformers import SchedulerType, get_scheduler

    known = [kind.value for kind in SchedulerType]
    if schedule not in known:
        raise TrainingError(f"--schedule does not know '{schedule}'; it takes {', '.join(known)}")
    optimizer = torch.optim.SGD([torch.zeros(1)])
    try:
        get_scheduler(schedule, optimizer, 1, 10, scheduler_specific_kwargs=keywords)
    except (TypeError, ValueError) as error:
        raise TrainingError(
            f"--schedule {schedule} cannot be made ({_line(error)}); its arguments are given as "
            "--trainer 'lr_scheduler_kwargs={NAME: VALUE}'"
        ) from error


def _require_buildable(settings: Mapping[str, Any]) -> None:
    """Makes what a Trainer makes of the settings, so that what is wrong with them is known before anything starts."""
    import torch
    from transformers import Trainer, TrainingArguments
    from transformers.integrations import get_reporting_integration_callbacks

    try:
        arguments = TrainingArguments(output_dir=".", use_cpu=not torch.cuda.is_available(), **settings)
        Trainer.get_optimizer_cls_and_kwargs(arguments)
        for callback in get_reporting_integration_callbacks(arguments.report_to):
            callback()
    except Exception as error:  # trackers and optimizers raise whatever they like
        raise TrainingError(f"--trainer {', '.join(settings)}: transformers says '{_line(error)}'") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
