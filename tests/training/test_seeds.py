"""Several seeds in one folder: ordinary runs below it, and what speaks of all of them at its root."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import yaml
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from bwsk_fx.cli import app
from bwsk_fx.errors import TrainingError
from bwsk_fx.training import card, seeds, session
from bwsk_fx.training.comparison import compare
from bwsk_fx.training.config import Experiment, Mode
from bwsk_fx.training.experiments import train
from bwsk_fx.training.output import Output, write_json
from bwsk_fx.training.seed_tables import comparison_tables

ROOT_FILES = {"README.md", "config.yaml", "results.json", "comparison.json", "comparison.png", "comparison.svg"}
VARIANTS = ["scratch-conventional", "scratch-bwsk-reversible"]
RUN = {
    "experiments": (Experiment.SCRATCH,),
    "modes": (Mode.CONVENTIONAL, Mode.REVERSIBLE),
    "train_limit": 32,
    "seed": 3,
    "seeds": 2,
}
OPTIONS = "--experiments scratch --modes conventional,reversible --epochs 1 --batch-size 8 --train-limit 32 --seed 3"


def _no_constants(text: str) -> dict:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def _names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def _stamps(folder) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What the command leaves and prints for two seeds."""
    output = tmp_path_factory.mktemp("seeds") / "out"
    arguments = ["train", "--output", str(output), *OPTIONS.split(), "--seeds", "2"]
    return output, CliRunner().invoke(app, arguments, env={"COLUMNS": "120"})


@pytest.fixture
def copied(two, tmp_path):
    return shutil.copytree(two[0], tmp_path / "out")


def _without_times(text: str) -> dict:
    return {key: value for key, value in json.loads(text).items() if "time_s" not in key}


def test_each_seed_is_an_ordinary_run(two, make_tiny, tmp_path):
    output, shown = two
    assert shown.exit_code == 0, shown.output
    assert _names(output) == {"seed-3", "seed-4", *ROOT_FILES}
    alone = train(make_tiny(tmp_path / "alone", **RUN | {"seed": 4, "seeds": 1, "modes": (Mode.CONVENTIONAL,)}))
    assert _names(output / "seed-4") == _names(alone.output) | {"scratch-bwsk-reversible"}
    folder, file = "scratch-conventional", "training_results.json"
    ours, theirs = ((root / folder / file).read_text() for root in (output / "seed-4", alone.output))
    assert _without_times(ours) == _without_times(theirs)
    for name in ("model.safetensors", "config.json"):
        assert (output / "seed-4" / folder / name).read_bytes() == (alone.output / folder / name).read_bytes()


def test_the_files_at_the_root_say_what_the_seeds_say(two):
    output, _ = two
    runs = {seed: Output(output / f"seed-{seed}").results() for seed in (3, 4)}
    contents = _no_constants((output / "comparison.json").read_text())
    assert contents == json.loads(json.dumps(compare(runs).to_json()))
    assert (contents["seeds"], contents["left_out"], contents["baseline"]) == ([3, 4], [], "conventional")
    kept = contents["experiments"]["scratch"]["saved_bytes"]
    assert kept["against_conventional"]["bwsk_reversible"]["mean_difference"] < 0
    assert kept["against_conventional"]["bwsk_reversible"]["undefined"] == "equal differences"
    accuracy = contents["experiments"]["scratch"]["test_accuracy"]["modes"]["conventional"]
    assert accuracy["by_seed"] == {str(seed): runs[seed]["scratch-conventional"]["test_metric"] for seed in (3, 4)}
    assert yaml.safe_load((output / "config.yaml").read_text())["seeds"] == 2
    summary = _no_constants((output / "results.json").read_text())
    assert summary["seeds"] == [3, 4]
    assert summary["variants"]["scratch-conventional"]["test_accuracy"]["mean"] == accuracy["mean"]
    assert list(summary["runs"]) == ["seed-3", "seed-4"]
    assert summary["runs"]["seed-4"]["scratch-conventional"]["configuration"]["seed"] == 4
    assert "loss_curve" not in summary["runs"]["seed-4"]["scratch-conventional"]


