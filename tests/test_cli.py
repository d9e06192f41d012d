"""The command line from the outside: what it prints, its exit codes, and that failures leave nothing behind."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bwsk_fx import inspect_command, train_command
from bwsk_fx.cli import app

TINY = ["--epochs", "1", "--train-limit", "48", "--batch-size", "8"]
WIDE = {"COLUMNS": "140"}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


def _run(*arguments: object, **environment: str):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env=WIDE | environment)


def _assert_one_line(result, *words: str) -> None:
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]
    assert not result.stdout.strip()


class _Branching:
    """Makes a classifier whose forward pass looks at its data, which no capture can follow."""

    def __new__(cls, name: str, **overrides):
        from transformers import ViTForImageClassification

        from bwsk_fx.training.models import load_config

        class BranchingViT(ViTForImageClassification):
            def forward(self, pixel_values, labels=None, **kwargs):
                if pixel_values.sum() > 1e9:
                    return super().forward(pixel_values * 2, labels=labels, **kwargs)
                return super().forward(pixel_values, labels=labels, **kwargs)

        return BranchingViT(load_config(name, **overrides))


def test_help_names_the_commands_and_every_option():
    assert all(word in _run("--help").stdout for word in ("inspect", "calm", "train", "--version"))
    text = _run("train", "--help").stdout
    for option in ("--output", "--data", "--model", "--experiments", "--modes", "--budget", "--faith", "--granularity"):
        assert option in text
    text = _run("inspect", "--help").stdout
    assert all(option in text for option in ("--html", "--budget", "--faith"))
    assert all(
        option in text for option in ("--ruleset", "--json", "--calm", "--erasure", "--node", "--compare", "--certify")
    )
    more = (
        "--budget",
        "--faith",
        "--input",
        "--filter",
        "--diff",
        "--top",
        "--svg",
        "--dot",
        "--graphml",
        "--model-explorer",
        "--depth",
    )
    assert all(option in text for option in more)
    text = _run("calm", "--help").stdout
    options = ("--axis", "--devices", "--batch-size", "--bandwidth", "--speed", "--svg", "--json", "--layers")
    assert all(option in text for option in options)


def test_the_choices_are_the_librarys():
    # Written out twice, so that --help need not import torch.
    from bwsk_fx.passes.find_regions import GRANULARITIES
    from bwsk_fx.passes.type_nodes import RULESETS
    from bwsk_fx.planning.options import FAITHS

    assert set(inspect_command.Ruleset) == set(RULESETS)
    assert set(train_command.Faith) == set(FAITHS)
    assert set(train_command.Granularity) == set(GRANULARITIES)


def test_the_help_of_train_fits_80_columns():
    text = _run("train", "--help", COLUMNS="80", TERMINAL_WIDTH="80").stdout
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for name in train_command._option_types():
        assert f" --{name.replace('_', '-')} " in text or f" --{name}/" in text
    panels = ["The run", "What is trained", "How it is trained", "Reversible mode"]
    places = [text.index(f"─ {panel}") for panel in panels]
    assert places == sorted(places)


def test_help_does_not_import_transformers():
    heavy = {"transformers", "datasets", "sklearn", "matplotlib", "kornia", "yaml"}
    code = f"import sys, bwsk_fx.cli; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_train_compares_and_skips(tmp_path):
    output = tmp_path / "out"
    arguments = ["train", "--output", output, "--experiments", "scratch", "--modes", "conventional", *TINY]
    first = _run(*arguments)
    assert first.exit_code == 0, first.output
    # One line, and nothing that other libraries have to say.
    assert first.stderr.startswith("scratch-conventional: 6 steps, best validation accuracy")
    assert len(first.stderr.splitlines()) == 1
    result = json.loads((output / "scratch-conventional" / "training_results.json").read_text())
    row = next(line for line in first.stdout.splitlines() if line.startswith("scratch-conventional"))
    assert f"{result['test_metric']:.2%}" in row
    assert f"{result['saved_for_backward_bytes'] / 2**20:.2f}" in row

    second = _run(*arguments)
    assert second.exit_code == 0
    assert "already there: scratch-conventional" in second.stdout
    assert row in second.stdout


@pytest.fixture
def asked(monkeypatch):
    """The runs that the command asks for; none is trained."""
    runs = []
    monkeypatch.setattr(train_command, "_trained", runs.append)
    monkeypatch.setattr(train_command, "_show_run", lambda report: None)
    return runs


def test_flags_and_a_file_have_the_names_of_a_runs_options():
    from bwsk_fx.training.config import RunConfig, _flat

    assert {name for name, _ in _flat(RunConfig(Path("out")))} == train_command._option_types().keys()


def test_flags_win_over_the_file_and_the_file_over_defaults(asked, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "output: out\nmodes: [reversible, analyzed]\nepochs: 3\nlearning-rate: 1e-4\nfaith: exact\naugment: true\n"
        "trainer: {optim: adafactor, adam_beta1: 0.8}\noverwrite: true\nprecision: bf16\n"
    )
    plain = _run("train", "--config", file)
    flags = ["--epochs", 5, "--no-augment", "--modes", "conventional", "--trainer", "optim=sgd", "--faith", "rounded"]
    changed = _run("train", *flags, "--config", file)
    _run("train")
    assert (plain.exit_code, changed.exit_code) == (0, 0), plain.output + changed.output
    by_file, by_flags, by_default = asked
    assert by_file.options() == by_default.options() | {
        "output": "out",
        "modes": ["analyzed", "reversible"],
        "epochs": 3,
        "learning_rate": 1e-4,
        "faith": "exact",
        "augment": True,
        "trainer": {"optim": "adafactor", "adam_beta1": 0.8},
        "precision": "bf16",
    }
    assert by_file.overwrite
    assert by_flags.options() == by_file.options() | {
        "epochs": 5,
        "augment": False,
        "modes": ["conventional"],
        "trainer": {"optim": "sgd", "adam_beta1": 0.8},
        "faith": "rounded",
    }


def test_every_flag_of_the_recipe_arrives(asked):
    flags = {
        "learning_rate": 0.5,
        "schedule": "linear",
        "warmup": 0.25,
        "weight_decay": 0.125,
        "clip": 2.0,
        "patience": 7,
        "evaluation_steps": 11,
    }
    done = _run("train", *(text for name, value in flags.items() for text in (f"--{name.replace('_', '-')}", value)))
    assert done.exit_code == 0, done.output
    assert vars(asked[0].recipe_options) == flags


def test_the_example_of_the_documentation_is_a_run(asked, tmp_path):
    page = (Path(__file__).parent.parent / "docs" / "training.md").read_text()
    (example,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "run.yaml").write_text(example)
    done = _run("train", "--config", tmp_path / "run.yaml")
    assert done.exit_code == 0, done.output
    asked[0].validate()
    assert asked[0].trainer and asked[0].recipe_options.learning_rate


def test_the_configuration_in_the_output_is_the_same_run(tmp_path):
    output, file = tmp_path / "out", tmp_path / "run.yaml"
    file.write_text(
        f"output: {output}\nexperiments: scratch\nmodes: [conventional]\nepochs: 1\nbatch_size: 8\n"
        "train_limit: 24\nclip: 0\naugment: true\ntrainer: {optim: sgd, gradient_accumulation_steps: 2}\n"
    )
    first = _run("train", "--config", file)
    assert first.exit_code == 0, first.output
    assert first.stderr.startswith("scratch-conventional: 2 steps")
    result = json.loads((output / "scratch-conventional" / "training_results.json").read_text())
    configuration = result["configuration"]
    assert (configuration["max_grad_norm"], configuration["augment"]) == (0.0, True)
    assert configuration["trainer"] == {"gradient_accumulation_steps": 2, "optim": "sgd"}
    again = _run("train", "--config", output / "config.yaml")
    assert "already there: scratch-conventional" in again.stdout
    assert not again.stderr
    other = _run("train", "--config", output / "config.yaml", "--trainer", "optim=adafactor")
    _assert_one_line(other, "of another configuration", "trainer is", "--overwrite")


def test_a_file_that_makes_no_sense(tmp_path):
    file = tmp_path / "run.yaml"
    _assert_one_line(_run("train", "--config", file), "run.yaml", "cannot be read")
    file.write_text("moddes: conventional")
    _assert_one_line(_run("train", "--config", file), "run.yaml", "'moddes'", "did you mean 'modes'?")


def test_the_table_fits_a_small_terminal(tmp_path):
    output = tmp_path / "out"
    arguments = ["train", "--output", output, "--experiments", "scratch", "--modes", "conventional", *TINY]
    table = _run(*arguments, COLUMNS="80").stdout
    assert "…" not in table
    assert "step" not in table
    assert "step" in _run(*arguments).stdout


def test_inspect_counts_vit_base_as_published():
    result = _run("inspect", "vit-base", "--ruleset", "published", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["model"], report["ruleset"]) == ("vit-base", "published")
    assert report["summary"]["s"] == 98
    assert report["summary"]["k"] == 38


def test_inspect_takes_layers_and_shows_calm():
    small = ["inspect", "vit-base", "--layers", 2, "--image-size", 32, "--ruleset", "published"]
    report = json.loads(_run(*small, "--calm", "--json").stdout)
    # Ten blocks of 8 S and 3 K less than ViT-base.
    assert (report["summary"]["s"], report["summary"]["k"]) == (18, 8)
    assert report["calm"]
    shown = _run(*small, "--calm")
    assert shown.exit_code == 0
    assert "vit-base under the published ruleset" in shown.stdout


SMALL_CALM = ["calm", "vit-base", "--layers", 2, "--image-size", 32]


def test_calm_shows_axes_order_and_a_sharding():
    shown = _run(*SMALL_CALM, "--devices", 2, "--batch-size", 1000, "--bandwidth", 25, "--speed", 1, COLUMNS="100")
    assert shown.exit_code == 0, shown.output
    lines = shown.stdout.splitlines()
    assert max(map(len, lines)) <= 100
    assert any(line.startswith("side by side, 2 times") for line in lines)
    assert "2 devices, 1000 samples per step" in shown.stdout
    (batch,) = [line.split() for line in lines if line.startswith("batch   pixel_values")]
    assert batch[:4] == ["batch", "pixel_values", batch[2], "1"]
    assert [line.split(":")[0] for line in lines[-2:]] == ["seconds computing", "seconds sending"]


def test_calm_certifies_its_claims():
    contents = json.loads(_run(*SMALL_CALM, "--certify", "--json").stdout)
    counts = contents["certificates"]["counts"]
    assert counts["certified"] > 100 and counts["wrong"] == counts["untried"] == 0


def test_calm_as_json_says_what_the_tables_say():
    options = ["--devices", 2, "--batch-size", 1000, "--bandwidth", 25]
    contents = json.loads(_run(*SMALL_CALM, *options, "--json").stdout)
    assert contents["model"] == "vit-base"
    assert {"axes", "nodes", "unknown", "order"} <= contents["calm"].keys()
    assert contents["sharding"]["devices"] == 2
    assert contents["seconds_sending"] == contents["sharding"]["total_bytes"] / 25e9
    assert "seconds_computing" not in contents
    one = json.loads(_run(*SMALL_CALM, "--axis", "token", "--json").stdout)
    assert (one["axis"]["axis"], "calm" in one) == ("token", False)


def test_calm_shows_one_axis_and_writes_a_picture(tmp_path):
    shown = _run(*SMALL_CALM, "--axis", "feature", "--svg", tmp_path / "calm.svg", COLUMNS="100")
    assert shown.exit_code == 0, shown.output
    (mlp,) = [line.split() for line in shown.stdout.splitlines() if line.startswith("vit_layers_0_mlp_fc1 ")]
    assert mlp == ["vit_layers_0_mlp_fc1", "vit_layers_0_mlp_fc2", "3", "2"]
    assert (tmp_path / "calm.svg").read_text(encoding="utf-8").startswith("<svg ")


FACTORY = """
import torch
from torch import nn

