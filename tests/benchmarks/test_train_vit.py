"""The three modes learn the same, side by side."""

import json

import pytest
import train_vit

SMALL = ["--layers", "1", "--hidden", "64", "--batch", "8", "--image", "32", "--budgets", "0"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    train_vit.main(
        [
            *SMALL,
            "--precision",
            "fp32",
            "--steps",
            "30",
            "--learning-rate",
            "3e-3",
            "--device",
            "cpu",
            "--output",
            str(folder),
        ]
    )
    assert sorted(path.name for path in folder.iterdir()) == ["train-vit-cpu.json", "train-vit-cpu.png"]
    result = json.loads((folder / "train-vit-cpu.json").read_text())
    return {row.pop("variant"): row for row in result["rows"]}


def test_every_mode_learns(rows):
    assert list(rows) == ["conventional", "analyzed", "reversible, budget 0", "checkpoint per block"]
    for row in rows.values():
        assert len(row["losses"]) == 30
        assert row["losses"][0] > 2.2
        assert row["losses"][-1] < row["losses"][0] - 0.2
        assert row["accuracy"] > 0.2


def test_modes_without_rounding_have_the_same_losses(rows):
    conventional = rows["conventional"]["losses"]
    assert rows["analyzed"]["losses"] == rows["checkpoint per block"]["losses"] == conventional
    assert rows["analyzed"]["drift"] == 0.0
    assert rows["reversible, budget 0"]["losses"] == pytest.approx(conventional, rel=1e-4)


def test_memory_is_relative_to_the_conventional_mode(rows):
    assert rows["conventional"]["peak"] == rows["analyzed"]["peak"] == 1.0
    assert rows["reversible, budget 0"]["kept MiB"] < 0.8 * rows["conventional"]["kept MiB"]
    for row in rows.values():
        # Weights once and AdamW's two states, whichever the mode.
        assert row["all MiB"] - row["peak MiB"] == pytest.approx(
            rows["conventional"]["all MiB"] - rows["conventional"]["peak MiB"]
        )


def test_too_few_steps_are_refused(capsys):
    with pytest.raises(SystemExit):
        train_vit.main([*SMALL, "--steps", "3"])
    assert "--steps must be more than 3" in capsys.readouterr().err


@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    train_vit.main([*SMALL, "--precision", "fp16", "--steps", "30", "--device", "cuda", "--output", str(tmp_path)])
    rows = {row["variant"]: row for row in json.loads((tmp_path / "train-vit-cuda.json").read_text())["rows"]}
    assert rows["analyzed"]["losses"] == rows["conventional"]["losses"]
    assert rows["reversible, budget 0"]["losses"] == pytest.approx(rows["conventional"]["losses"], rel=2e-2)
