"""Several processes train what one does at the same batch, write it once, and end together."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import ViTConfig

from bwsk_fx.errors import TrainingError
from bwsk_fx.training import models, processes
from bwsk_fx.training.config import Experiment, Mode, RunConfig
from bwsk_fx.training.experiments import train
from bwsk_fx.training.output import Output
from bwsk_fx.training.quiet import quiet

FOLDERS = ["scratch-conventional", "scratch-bwsk-analyzed", "scratch-bwsk-reversible"]
PICTURES = {f"{name}.{suffix}" for name in ("loss", "accuracy", "memory", "timeline") for suffix in ("png", "svg")}
PUBLISHED = {"README.md", "config.yaml", "results.json", *PICTURES}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
# On a machine without GPUs, accelerate starts one process unless it is told that there are to be several.
ACCELERATE = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
# Of 70 samples the last batch of 16 holds 6: all are in the first process's part, none in the second's.
OPTIONS = {"epochs": 2, "train_limit": 70, "batch_size": 16}


def _launch(launcher: list[str], *arguments: object, timeout: int = 300) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "140"}
    command = [sys.executable, *launcher, *map(str, arguments)]
    return subprocess.run(
        command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=timeout
    )


def _command(output: Path, vit: Path, **options: object) -> list[object]:
    fixed = {"output": output, "model": vit, "experiments": "scratch"}
    named = {f"--{name.replace('_', '-')}": value for name, value in (fixed | OPTIONS | options).items()}
    return ["-m", "bwsk_fx.cli", "train", *(word for option in named.items() for word in option)]


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A checkpoint's folder without its weights; without the biases of keys, whose gradients are rounding alone."""
    folder = tmp_path_factory.mktemp("vit")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    ViTConfig(**sizes, image_size=16, patch_size=4, qkv_bias=False).save_pretrained(folder)
    models._vit_processor(16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def alone(vit, tmp_path_factory):
    output = tmp_path_factory.mktemp("alone") / "out"
    with quiet():
        train(RunConfig(output, model=str(vit), experiments=(Experiment.SCRATCH,), **OPTIONS))
    return output


@pytest.fixture(scope="module")
def launched(vit, tmp_path_factory):
    """The folder and the printed lines of one run in all modes on two processes."""
    output = tmp_path_factory.mktemp("launched") / "out"
    done = _launch(ACCELERATE, *_command(output, vit))
    assert done.returncode == 0, done.stderr
    return output, done


def _result(output: Path, folder: str) -> dict:
    return json.loads((output / folder / "training_results.json").read_text())


@pytest.mark.parametrize("folder", FOLDERS)
def test_two_processes_learn_what_one_does(alone, launched, folder):
    output, _ = launched
    expected, found = _result(alone, folder), _result(output, folder)
    torch.testing.assert_close(
        load_file(output / folder / "model.safetensors"),
        load_file(alone / folder / "model.safetensors"),
        rtol=1e-5,
        atol=1e-6,
    )
    assert found["loss_curve"]["step"] == list(range(1, 11))
    assert found["loss_curve"]["loss"] == pytest.approx(expected["loss_curve"]["loss"], rel=1e-5)
    same = ("accuracy_curve", "best_val_metric", "test_metric", "total_steps", "epochs_completed", "configuration")
    assert {name: found[name] for name in same} == {name: expected[name] for name in same}
    assert (expected["environment"]["processes"], found["environment"]["processes"]) == (1, 2)
    # A process holds the activations of its half of the batch.
    assert found["saved_for_backward_bytes"] < 0.6 * expected["saved_for_backward_bytes"]


@pytest.mark.slow
def test_batches_that_make_a_step_together_are_shared_too(vit, tmp_path):
    # Five batches of 16 are three steps: the last one has the small batch alone.
    settings = {"modes": "conventional", "trainer": "gradient_accumulation_steps=2"}
    for name, launcher in (("one", []), ("two", TORCHRUN)):
        done = _launch(launcher, *_command(tmp_path / name, vit, **settings))
        assert done.returncode == 0, done.stderr
    expected, found = (_result(tmp_path / name, FOLDERS[0]) for name in ("one", "two"))
    assert found["total_steps"] == 6
    assert found["loss_curve"]["loss"] == pytest.approx(expected["loss_curve"]["loss"], rel=1e-5)
    assert found["accuracy_curve"] == expected["accuracy_curve"]


def test_two_processes_write_and_print_once(launched):
    output, done = launched
    assert {path.name for path in output.iterdir()} == {*PUBLISHED, *FOLDERS}
    for folder in FOLDERS:
        names = {"config.json", "model.safetensors", "preprocessor_config.json", "training_results.json"}
        assert {path.name for path in (output / folder).iterdir()} == names
    assert done.stdout.count("Models, plots and model card") == 1
    assert [line.split(":")[0] for line in done.stderr.splitlines() if " steps, best" in line] == FOLDERS


@pytest.fixture(scope="module")
def failed(alone, vit, tmp_path_factory):
    """What two processes agreed on, and what became of a command that may not touch the folder of another seed."""
    before, notes = _times(alone), tmp_path_factory.mktemp("notes")
    program = Path(__file__).with_name("failing_command.py")
    done = _launch(TORCHRUN, program, notes, *_command(alone, vit, seed=3)[2:])
    assert _times(alone) == before
    return [json.loads((notes / f"{rank}.json").read_text()) for rank in range(2)], done


def _times(output: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in output.rglob("*")}


def test_an_error_ends_all_processes_with_one_message(failed):
    _, done = failed
    assert done.returncode != 0
    messages = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(messages) == 1, done.stderr
    assert "holds scratch-conventional of another configuration (seed is 0, not 3)" in messages[0]
    assert "bwsk_fx/" not in done.stderr  # no traceback of ours


def test_processes_agree_on_results_and_errors(failed):
    (main, other), _ = failed
    full, broken = ["OSError", "[Errno 28] full"], ["ValueError", "broken"]
    agreed = {
        "decided": 5,
        "mean": 1.5,
        "main failed to decide": full,
        "main failed to make": broken,
        "main failed": broken,
        "the other failed": full,
        "nobody failed": None,
    }
    # What only one of them can hold reaches the main process in words.
    assert main == agreed | {
        "made by each": 0,
        "the other failed in its own way": ["TrainingError", "Unsendable: own way"],
    }
    assert other == agreed | {"made by each": 1, "the other failed in its own way": ["Unsendable", "own way"]}


@pytest.fixture
def as_rank(monkeypatch):
    def pretend(rank: int, count: int) -> None:
        monkeypatch.setattr(processes, "rank", lambda: rank)
        monkeypatch.setattr(processes, "count", lambda: count)

    return pretend


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("total", [1, 3, 4, 6, 7, 8])
def test_every_sample_of_a_step_counts_the_same(as_rank, count, total):
    weights = []
    for rank in range(count):
        as_rank(rank, count)
        share = processes.share(total, batch_size=8)
        # The loss of a process is a mean over its samples, that of the step a mean over processes.
        weights += [share.weight / share.samples / count] * share.samples
    assert [weight for weight in weights if weight] == pytest.approx([1 / total] * total)


def test_a_batch_that_cannot_be_shared_is_an_error(as_rank):
    as_rank(0, 3)
    assert processes.batch_of_each(12) == 4
    with pytest.raises(
        TrainingError, match=r"^3 processes cannot share a batch of 16 samples evenly; choose a --batch"
    ):
        processes.batch_of_each(16)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "ACCELERATE_USE_FSDP",
            "true",
            r"does not support FSDP \(its checkpoints .*apply_to_blocks .*\); launch it with",
        ),
        ("ACCELERATE_USE_DEEPSPEED", "true", "does not support DeepSpeed; launch it with"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "asks for --mixed_precision bf16, the run for fp32; give the run"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "leave the launcher's --dynamo_backend out"),
    ],
)
def test_what_a_launcher_asks_for_beyond_processes_is_an_error(monkeypatch, make_tiny, tmp_path, name, value, message):
    monkeypatch.setenv(name, value)
    with pytest.raises(TrainingError, match=message):
        train(make_tiny(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_launcher_may_say_what_the_run_says(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    processes.require_supported("bf16")


def _killed(output: Path, **job: object) -> subprocess.CompletedProcess:
    job = {"output": str(output), "modes": [Mode.REVERSIBLE.value]} | job
    return _launch([*TORCHRUN, str(Path(__file__).with_name("launched_runs.py"))], json.dumps(job))


@pytest.mark.slow
def test_killed_processes_end_all_and_the_same_command_goes_on_with_the_same_bits(make_tiny, tmp_path):
    output, whole, folder = tmp_path / "out", tmp_path / "whole", FOLDERS[2]
    assert _killed(whole).returncode == 0
    kills = [
        {"victim": 1, "point": "in a step", "number": 7},
        {"victim": 0, "point": "in a step", "number": 3},
        {"victim": 0, "point": "in a checkpoint", "number": 2},
        # It writes its random state alone.
        {"victim": 1, "point": "in a checkpoint", "number": 1},
        {"victim": 0, "point": "before the marker", "number": 2},
    ]
    for kill in kills:
        assert _killed(output, **kill).returncode != 0
    with quiet(), pytest.raises(TrainingError, match=r"unfinished .*processes is 2, not 1.*--overwrite"):
        train(make_tiny(output, experiments=(Experiment.SCRATCH,), modes=(Mode.REVERSIBLE,)))
    done = _killed(output)
    assert done.returncode == 0, done.stderr
    assert (output / folder / "model.safetensors").read_bytes() == (whole / folder / "model.safetensors").read_bytes()
    assert _result(output, folder)["loss_curve"] == _result(whole, folder)["loss_curve"]
    assert _result(output, folder)["resumed_at_steps"] == [4, 8, 12]
    assert not Output(output).unfinished(folder).exists()
    assert {path.name for path in output.iterdir()} == {*PUBLISHED, folder}