def test_the_card_has_means_deviations_and_the_comparison(two):
    output, _ = two
    loaded = ModelCard.load(output / "README.md")
    metrics = _no_constants((output / "comparison.json").read_text())["experiments"]["scratch"]
    mean = metrics["test_accuracy"]["modes"]["conventional"]
    conventional, reversible = loaded.data.eval_results
    assert conventional.metric_name == "Accuracy (scratch-conventional), mean of 2 seeds"
    assert reversible.metric_name == "Accuracy (scratch-bwsk-reversible), mean of 2 seeds"
    assert conventional.metric_value == round(mean["mean"], 6)
    assert conventional.metric_args == {
        "seeds": [3, 4],
        "standard_deviation": round(mean["standard_deviation"], 6),
    }
    cell = f"{100 * mean['mean']:.2f} ± {100 * mean['standard_deviation']:.2f}"
    assert f"| scratch-conventional | {cell} |" in loaded.text
    table = [line.strip("| ").split(" | ") for line in loaded.text.splitlines() if "| equal differences |" in line]
    assert ["scratch-bwsk-reversible", "kept (MiB)"] in [row[:2] for row in table]
    assert {len(row) for row in table} == {len(card.PAIRED_HEADINGS)}
    assert "on 2 seeds (3, 4)" in loaded.text
    assert "2 seeds. With few seeds the intervals are wide" in loaded.text
    assert "One seed" not in loaded.text
    assert "{{" not in loaded.text
    shown = re.findall(r"!\[.*?\]\((.*?)\)", loaded.text)
    assert shown == ["comparison.png", *(f"seed-3/{name}.png" for name in ("loss", "memory", "timeline"))]
    assert all((output / name).is_file() for name in shown)
    subfolder = re.search(r'Model.*subfolder="(.*)"', loaded.text)[1]
    assert (output / subfolder / "model.safetensors").is_file()


def test_the_terminal_shows_both_tables(two):
    _, shown = two
    assert shown.stderr.splitlines()[0].startswith("seed-3/scratch-conventional: 4 steps")
    assert "means over seeds 3, 4" in shown.stdout
    assert "scratch-bwsk-reversible minus scratch-conventional, paired" in shown.stdout
    row = next(line for line in shown.stdout.splitlines() if line.startswith("kept (MiB)"))
    assert "equal differences" in row


def test_the_tables_fit_a_small_terminal(two):
    from rich.console import Console

    runs = {seed: Output(two[0] / f"seed-{seed}").results() for seed in (3, 4)}
    console = Console(width=80)
    with console.capture() as capture:
        console.print(*comparison_tables(compare(runs), console.width))
    assert "…" not in capture.get()
    assert "training\n" not in capture.get()


def test_finished_seeds_are_kept_when_more_are_asked_for(copied, make_tiny):
    _pass_off_as_seed(shutil.copytree(copied / "seed-4", copied / "seed-5"), 5)
    before = _stamps(copied)
    report = train(make_tiny(copied, **RUN | {"seeds": 3}))
    assert report.trained == ()
    assert list(report.results) == [f"seed-{seed}/{folder}" for seed in (3, 4, 5) for folder in VARIANTS]
    assert _stamps(copied) == before
    assert report.comparison.seeds == (3, 4, 5)
    assert _no_constants((copied / "comparison.json").read_text())["seeds"] == [3, 4, 5]
    assert "on 3 seeds (3, 4, 5)" in (copied / "README.md").read_text()


def _pass_off_as_seed(folder, seed: int) -> None:
    for path in folder.glob("*/training_results.json"):
        result = json.loads(path.read_text())
        result["configuration"]["seed"] = seed
        write_json(path, result)


def test_nothing_is_trained_again_and_the_root_is_written_again(copied, make_tiny):
    for name in ROOT_FILES:
        (copied / name).unlink()
    assert train(make_tiny(copied, **RUN)).trained == ()
    assert _names(copied) >= ROOT_FILES


def test_a_run_that_is_cut_off_says_nothing_at_the_root(make_tiny, tmp_path, monkeypatch):
    config = make_tiny(tmp_path / "out", **RUN | {"modes": (Mode.CONVENTIONAL,), "train_limit": 16})
    with monkeypatch.context() as patched:
        _cut_off(patched, after=1)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert _names(tmp_path / "out") == {"seed-3"}
    report = train(config)
    assert report.trained == ("seed-4/scratch-conventional",)
    assert _names(tmp_path / "out") >= ROOT_FILES


