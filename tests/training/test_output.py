import json
import stat

import pytest

from bwsk_fx.errors import TrainingError
from bwsk_fx.training.config import Experiment, Mode, Variant
from bwsk_fx.training.output import RESULT_FILE, Output, differences, write_json

VARIANT = Variant(Experiment.SCRATCH, Mode.CONVENTIONAL)


def test_a_folder_appears_whole(tmp_path):
    output = Output(tmp_path)
    with output.staged(VARIANT.folder) as stage:
        write_json(stage / RESULT_FILE, {"test_metric": 0.5})
        assert not (tmp_path / VARIANT.folder).exists()
    assert output.result(VARIANT) == {"test_metric": 0.5}
    assert [entry.name for entry in tmp_path.iterdir()] == [VARIANT.folder]
    assert stat.S_IMODE((tmp_path / VARIANT.folder).stat().st_mode) & 0o055


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
def test_a_failure_leaves_nothing_and_the_old_folder_as_it_was(tmp_path, failure):
    output = Output(tmp_path)
    with output.staged(VARIANT.folder) as stage:
        write_json(stage / RESULT_FILE, {"test_metric": 0.5})
    with pytest.raises(failure), output.staged(VARIANT.folder) as stage:
        write_json(stage / RESULT_FILE, {"test_metric": 0.9})
        raise failure
    assert output.result(VARIANT) == {"test_metric": 0.5}
    assert [entry.name for entry in tmp_path.iterdir()] == [VARIANT.folder]


def test_a_folder_is_replaced(tmp_path):
    output = Output(tmp_path)
    for value in (0.5, 0.9):
        with output.staged(VARIANT.folder) as stage:
            write_json(stage / RESULT_FILE, {"test_metric": value})
    assert output.result(VARIANT) == {"test_metric": 0.9}
    assert [entry.name for entry in tmp_path.iterdir()] == [VARIANT.folder]


def test_a_full_disk_is_a_training_error(tmp_path):
    with pytest.raises(TrainingError, match="No space left"), Output(tmp_path).staged("x"):
        raise OSError(28, "No space left on device")
    assert not list(tmp_path.iterdir())


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    output = Output(tmp_path)
    output.write("results.json", lambda path: write_json(path, {"a": 1}))
    with pytest.raises(ValueError, match="broken"):
        output.write("results.json", _write_half)
    assert json.loads((tmp_path / "results.json").read_text()) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["results.json"]


def _write_half(path) -> None:
    path.write_text('{"a":')
    raise ValueError("broken")


def test_opened_removes_the_folders_that_it_made_when_nothing_came(tmp_path):
    with pytest.raises(RuntimeError), Output(tmp_path / "a" / "b").opened():
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_opened_sweeps_up_after_a_killed_run(tmp_path):
    (tmp_path / ".partial-abc").mkdir()
    (tmp_path / ".partial-abc" / "model.safetensors").touch()
    (tmp_path / ".partial-loss.png").touch()
    with Output(tmp_path).opened():
        assert not list(tmp_path.iterdir())


def test_a_path_below_a_file_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(TrainingError, match="cannot be written; choose another --output"):
        Output(tmp_path / "file" / "out").require_usable()


def test_a_folder_of_somebody_elses_is_left_alone(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(TrainingError, match="holds other files"):
        Output(tmp_path).require_usable()
    (tmp_path / "results.json").write_text("{}")
    Output(tmp_path).require_usable()


def test_unreadable_results_are_named(tmp_path):
    (tmp_path / VARIANT.folder).mkdir()
    (tmp_path / VARIANT.folder / RESULT_FILE).write_text("{")
    with pytest.raises(TrainingError, match=f"{RESULT_FILE}' cannot be read"):
        Output(tmp_path).results()


def test_lists_of_numbers_stay_on_one_line(tmp_path):
    value = {"steps": [1, 2, 3], "loss": [1.5, -2e-07], "names": ["a [1,\n 2]"]}
    write_json(tmp_path / "x.json", value)
    text = (tmp_path / "x.json").read_text()
    assert "[ 1, 2, 3 ]" in text
    assert json.loads(text) == value


def test_differences_in_words():
    assert differences({"seed": 0, "epochs": 1}, {"seed": 3, "epochs": 1}) == ["seed is 0, not 3"]
