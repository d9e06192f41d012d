"""What goes wrong in a training ends in one line that says what to do, and costs no finished work."""

import json
import math
import os
import pickle
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from bwsk_fx.errors import TrainingError
from bwsk_fx.training import faults, models, resume, trainer, watch
from bwsk_fx.training.config import Experiment, Mode, Precision, Recipe, ReversibleOptions, RunConfig
from bwsk_fx.training.data import as_tensors, load_splits
from bwsk_fx.training.experiments import train
from bwsk_fx.training.output import Output
from bwsk_fx.training.progress import SilentBar
from bwsk_fx.training.quiet import quiet
from bwsk_fx.training.resume import MARKER, Checkpoint

FOLDER = "scratch-conventional"
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.fixture(autouse=True, scope="module")
def small_model():
    tiny = models.BUILT_IN[models.TINY_VIT] | SIZES | {"hidden_dropout_prob": 0.1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.BUILT_IN, models.TINY_VIT, tiny)
        patch.setattr(resume, "SAVING_SHARE", math.inf)  # at every evaluation, however long writing takes
        yield


def _scratch(output: Path, *modes: Mode, **changes) -> RunConfig:
    """A configuration of three epochs of 6 steps, so that there are checkpoints after 6 and 12."""
    tiny = {"output": output, "epochs": 3, "train_limit": 48, "batch_size": 8, "experiments": (Experiment.SCRATCH,)}
    return RunConfig(**tiny | {"modes": modes or (Mode.CONVENTIONAL,)} | changes)


@pytest.fixture
def at_step(monkeypatch):
    """Has something happen in place of, or in front of, one training step, counted from 1."""

    def arrange(number: int, action) -> None:
        original, calls = trainer._WatchedTrainer.training_step, iter(range(1, 10**9))

        def step(self, *args, **kwargs):
            if next(calls) == number:
                action(*args, **kwargs)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(trainer._WatchedTrainer, "training_step", step)

    return arrange


def _raise(error: BaseException):
    def action(*args, **kwargs):
        raise error

    return action


def _quietly(config):
    with quiet():
        return train(config)


def _weights(output: Path, folder: str = FOLDER) -> bytes:
    return (output / folder / "model.safetensors").read_bytes()


def _checkpoint(output: Path, step: int, folder: str = FOLDER) -> Path:
    return Output(output).unfinished(folder) / f"checkpoint-{step}"