def make():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)), torch.randn(3, 4)
"""


def test_calm_takes_what_inspect_takes(tmp_path):
    import torch
    import transformers

    (tmp_path / "made.py").write_text(FACTORY)
    factory = f"{tmp_path / 'made.py'}:make"
    namespace: dict = {}
    exec(FACTORY, namespace)
    model, inputs = namespace["make"]()
    program = torch.export.export(model, (inputs,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, tmp_path / "made.pt2")
    config = transformers.GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=3, n_head=2)
    config.architectures = ["GPT2LMHeadModel"]
    config.save_pretrained(tmp_path)

    def axes(*arguments: object) -> dict[str, tuple[int, int, int]]:
        done = _run("calm", *arguments, "--json")
        assert done.exit_code == 0, done.output
        contents = json.loads(done.stdout)["calm"]
        assert contents["unknown"] == []
        kinds = ("partitions", "barriers", "reduces")
        return {axis["axis"]: tuple(len(axis[kind]) for kind in kinds) for axis in contents["axes"]}

    # The features of the input, of the hidden layer and of the output; the first two are summed over.
    assert axes(factory) == axes(tmp_path / "made.pt2") == {"batch": (1, 0, 0), "feature": (3, 0, 2)}
    assert axes(tmp_path, "--layers", 1, "--input", "attention_mask=2,16:int64")["token"][1] > 0
    _assert_one_line(_run("calm", factory, "--input", "3,4"), "--input has nothing to say")
    _assert_one_line(_run("calm", factory, "--layers", 2), "--layers is not for")
    _assert_one_line(_run("calm", tmp_path / "no.pt2"), "no such file")


def test_calm_refuses_what_makes_no_sense(tmp_path):
    _assert_one_line(_run(*SMALL_CALM, "--axis", "expert"), "no axis 'expert'; the graph has batch, channel")
    for option in ("--batch-size", "--bandwidth", "--speed"):
        _assert_one_line(_run(*SMALL_CALM, option, 4), f"{option} is for --devices")
    missing = tmp_path / "missing" / "calm.svg"
    _assert_one_line(_run(*SMALL_CALM, "--svg", missing), "--svg", "cannot be written: No such file")
    assert not missing.parent.exists()


def test_inspect_shows_erasure_layer_by_layer():
    small = ["inspect", "vit-base", "--layers", 3, "--image-size", 32, "--erasure"]
    report = json.loads(_run(*small, "--json").stdout)
    layers = [layer["layer"] for layer in report["erasure"]["layers"]]
    assert layers[:4] == ["vit.embeddings", "vit.layers.0", "vit.layers.1", "vit.layers.2"]
    for total in ("erased_elements", "erased_bits", "unmeasured", "gray"):
        assert report["erasure"][total] == report["summary"][total]
    shown = _run(*small, COLUMNS="80").stdout
    so_far = f"{report['erasure']['erased_elements']:,.0f}"
    assert [line for line in shown.splitlines() if line.startswith("vit.layers.2 ")]
    assert "…" not in shown
    assert so_far in shown.split("what erases it")[0].splitlines()[-2]


def test_inspect_certifies_and_compares():
    small = ["inspect", "vit-tiny-digits", "--layers", 1, "--certify", "--compare"]
    report = json.loads(_run(*small, "--json").stdout)
    assert report["certificates"]["demoted"] == 0
    assert report["certificates"]["certified"] == report["summary"]["s"]
    fc2 = next(row for row in report["comparison"]["disagreements"] if row["example"] == "vit_layers_0_mlp_fc2")
    assert (fc2["operator"], fc2["published"], fc2["sound"]) == ("Linear", "S", "K")
    shown = _run(*small).stdout
    assert "worst relative round-trip error" in shown
    assert "leaf-module calls" in shown
    refused = _run("inspect", "vit-tiny-digits", "--layers", 1, "--certify", "--ruleset", "published")
    _assert_one_line(refused, '"sound" ruleset')


def test_inspect_follows_a_node():
    small = ["inspect", "vit-base", "--layers", 1, "--image-size", 32, "--node"]
    report = json.loads(_run(*small, "classifier", "--json").stdout)["provenance"]
    assert (report["node"], report["inputs"]) == ("classifier", [])
    assert [(cut["node"], cut["erasure"]["elements"]) for cut in report["cuts"]] == [("classifier", 768 - 2)]
    shown = _run(*small, "classifier")
    assert "way back: cut at classifier" in shown.stdout
    unknown = _run(*small, "vit.layers.0.mlp.fc3")
    _assert_one_line(unknown, "no node 'vit.layers.0.mlp.fc3'", "did you mean 'vit_layers_0_mlp_fc2'")


def test_inspect_writes_a_page_and_keeps_its_output_clean(tmp_path):
    path = tmp_path / "page.html"
    result = _run("inspect", "vit-tiny-digits", "--layers", 2, "--html", path, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert result.stderr.splitlines() == [f"written to {path}"]
    text = path.read_text(encoding="utf-8")
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])
    assert data["title"] == "vit-tiny-digits"
    assert data["tree"]["counts"] == {
        "S": report["summary"]["s"],
        "K": report["summary"]["k"],
        "GRAY": report["summary"]["gray"],
    }
    assert data["saved"]
    assert text.count("<svg ") == 2
    _assert_one_line(
        _run("inspect", "vit-tiny-digits", "--layers", 2, "--html", path / "no.html"), "cannot be written", "no.html"
    )


def test_the_page_is_planned_as_asked(tmp_path):
    def planned(*options: object) -> tuple[set[str], int]:
        path = tmp_path / "page.html"
        done = _run("inspect", "vit-tiny-digits", "--layers", 1, "--html", path, *options)
        assert done.exit_code == 0, done.output
        data = json.loads(re.search(r'id="data">(.*?)</script>', path.read_text(encoding="utf-8"), re.DOTALL)[1])
        return {region["options"] for region in data["regions"]}, data["totals"]["kept_bytes"]

    options, kept = planned()
    assert options == {"budget=0.0, faith='rounded'"}
    options, least = planned("--faith", "exact", "--budget", "inf")
    assert options == {"budget=inf, faith='exact'"}
    assert least < kept
    for option in (("--budget", 0.1), ("--faith", "exact")):
        _assert_one_line(_run("inspect", "vit-tiny-digits", *option), f"{option[0]} is for the plans of --html")
    _assert_one_line(
        _run("inspect", "vit-tiny-digits", "--html", tmp_path / "no.html", "--budget", -1), "budget is -1.0"
    )
    assert not (tmp_path / "no.html").exists()


def test_inspect_reads_a_local_configuration(tmp_path):
    from bwsk_fx.training.models import load_config

    load_config("vit-tiny-digits").save_pretrained(tmp_path)
    result = _run("inspect", tmp_path, "--ruleset", "published", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["summary"]["s"] == 4 * 8 + 2


def test_a_model_that_cannot_be_captured(tmp_path, monkeypatch):
    monkeypatch.setattr("bwsk_fx.training.models.from_config", _Branching)
    _assert_one_line(_run("inspect", "vit-tiny-digits"))
    output = tmp_path / "out"
    arguments = ["--experiments", "scratch", "--modes", "analyzed", *TINY]
    _assert_one_line(_run("train", "--output", output, *arguments))
    assert not output.exists()


def test_an_unknown_data_set(tmp_path):
    output = tmp_path / "out"
    _assert_one_line(_run("train", "--output", output, "--data", "nobody/nothing"), "'nobody/nothing'", "--data takes")
    _assert_one_line(_run("train", "--output", output, "--data", tmp_path / "no"), "no such folder")
    assert not output.exists()


def test_a_missing_checkpoint(tmp_path):
    output = tmp_path / "out"
    _assert_one_line(_run("train", "--output", output, "--model", "nobody/nothing"), "checkpoint 'nobody/nothing'")
    _assert_one_line(_run("train", "--output", output, "--model", tmp_path / "no"), "no such folder")
    _assert_one_line(_run("inspect", "nobody/nothing"), "checkpoint 'nobody/nothing'")
    assert not output.exists()


def test_an_architecture_without_weights_cannot_be_finetuned(tmp_path):
    output = tmp_path / "out"
    _assert_one_line(_run("train", "--output", output, "--model", "vit-tiny-digits"), "without weights")
    assert not output.exists()


def test_an_output_folder_that_cannot_be_written(tmp_path):
    # Below a regular file nobody can write, not even root.
    (tmp_path / "file").touch()
    _assert_one_line(_run("train", "--output", tmp_path / "file" / "out"), "cannot be written")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_other_peoples_files_are_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    _assert_one_line(_run("train", "--output", tmp_path), "holds other files")
    assert [path.name for path in Path(tmp_path).iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--modes", "conventional,fast", "--modes does not know 'fast'; it takes conventional, analyzed, reversible"),
        ("--experiments", "", "nothing to train"),
        ("--epochs", "0", "--epochs must be at least 1"),
        ("--budget", "-1", "--budget must be at least 0"),
        ("--warmup", "2", "--warmup must be a share of all steps"),
        ("--schedule", "cosin", "--schedule does not know 'cosin'; it takes linear, cosine"),
        ("--trainer", "optim", "--trainer takes KEY=VALUE"),
        ("--trainer", "max_steps=3", "--trainer max_steps is not taken: use --epochs"),
    ],
)
def test_options_that_make_no_sense(tmp_path, option, value, words):
    _assert_one_line(_run("train", "--output", tmp_path / "out", option, value), words)
    assert not (tmp_path / "out").exists()
