"""A training that is killed goes on, and ends with the bits of one that was not."""

import json
import random
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import TrainerControl

from bwsk_fx.errors import TrainingError
from bwsk_fx.training.config import Experiment, Mode
from bwsk_fx.training.experiments import train
from bwsk_fx.training.output import Output
from bwsk_fx.training.resume import MARKER, Checkpoint, Checkpoints, Pace
from bwsk_fx.training.watch import KeepBest

KILLED = -9
FINISHED = 0
PICTURES = {f"{name}.{suffix}" for name in ("loss", "accuracy", "memory", "timeline") for suffix in ("png", "svg")}
PUBLISHED = {"README.md", "config.yaml", "results.json", *PICTURES}
TIMES = {"wall_time_s", "preparation_time_s", "step_time_s", "resumed_at_steps", "earlier_time_s"}


@dataclass
class Driver:
    """The process that forks trainings."""

    process: subprocess.Popen

    def run(self, output: Path, point: str | None = None, number: int = 1, **changes) -> int:
        job = {"output": str(output), "modes": ["conventional"]}
        self.process.stdin.write(json.dumps(job | {"point": point, "number": number} | changes) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


@pytest.fixture(scope="module")
def driver():
    command = [sys.executable, str(Path(__file__).with_name("killed_runs.py"))]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=Path(__file__).parents[2]) as process:
        yield Driver(process)
        process.stdin.close()


@pytest.fixture(scope="module")
def whole(driver, tmp_path_factory):
    """The folder of a run in all modes that nothing disturbed."""
    output = tmp_path_factory.mktemp("whole") / "out"
    assert driver.run(output, modes=list(Mode)) == FINISHED
    return output


def _results(output: Path, folder: str) -> dict:
    return json.loads((output / folder / "training_results.json").read_text())


def _assert_same(output: Path, whole: Path, folder: str) -> None:
    for name in ("model.safetensors", "config.json", "preprocessor_config.json"):
        assert (output / folder / name).read_bytes() == (whole / folder / name).read_bytes(), name
    resumed, undisturbed = _results(output, folder), _results(whole, folder)
    differing = {name for name in resumed.keys() | undisturbed.keys() if resumed.get(name) != undisturbed.get(name)}
    assert differing <= TIMES


def _assert_nothing_half_written(output: Path, *folders: str) -> None:
    assert {path.name for path in output.iterdir()} == {*PUBLISHED, *folders}
    names = {"config.json", "model.safetensors", "preprocessor_config.json", "training_results.json"}
    for folder in folders:
        assert {path.name for path in (output / folder).iterdir()} == names


def _steps(output: Path, folder: str = "scratch-conventional") -> list[int]:
    """The steps of the checkpoints that are whole."""
    unfinished = Output(output).unfinished(folder)
    return sorted(int(path.parent.name.removeprefix("checkpoint-")) for path in unfinished.glob(f"*/{MARKER}"))


def _watched(output: Path, step: int, folder: str = "scratch-conventional") -> dict:
    return json.loads((Output(output).unfinished(folder) / f"checkpoint-{step}" / "watched.json").read_text())


def test_a_training_killed_three_times_ends_with_the_same_bits(driver, whole, tmp_path):
    output, folder = tmp_path / "out", "scratch-bwsk-reversible"
    run = {"modes": ["reversible"]}
    assert driver.run(output, "in a step", 7, **run) == KILLED
    assert _steps(output, folder) == [4]
    # Evaluations are after 4, 8, 12, 16 and 18 steps of 6 in an epoch: 8 is whole, 12 is not.
    assert driver.run(output, "in a checkpoint", 2, **run) == KILLED
    assert _steps(output, folder) == [4, 8]
    assert {path.name for path in Output(output).unfinished(folder).iterdir()} == {
        "checkpoint-4",
        "checkpoint-8",
        "checkpoint-12",
    }
    assert driver.run(output, "between variants", **run) == KILLED
    assert Output(output).unfinished(folder).is_dir()
    assert driver.run(output, **run) == FINISHED
    _assert_same(output, whole, folder)
    _assert_nothing_half_written(output, folder)


