"""What can go wrong while a model trains, said in one line that names the way out."""

from __future__ import annotations

import errno
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from bwsk_fx.errors import CaptureError, TrainingError, first_line
from bwsk_fx.training.config import Mode, Precision

# Each rebuilds more and keeps less than the one before.
BUDGETS = (0.1, 0.25, math.inf)
# In fp16 a gradient scaler skips the step of such a loss, so that a few of them do no harm.
NON_FINITE_LOSSES_IN_FP16 = 10

_NO_SPACE = os.strerror(errno.ENOSPC)
_FREE_BYTES_OF_A_FULL_DISK = 2**20


def is_disk_error(error: BaseException) -> bool:
    """Whether an exception says that a file could not be written, in the words of Python, safetensors or PyTorch."""
    # torch.save writes in C++, whose errors are RuntimeErrors that name the source file.
    return isinstance(error, (OSError, SafetensorError)) or (
        isinstance(error, RuntimeError) and "inline_container" in str(error)
    )


def disk_error(path: Path, error: BaseException, what: str, then: str = "") -> TrainingError:
    """The error for a file that could not be written.

    Args:
        path: the folder.
        error: what was raised.
        what: could not be written.
        then: what happens once there is space again.
    """
    reason = _disk_reason(path, error)
    way_out = "free some space" if reason == _NO_SPACE else "choose another --output"
    rest = f": {then}" if then and reason == _NO_SPACE else ""
    return TrainingError(f"{what} cannot be written to '{path}' ({reason}); {way_out}{rest}")


def _disk_reason(path: Path, error: BaseException) -> str:
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    folder = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    full = _NO_SPACE in str(error) or shutil.disk_usage(folder).free < _FREE_BYTES_OF_A_FULL_DISK
    return _NO_SPACE if full else first_line(error)


def require_finite(name: str, losses: Sequence[float], precision: Precision) -> None:
    """Raises a TrainingError when the last losses show that the weights are lost, or that no step is taken any more.

    Args:
        name: of the training.
        losses: of all steps so far.
        precision: of the forward pass.
    """
    allowed = NON_FINITE_LOSSES_IN_FP16 if precision is Precision.FP16 else 1
    last = losses[-allowed:]
    if len(last) < allowed or any(map(math.isfinite, last)):
        return
    way_out = "try another --seed or a larger --batch-size"
    if precision is not Precision.FP32:
        way_out = f"try --precision fp32, or {way_out.removeprefix('try ')}"
    run = f", as were the {allowed - 1} before it" if allowed > 1 else ""
    raise TrainingError(f"{name}: the loss of step {len(losses)} is {last[-1]}{run}; {way_out}")


@contextmanager
def memory_explained(name: str, mode: Mode, budget: float, batch_size: int) -> Iterator[None]:
    """Turns an exhausted memory into a TrainingError that says what takes less.

    Args:
        name: of the training.
        mode: which it runs in.
        budget: of the reversible mode.
        batch_size: samples per step.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        ways = _less_memory(mode, budget, batch_size)
        raise TrainingError(
            f"{name}: out of memory with a batch of {batch_size} ({first_line(error)}); {ways}"
        ) from error


@contextmanager
def unused_parameters_explained(name: str) -> Iterator[None]:
    """Turns DistributedDataParallel's complaint about parameters without gradients into a TrainingError.

    Args:
        name: of the training.
    """
    try:
        yield
    except RuntimeError as error:
        if "Expected to have finished reduction" not in str(error):
            raise
        raise TrainingError(
            f"{name}: some parameters of the model take no part in its loss, which several processes cannot train; "
            "train it with one process"
        ) from error


def _out_of_memory(error: BaseException) -> bool:
    # PyTorch has a class of its own for devices only.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)


def _less_memory(mode: Mode, budget: float, batch_size: int) -> str:
    ways = []
    if mode is not Mode.REVERSIBLE:
        ways.append("train with --modes reversible")
    elif larger := [value for value in BUDGETS if value > budget]:
        ways.append(f"let rebuilding take more time with --budget {larger[0]}")
    if batch_size > 1:
        ways.append(f"take a smaller batch with --batch-size {batch_size // 2} and another --output")
    return ", or ".join(ways) or "take a smaller model"


@contextmanager
def images_explained(data: str, splits: Sequence[Any]) -> Iterator[None]:
    """Turns an image that cannot be decoded into a TrainingError that names its file.

    Args:
        data: the data set's name.
        splits: its `datasets.Dataset`s, with a column `image`.
    """
    try:
        yield
    except (OSError, SyntaxError) as error:  # Pillow raises both
        broken = next(filter(None, map(_broken_image, splits)), None)
        if broken is None:
            raise
        raise TrainingError(
            f"data set '{data}': {broken} cannot be read as an image ({first_line(error)}); remove or replace it"
        ) from error


def _broken_image(split: Any) -> str | None:
    from datasets import Image

    for index, sample in enumerate(split.cast_column("image", Image(decode=False))["image"]):
        try:
            Image().decode_example(sample).load()
        except (OSError, SyntaxError):
            return f"'{sample['path']}'" if sample["path"] else f"image {index}"
    return None


@contextmanager
def image_size_explained(name: str, made: Sequence[int], config: Any) -> Iterator[None]:
    """Turns a model's complaint about the size of its images into a TrainingError that says what to correct.

    Args:
        name: of the training.
        made: height and width of the images that the processor makes.
        config: of the model.
    """
    try:
        yield
    except (ValueError, CaptureError) as error:
        taken = getattr(config, "image_size", None)
        if taken is None or "image size" not in str(error).lower():
            raise
        height, width = (taken, taken) if isinstance(taken, int) else taken
        raise TrainingError(
            f"{name}: the model takes images of {height} by {width}, its image processor makes {made[0]} by {made[1]}; "
            "correct 'size' in the checkpoint's preprocessor_config.json"
        ) from error