def test_seeds_that_are_trained_again_are_no_longer_spoken_of(copied, make_tiny, monkeypatch):
    _cut_off(monkeypatch, after=0)
    with pytest.raises(KeyboardInterrupt):
        train(make_tiny(copied, **RUN, overwrite=True))
    assert _names(copied) == {"seed-3", "seed-4"}


def _cut_off(patched, after: int) -> None:
    whole, done = session.run, []

    def run(*arguments):
        if len(done) == after:
            raise KeyboardInterrupt
        done.append(whole(*arguments))
        return done[-1]

    patched.setattr(session, "run", run)


def test_one_folder_has_one_layout(copied, two, make_tiny, six_variants):
    one = make_tiny(copied, **RUN | {"seeds": 1})
    with pytest.raises(TrainingError, match=r"holds a run of several seeds; pass --seeds"):
        train(one)
    with pytest.raises(TrainingError, match=r"holds a run of one seed, .*; choose another --output"):
        train(replace(one, output=six_variants.output, seeds=2))
    unfinished = copied / "seed-3"
    for path in unfinished.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (unfinished / ".unfinished-scratch-conventional").mkdir()
    with pytest.raises(TrainingError, match="holds a run of one seed"):
        train(replace(one, output=unfinished, seeds=2))


def test_every_seed_in_the_folder_is_of_one_configuration(copied, make_tiny):
    # Seed 3 is not part of this run, and would be compared with it.
    later = make_tiny(copied, **RUN | {"seed": 4, "epochs": 2})
    with pytest.raises(TrainingError, match=r"seed-3' holds scratch-conventional of another .*epochs is 1, not 2"):
        train(replace(later, overwrite=True))
    with pytest.raises(TrainingError, match=r"epochs is 1, not 2.*choose another --output$"):
        train(later)
    assert _names(copied) >= ROOT_FILES


def test_somebody_elses_folder_of_a_seeds_name_is_left_alone(make_tiny, tmp_path):
    (tmp_path / "out" / "seed-4").mkdir(parents=True)
    (tmp_path / "out" / "seed-4" / "oats.txt").write_text("mine")
    with pytest.raises(TrainingError, match="seed-4' holds other files"):
        train(make_tiny(tmp_path / "out", **RUN))
    assert _names(tmp_path / "out") == {"seed-4"}


def test_fewer_than_one_seed_is_refused(make_tiny, tmp_path):
    with pytest.raises(TrainingError, match="--seeds must be at least 1, not 0"):
        train(make_tiny(tmp_path / "out", seeds=0))


def _write(output, folders: dict[str, list[str]], two) -> None:
    for seed, variants in folders.items():
        for variant in variants:
            result = json.loads((two[0] / "seed-3" / variant / "training_results.json").read_text())
            (output / seed / variant).mkdir(parents=True)
            write_json(output / seed / variant / "training_results.json", result)


def test_without_the_conventional_mode_the_card_says_so(two, make_tiny, tmp_path):
    _write(tmp_path, {"seed-0": VARIANTS[1:], "seed-1": VARIANTS[1:]}, two)
    seeds.write_comparison(Output(tmp_path), make_tiny(tmp_path))
    text = (tmp_path / "README.md").read_text()
    assert "* scratch has no conventional mode, so there is nothing to compare: its figures are means only." in text
    assert "d_z" not in text
    assert "p values" not in text
    assert "1 variant of" in text


def test_seeds_that_are_left_out_are_named(two, make_tiny, tmp_path):
    _write(tmp_path, {"seed-0": VARIANTS, "seed-2": VARIANTS[:1]}, two)
    seeds.write_comparison(Output(tmp_path), make_tiny(tmp_path))
    text = (tmp_path / "README.md").read_text()
    assert "left out: 2." in text
    assert "* One seed." in text
    assert "| fewer than 2 seeds |" in text
    assert "on 1 seed (0)" in text
    assert "±" not in text


def test_seeds_without_a_common_variant_are_not_compared(two, make_tiny, tmp_path):
    _write(tmp_path, {"seed-0": VARIANTS[:1], "seed-1": VARIANTS[1:]}, two)
    with pytest.raises(TrainingError, match=r"no seed in .* holds every variant"):
        seeds.write_comparison(Output(tmp_path), make_tiny(tmp_path))
    assert _names(tmp_path) == {"seed-0", "seed-1"}