def test_the_times_of_a_resumed_training_are_summed_and_marked(driver, whole, tmp_path):
    output, folder = tmp_path / "out", "scratch-conventional"
    assert driver.run(output, "before the marker", 3) == KILLED
    first = _watched(output, 8)
    assert len(first["times"]) == len(first["losses"]) == 8
    assert first["elapsed_s"] > sum(first["times"])
    assert driver.run(output, "in a step", 5) == KILLED
    second = _watched(output, 12)
    assert second["times"][:8] == first["times"]
    assert second["elapsed_s"] > first["elapsed_s"] + sum(second["times"][8:])
    assert driver.run(output) == FINISHED
    result = _results(output, folder)
    assert result["resumed_at_steps"] == [8, 12]
    assert result["earlier_time_s"] == second["elapsed_s"]
    assert result["wall_time_s"] > result["earlier_time_s"] + result["preparation_time_s"]
    assert not TIMES - _results(output, folder).keys()
    assert "resumed_at_steps" not in _results(whole, folder)


def test_a_kill_while_an_old_checkpoint_goes_costs_nothing(driver, whole, tmp_path):
    output = tmp_path / "out"
    assert driver.run(output, "while an old one goes", 3) == KILLED
    assert _steps(output) == [8, 12]
    assert driver.run(output) == FINISHED
    assert _results(output, "scratch-conventional")["resumed_at_steps"] == [12]
    _assert_same(output, whole, "scratch-conventional")
    _assert_nothing_half_written(output, "scratch-conventional")


def test_the_digits_own_checkpoint_is_resumed_too(driver, tmp_path):
    output, undisturbed = tmp_path / "out", tmp_path / "undisturbed"
    assert driver.run(output, "in a checkpoint", 2, experiment="finetune") == KILLED
    # The digits 0 to 4 are about half of the samples: an evaluation after each epoch of 3 steps.
    assert _steps(output, "pretrained") == [3]
    assert driver.run(output, experiment="finetune") == FINISHED
    assert json.loads((output / "pretrained" / "pretraining_results.json").read_text())["resumed_at_steps"] == [3]
    assert driver.run(undisturbed, experiment="finetune") == FINISHED
    for folder in ("pretrained", "finetune-conventional"):
        ours, theirs = (path / folder / "model.safetensors" for path in (output, undisturbed))
        assert ours.read_bytes() == theirs.read_bytes()


def test_the_gradient_scaler_is_part_of_a_checkpoint(driver, whole, tmp_path):
    output, undisturbed = tmp_path / "out", tmp_path / "undisturbed"
    assert driver.run(undisturbed, overflow=True) == FINISHED
    assert driver.run(output, "in a step", 7, overflow=True) == KILLED
    assert (Output(output).unfinished("scratch-conventional") / "checkpoint-4" / "scaler.pt").exists()
    assert driver.run(output, overflow=True) == FINISHED
    _assert_same(output, undisturbed, "scratch-conventional")
    # The steps that overflow are skipped, so the scaler made a difference, and no loss is counted as lost.
    losses = [_results(path, "scratch-conventional")["loss_curve"]["loss"] for path in (undisturbed, whole)]
    assert losses[0] != losses[1]
    assert _results(output, "scratch-conventional")["nan_count"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(Mode))
def test_twenty_kills_at_random_moments(driver, tmp_path, mode):
    # 120 steps, so that most of the time is training.
    whole, run, began = tmp_path / "whole", {"modes": [mode], "epochs": 20, "patience": 99}, time.perf_counter()
    assert driver.run(whole, **run) == FINISHED
    seconds = time.perf_counter() - began
    output, dice, outcomes, resumed = tmp_path / "out", random.Random(mode), [], []
    while outcomes.count(KILLED) < 20 and len(outcomes) < 200:
        outcomes.append(driver.run(output, **run, delay=dice.uniform(0, seconds)))
        if outcomes[-1] == FINISHED:
            resumed += _assert_whole(output, whole)
            output = tmp_path / f"out-{len(outcomes)}"
    assert outcomes.count(KILLED) == 20
    assert driver.run(output, **run) == FINISHED
    assert resumed + _assert_whole(output, whole)


def _assert_whole(output: Path, whole: Path) -> list[int]:
    """Compares a finished run and gives the steps at which it went on."""
    folder = next(path.name for path in output.glob("scratch-*"))
    _assert_same(output, whole, folder)
    _assert_nothing_half_written(output, folder)
    return _results(output, folder).get("resumed_at_steps", [])


@pytest.fixture
def unfinished(driver, tmp_path):
    """A folder with a training that was killed after the checkpoints 4 and 8."""
    assert driver.run(tmp_path / "out", "in a step", 11) == KILLED
    return tmp_path / "out"


def _checkpoints(folder: Path, **identity) -> Checkpoints:
    return Checkpoints("mine", folder / ".unfinished-mine", {"seed": 0} | identity)


def _fill(checkpoints: Checkpoints, step: int) -> Path:
    with checkpoints.saving(step) as folder:
        (folder / "optimizer.pt").write_bytes(bytes(range(100)))
    return folder