@pytest.fixture(scope="module")
def undisturbed(small_model, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    _quietly(_scratch(output, Mode.CONVENTIONAL, Mode.ANALYZED))
    return output


@pytest.fixture
def interrupted(at_step, tmp_path):
    """A folder with the checkpoints 6 and 12 of an interrupted training."""
    at_step(15, _raise(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        _quietly(_scratch(tmp_path / "out"))
    assert sorted(path.name for path in Output(tmp_path / "out").unfinished(FOLDER).iterdir()) == [
        "checkpoint-12",
        "checkpoint-6",
    ]
    return tmp_path / "out"


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _flip(path: Path) -> None:
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 1
    path.write_bytes(contents)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("optimizer.pt", _truncate),
        ("best.safetensors", _flip),
        ("watched.json", Path.unlink),
        (MARKER, _truncate),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(interrupted, undisturbed, caplog, name, damage):
    damage(_checkpoint(interrupted, 12) / name)
    report = _quietly(_scratch(interrupted))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"passing over the damaged '{_checkpoint(interrupted, 12)}' ({name}" in caplog.text
    assert report.results[FOLDER]["resumed_at_steps"] == [6]
    assert _weights(interrupted) == _weights(undisturbed)


def test_without_a_whole_checkpoint_a_training_starts_from_its_beginning(interrupted, undisturbed, caplog):
    for step in (6, 12):
        _flip(_checkpoint(interrupted, step) / "model.safetensors")
    report = _quietly(_scratch(interrupted))
    assert len(caplog.records) == 2
    assert "resumed_at_steps" not in report.results[FOLDER]
    assert _weights(interrupted) == _weights(undisturbed)


class _Trap:
    def __reduce__(self):
        return exec, ("raise SystemExit('a checkpoint ran code')",)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_runs_no_code(interrupted, name):
    folder = _checkpoint(interrupted, 12)
    torch.save({"trap": _Trap()}, folder / name)
    checkpoint = Checkpoint(folder, 12)
    checkpoint.seal(checkpoint.identity())
    with pytest.raises(TrainingError, match="checkpoint-12' holds what is not safe to load; remove it"):
        _quietly(_scratch(interrupted))
    with pytest.raises(SystemExit):
        pickle.loads(pickle.dumps(_Trap()))


@dataclass
class Disk:
    """A small file system."""

    root: Path

    def leave(self, free: int) -> None:
        """Fills it up to so many bytes."""
        available = os.statvfs(self.root)
        (self.root / "filler").write_bytes(bytes(available.f_bavail * available.f_frsize - free))

    def free(self) -> None:
        (self.root / "filler").unlink()


@pytest.fixture
def disk(tmp_path):
    root = tmp_path / "disk"
    root.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", root], capture_output=True)
    if mount.returncode != 0:
        pytest.skip("a small file system cannot be mounted here")
    yield Disk(root)
    # Lazily: after a failed test its exception may hold a file open.
    subprocess.run(["umount", "--lazy", root], check=True)


# A checkpoint is about 280 KiB: the model and its best weights 60 KiB each, the optimizer 120 KiB.
@pytest.mark.parametrize(
    "free",
    [0, 2**16 + 2**15, *(pytest.param(free, marks=pytest.mark.slow) for free in (2**15, 2**17 + 2**16))],
)
def test_a_full_disk_costs_no_finished_work(disk, undisturbed, free):
    output = disk.root / "out"
    _quietly(_scratch(output))
    finished = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    disk.leave(free)
    with pytest.raises(TrainingError, match=r"No space left on device.*; free some space: the same command then"):
        _quietly(_scratch(output, Mode.ANALYZED))
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == finished
    disk.free()
    _quietly(_scratch(output, Mode.ANALYZED))
    assert _weights(output, "scratch-bwsk-analyzed") == _weights(undisturbed, "scratch-bwsk-analyzed")


def test_a_disk_that_fills_up_leaves_the_checkpoints_that_fitted(disk, undisturbed, at_step):
    at_step(10, lambda *args, **kwargs: disk.leave(2**16))
    with pytest.raises(TrainingError, match=r"No space left on device.* goes on from step 6$"):
        _quietly(_scratch(disk.root / "out"))
    disk.free()
    report = _quietly(_scratch(disk.root / "out"))
    assert report.results[FOLDER]["resumed_at_steps"] == [6]
    assert _weights(disk.root / "out") == _weights(undisturbed)


def test_a_disk_too_full_for_the_result_leaves_no_half_of_it(disk, undisturbed, at_step):
    at_step(18, lambda *args, **kwargs: disk.leave(2**15))
    with pytest.raises(TrainingError, match=f"'{FOLDER}' cannot be written .*No space left on device"):
        _quietly(_scratch(disk.root / "out"))
    assert [path.name for path in (disk.root / "out").iterdir()] == [f".unfinished-{FOLDER}"]
    disk.free()
    assert _quietly(_scratch(disk.root / "out")).results[FOLDER]["resumed_at_steps"] == [12]
    assert _weights(disk.root / "out") == _weights(undisturbed)


def _spoil(model, inputs, *args) -> None:
    inputs["pixel_values"].fill_(math.nan)


def test_a_loss_that_is_no_number_ends_the_training(at_step, tmp_path):
    at_step(3, _spoil)
    with pytest.raises(TrainingError, match=r"^scratch-bwsk-reversible: the loss of step 3 is nan; try another"):
        _quietly(_scratch(tmp_path / "out", Mode.REVERSIBLE))
    assert not (tmp_path / "out").exists()


def test_another_number_format_is_suggested_when_there_is_one():
    with pytest.raises(TrainingError, match="the loss of step 2 is inf; try --precision fp32, or another --seed or a"):
        faults.require_finite("x", [1.0, math.inf], Precision.BF16)
    faults.require_finite("x", [math.nan, 1.0], Precision.BF16)


def test_fp16_skips_a_few_such_steps_before_it_gives_up():
    few = [1.0] + [math.nan] * (faults.NON_FINITE_LOSSES_IN_FP16 - 1)
    faults.require_finite("x", few, Precision.FP16)
    faults.require_finite("x", [*few, 1.0, math.nan], Precision.FP16)
    with pytest.raises(
        TrainingError, match="the loss of step 11 is nan, as were the 9 before it; try --precision fp32"
    ):
        faults.require_finite("x", [*few, math.nan], Precision.FP16)


def test_a_gradient_scaler_keeps_a_lost_step_away_from_the_weights(at_step, monkeypatch):
    _add_scaler(monkeypatch)
    # On a CPU the scaler goes with fp32, where such a loss would end the training.
    rule = faults.require_finite
    monkeypatch.setattr(watch, "require_finite", lambda name, losses, _: rule(name, losses, Precision.FP16))
    at_step(3, _spoil)
    splits, processor = load_splits("digits", train_limit=48), models.load_processor(models.TINY_VIT)
    parts = [as_tensors(part, processor) for part in (splits.train, splits.validation, splits.test)]
    model = models.from_scratch(models.TINY_VIT, splits.labels)
    recipe = Recipe(learning_rate=1e-3, epochs=1, batch_size=8, patience=3, max_grad_norm=1.0)
    with quiet():
        outcome = trainer.run(trainer.Task(model, *parts, recipe, Precision.FP32, seed=0), SilentBar())
    assert [math.isfinite(loss) for loss in outcome.losses] == [True, True, False, True, True, True]
    assert outcome.nan_count == 1
    assert all(value.isfinite().all() for value in model.state_dict().values())


def _add_scaler(monkeypatch) -> None:
    create = trainer._WatchedTrainer.create_accelerator_and_postprocess

    def with_scaler(self) -> None:
        create(self)
        self.accelerator.scaler = scaler = torch.amp.GradScaler("cpu")
        self.accelerator.unscale_gradients = lambda optimizer=None: scaler.unscale_(self.optimizer.optimizer)

    monkeypatch.setattr(trainer._WatchedTrainer, "create_accelerator_and_postprocess", with_scaler)


@pytest.mark.parametrize(
    ("mode", "budget", "ways"),
    [
        (Mode.CONVENTIONAL, 0.0, "train with --modes reversible, or take a smaller batch with --batch-size 4"),
        (Mode.ANALYZED, 0.0, "train with --modes reversible, or take a smaller batch with --batch-size 4"),
        (Mode.REVERSIBLE, 0.0, "let rebuilding take more time with --budget 0.1, or take a smaller batch"),
        (Mode.REVERSIBLE, 0.1, "let rebuilding take more time with --budget 0.25, or take a smaller batch"),
        (Mode.REVERSIBLE, 0.25, "let rebuilding take more time with --budget inf, or take a smaller batch"),
        (Mode.REVERSIBLE, math.inf, "; take a smaller batch with --batch-size 4 and another --output"),
    ],
)
def test_exhausted_memory_names_what_takes_less(at_step, tmp_path, mode, budget, ways):
    at_step(2, _raise(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")))
    config = _scratch(tmp_path / "out", mode, plan=ReversibleOptions(budget=budget))
    with pytest.raises(TrainingError) as caught:
        _quietly(config)
    message = str(caught.value)
    assert message.startswith(
        f"{config.variants[0].folder}: out of memory with a batch of 8 (CUDA out of memory. Tried"
    )
    assert ways in message
    assert "\n" not in message
    assert not (tmp_path / "out").exists()


def test_memory_that_runs_out_on_a_cpu_is_recognised():
    message = "[enforce fail at alloc_cpu.cpp:1] . DefaultCPUAllocator: can't allocate memory"
    with (
        pytest.raises(TrainingError, match=r"; take a smaller model$"),
        faults.memory_explained("x", Mode.REVERSIBLE, math.inf, batch_size=1),
    ):
        raise RuntimeError(message)
    with pytest.raises(RuntimeError, match=r"^other"), faults.memory_explained("x", Mode.CONVENTIONAL, 0.0, 8):
        raise RuntimeError("other")


def test_parameters_without_gradients_need_one_process(at_step, tmp_path):
    at_step(2, _raise(RuntimeError("Expected to have finished reduction in the prior iteration before starting")))
    with pytest.raises(TrainingError, match=f"^{FOLDER}: some parameters of the model take no part in its loss, which"):
        _quietly(_scratch(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.fixture
def pictures(tmp_path):
    for index in range(40):
        folder = tmp_path / "pictures" / ("dark" if index % 2 else "light")
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (9, 7), 20 if index % 2 else 220).save(folder / f"{index}.png")
    return tmp_path / "pictures"


@pytest.mark.parametrize("contents", [lambda whole: whole[:-30], lambda whole: b"", lambda whole: b"text" * 20])
@pytest.mark.parametrize("kept", [True, False])
def test_a_broken_image_is_named(pictures, tmp_path, monkeypatch, contents, kept):
    if not kept:
        monkeypatch.setattr("bwsk_fx.training.data.MATERIALIZE_BYTES", 0)
    broken = pictures / "dark" / "3.png"
    broken.write_bytes(contents(broken.read_bytes()))
    with pytest.raises(TrainingError, match=f"data set '{pictures}': '{broken}' cannot be read as an image"):
        _quietly(_scratch(tmp_path / "out", data=str(pictures), model=models.TINY_VIT, epochs=1))
    assert not (tmp_path / "out").exists()


def test_an_error_of_another_file_is_not_blamed_on_the_images(pictures):
    splits = load_splits(str(pictures))
    with pytest.raises(OSError, match=r"^mine$"), faults.images_explained("x", [splits.train]):
        raise OSError("mine")


@pytest.mark.parametrize("mode", [Mode.CONVENTIONAL, Mode.REVERSIBLE])
def test_images_of_a_size_that_the_model_does_not_take(pictures, tmp_path, mode):
    checkpoint = tmp_path / "checkpoint"
    with quiet():
        models.from_scratch(models.TINY_VIT, ("dark", "light")).save_pretrained(checkpoint)
    models._vit_processor(24).save_pretrained(checkpoint)
    config = _scratch(tmp_path / "out", mode, data=str(pictures), model=str(checkpoint))
    with pytest.raises(TrainingError, match="takes images of 16 by 16, its image processor makes 24 by 24; correct"):
        _quietly(replace(config, experiments=(Experiment.FINETUNE,)))
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_with_another_number_of_classes_gets_a_new_head(pictures, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    with quiet():
        models.from_scratch(models.TINY_VIT, tuple("abcdefg")).save_pretrained(checkpoint)
    models._vit_processor(16).save_pretrained(checkpoint)
    config = _scratch(tmp_path / "out", data=str(pictures), model=str(checkpoint), epochs=1)
    _quietly(replace(config, experiments=(Experiment.FINETUNE,)))
    trained = json.loads((tmp_path / "out" / "finetune-conventional" / "config.json").read_text())
    assert trained["id2label"] == {"0": "dark", "1": "light"}
