"""Runs trainings in processes of their own and kills them: a program that `test_resume` talks to in lines of JSON.

Everything is imported once, and each training runs in a fork of this process, which has no thread yet.
"""

import json
import math
import os
import random
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from bwsk_fx.training import config, experiments, models, quiet, resume, trainer, watch

EVALUATION_STEPS = 4


def shrink(patience: int) -> None:
    """A model of one layer that drops out, and evaluations that do not fall on the ends of epochs."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    resume.SAVING_SHARE = math.inf  # at every evaluation, however long writing takes
    models.BUILT_IN[models.TINY_VIT] |= sizes | dropout
    changes = {"evaluation_steps": EVALUATION_STEPS, "patience": patience}
    config._DIGITS_PRETRAINING = replace(config._DIGITS_PRETRAINING, **changes)
    for experiment, recipe in config._DIGITS_RECIPES.items():
        config._DIGITS_RECIPES[experiment] = replace(recipe, **changes)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner: object, name: str, number: int, action) -> None:
    """Runs an action in front of one call of a function, counted from 1; it is given the call's arguments."""
    original, calls = getattr(owner, name), iter(range(1, 10**9))

    def wrapped(*args, **kwargs):
        if next(calls) == number:
            action(*args, **kwargs)
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


def half_of(contents: object, path: str) -> None:
    """Writes the first half of what torch.save writes, and dies."""
    torch.serialization.save(contents, path)
    os.truncate(path, Path(path).stat().st_size // 2)
    kill()


def half_gone(folder: Path, **_: object) -> None:
    """Removes the largest file of a folder, and dies."""
    max(folder.iterdir(), key=lambda path: path.stat().st_size).unlink()
    kill()


def while_forgetting(number: int) -> None:
    """Dies in the middle of removing the oldest of three checkpoints."""
    forget, calls = resume.Checkpoints._forget_old, iter(range(1, 10**9))

    def forgetting(self) -> None:
        if next(calls) == number:
            before(resume.shutil, "rmtree", 1, half_gone)
        forget(self)

    resume.Checkpoints._forget_old = forgetting


# What a process dies at, for the how-manieth time counted from 1.
POINTS = {
    # Gradients are there, the weights are not updated yet.
    "in a step": lambda number: before(watch.Watch, "on_pre_optimizer_step", number, lambda *_, **__: kill()),
    # Of each checkpoint torch.save writes the optimizer, the scheduler and the random states.
    "in a checkpoint": lambda number: before(torch, "save", 3 * number - 2, half_of),
    "before the marker": lambda number: before(resume.Checkpoint, "seal", number, lambda *_: kill()),
    "while an old one goes": while_forgetting,
    "between variants": lambda number: before(resume.Checkpoints, "discard", number, lambda *_: kill()),
}


def train(
    output: str,
    modes: list[str],
    experiment: str = "scratch",
    point: str | None = None,
    number: int = 1,
    overflow: bool = False,
    epochs: int = 3,
    patience: int = 5,
) -> None:
    shrink(patience)
    # Whatever decides the weights has to come from the seed and the checkpoint.
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(time.time_ns() % 2**32)
    if overflow:
        scale_gradients()
    if point is not None:
        POINTS[point](number)
    chosen = tuple(config.Mode(mode) for mode in modes)
    run = config.RunConfig(Path(output), epochs=epochs, train_limit=48, batch_size=8, modes=chosen)
    with quiet.quiet():
        experiments.train(replace(run, experiments=(config.Experiment(experiment),)))


def scale_gradients() -> None:
    """Gives trainings on a CPU the gradient scaler of fp16, with a scale that overflows at first."""
    create = trainer._WatchedTrainer.create_accelerator_and_postprocess

    def with_scaler(self) -> None:
        create(self)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=3)
        self.accelerator.scaler = scaler
        self.accelerator.unscale_gradients = lambda optimizer=None: scaler.unscale_(self.optimizer.optimizer)

    trainer._WatchedTrainer.create_accelerator_and_postprocess = with_scaler


def forked(job: dict) -> int:
    delay = job.pop("delay", None)
    child = os.fork()
    if child == 0:
        os.dup2(2, 1)
        try:
            train(**job)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    for line in sys.stdin:
        print(forked(json.loads(line)), flush=True)