def test_the_newest_two_are_kept(tmp_path):
    checkpoints = _checkpoints(tmp_path)
    folders = [_fill(checkpoints, step) for step in (2, 10, 9, 30)]
    assert [folder.exists() for folder in folders] == [False, True, False, True]
    assert checkpoints.newest() == Checkpoint(folders[-1], 30)


def test_checkpoints_take_a_twentieth_of_the_time():
    pace = Pace()
    assert pace.due(0.0)
    pace.saved(began=10.0, ended=13.0)
    assert [pace.due(now) for now in (14.0, 72.9, 73.0)] == [False, False, True]


def test_a_checkpoint_without_its_marker_was_cut_off(tmp_path, caplog):
    checkpoints = _checkpoints(tmp_path)
    first, second = _fill(checkpoints, 2), _fill(checkpoints, 4)
    (second / MARKER).unlink()
    assert checkpoints.newest() == Checkpoint(first, 2)
    assert not second.exists()
    assert not caplog.records


@pytest.mark.parametrize("failure", [RuntimeError("no"), KeyboardInterrupt()])
def test_a_failure_leaves_no_whole_checkpoint(tmp_path, failure):
    checkpoints = _checkpoints(tmp_path)
    with pytest.raises(type(failure)), checkpoints.opened(), checkpoints.saving(2) as folder:
        (folder / "optimizer.pt").touch()
        raise failure
    assert checkpoints.newest() is None
    with checkpoints.opened():
        pass
    assert not list(tmp_path.iterdir())


def test_checkpoints_of_another_identity_are_refused(tmp_path):
    _fill(_checkpoints(tmp_path), 2)
    _checkpoints(tmp_path).require_same_identity()
    with pytest.raises(
        TrainingError, match=r"unfinished mine of another configuration \(seed is 0, not 3\).*overwrite"
    ):
        _checkpoints(tmp_path, seed=3).require_same_identity()
    assert (tmp_path / ".unfinished-mine" / "checkpoint-2" / MARKER).exists()


def test_another_configuration_needs_another_folder_or_overwrite(unfinished, make_tiny):
    changes = {"experiments": (Experiment.SCRATCH,), "modes": (Mode.CONVENTIONAL,)}
    with pytest.raises(TrainingError, match=r"unfinished scratch-conventional .*epochs is 3, not 1.*--overwrite"):
        train(make_tiny(unfinished, **changes))
    assert _steps(unfinished) == [4, 8]
    report = train(make_tiny(unfinished, overwrite=True, **changes))
    assert "resumed_at_steps" not in report.results["scratch-conventional"]
    _assert_nothing_half_written(unfinished, "scratch-conventional")


def test_the_unfinished_work_of_another_variant_is_left_alone(unfinished, make_tiny):
    report = train(make_tiny(unfinished, experiments=(Experiment.SCRATCH,), modes=(Mode.ANALYZED,)))
    assert list(report.results) == ["scratch-bwsk-analyzed"]
    assert _steps(unfinished) == [4, 8]


def test_a_checkpoint_holds_the_best_weights_and_the_patience(tmp_path):
    model, control = torch.nn.Linear(2, 2), TrainerControl()

    def evaluate(keeper: KeepBest, accuracy: float) -> None:
        keeper.on_evaluate(None, None, control, metrics={"eval_accuracy": accuracy}, model=model)

    keeper, best = KeepBest(patience=3), model.weight.detach().clone()
    evaluate(keeper, 0.5)
    torch.nn.init.normal_(model.weight)
    evaluate(keeper, 0.4)
    keeper.save(tmp_path)
    resumed = KeepBest(patience=3)
    resumed.load(Checkpoint(tmp_path, 2))
    evaluate(resumed, 0.5)
    assert not control.should_training_stop
    evaluate(resumed, 0.4)
    assert control.should_training_stop
    resumed.on_train_end(None, None, control, model=model)
    assert torch.equal(model.weight, best)


def test_another_number_of_processes_is_another_configuration(tmp_path):
    alone, two = _checkpoints(tmp_path / "alone"), _checkpoints(tmp_path / "two", processes=2)
    _fill(alone, 2)
    _fill(two, 2)
    # Checkpoints of one process do not say so.
    _checkpoints(tmp_path / "alone", processes=1).require_same_identity()
    two.require_same_identity()
    with pytest.raises(TrainingError, match=r"\(processes is 1, not 2\)"):
        _checkpoints(tmp_path / "alone", processes=2).require_same_identity()
    with pytest.raises(TrainingError, match=r"\(processes is 2, not 1\)"):
        _checkpoints(tmp_path / "two").require_same_identity()
