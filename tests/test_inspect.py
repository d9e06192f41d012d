"""`bwsk-fx inspect`: what it takes, what it shows and writes, and what it refuses."""

import importlib.resources
import json
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
import torch
import transformers
from torch import nn
from typer.testing import CliRunner

from bwsk_fx.cli import app

TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 50,
    "max_position_embeddings": 32,
}
IMAGE = {**{key: TEXT[key] for key in list(TEXT)[:4]}, "image_size": 16, "patch_size": 8}
TINY = ("vit-tiny-digits", "--layers", 2)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def _run(*arguments: object, columns: int = 100):
    result = CliRunner().invoke(app, ["inspect", *map(str, arguments)], env={"COLUMNS": str(columns)})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def _json(*arguments: object) -> dict[str, Any]:
    result = _run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def _refused(*arguments: object) -> str:
    result = _run(*arguments)
    assert result.exit_code == 2, result.output
    (line,) = (line for line in result.stderr.splitlines() if line.strip())
    assert line.startswith("error: ")
    assert not result.stdout.strip()
    return line


# -- the JSON -------------------------------------------------------------------------------------------------------


def _schema() -> dict[str, Any]:
    return json.loads((importlib.resources.files("bwsk_fx") / "inspection" / "inspect.schema.json").read_text())


_TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
}


def _complaints(value: Any, schema: dict[str, Any], defs: dict[str, Any], place: str = "$") -> list[str]:
    """The part of JSON Schema that ours uses."""
    if "$ref" in schema:
        return _complaints(value, defs[schema["$ref"].rpartition("/")[2]], defs, place)
    if "anyOf" in schema:
        tried = [_complaints(value, option, defs, place) for option in schema["anyOf"]]
        return [] if [] in tried else tried[0]
    if ("const" in schema and value != schema["const"]) or ("enum" in schema and value not in schema["enum"]):
        return [f"{place} is {value!r}"]
    types = schema.get("type", list(_TYPES))
    types = [types] if isinstance(types, str) else types
    if not any(isinstance(value, _TYPES[name]) and (name == "boolean") >= isinstance(value, bool) for name in types):
        return [f"{place} is a {type(value).__name__}, not one of {types}"]
    if isinstance(value, dict):
        return _object_complaints(value, schema, defs, place)
    if isinstance(value, list) and "items" in schema:
        return [each for item in value for each in _complaints(item, schema["items"], defs, f"{place}[]")]
    return []


def _object_complaints(value: dict, schema: dict[str, Any], defs: dict[str, Any], place: str) -> list[str]:
    known = schema.get("properties", {})
    found = [f"{place} lacks {name}" for name in schema.get("required", ()) if name not in value]
    if schema.get("additionalProperties") is False:
        found += [f"{place}.{name} is not described" for name in value.keys() - known.keys()]
    for name in value.keys() & known.keys():
        found += _complaints(value[name], known[name], defs, f"{place}.{name}")
    return found


def test_the_json_is_what_the_schema_says():
    schema = _schema()
    flags = ("--erasure", "--compare", "--calm", "--certify", "--node", "classifier", "--filter", "verdict=K")
    whole = _json("vit-tiny-digits", "--layers", 1, *flags, "--diff", "vit-tiny-digits")
    assert whole["difference"]["same"] == whole["summary"]["total"]
    assert whole.keys() == schema["properties"].keys()
    published = _json(*TINY, "--ruleset", "published")
    for contents in (whole, published):
        assert contents["schema"] == 1
        assert _complaints(contents, schema, schema["$defs"]) == []
    assert _complaints(whole | {"more": 1}, schema, schema["$defs"]) == ["$.more is not described"]
    whole["nodes"][0]["label"] = "X"
    assert _complaints(whole, schema, schema["$defs"]) == ["$.nodes[].label is 'X'"]


def test_operators_and_hot_spots_add_up_to_the_summary():
    contents = _json(*TINY)
    summary, operators, spots = contents["summary"], contents["operators"], contents["hot_spots"]
    for name in ("s", "k", "gray", "erased_elements", "erased_bits", "unmeasured"):
        assert sum(row[name] for row in operators) == summary[name]
    assert sum(len(spot["nodes"]) for spot in spots["spots"]) == summary["k"]
    assert sum(spot["share"] for spot in spots["spots"]) == pytest.approx(1)
    sizes = [spot["erased_bytes"] for spot in spots["spots"]]
    assert sizes == sorted(sizes, reverse=True)
    # 17 tokens, from 256 to 64 dimensions of four bytes, in two blocks.
    (fc2,) = (spot for spot in spots["spots"] if spot["module"] == "vit.layers.*.mlp.fc2")
    assert fc2["nodes"] == ["vit_layers_0_mlp_fc2", "vit_layers_1_mlp_fc2"]
    assert (fc2["erased_elements"], fc2["erased_bytes"]) == (2 * 17 * 192, 2 * 17 * 192 * 4)
    # A bit of each of GELU's elements.
    (gelu,) = (spot for spot in spots["spots"] if spot["operator"] == "GELUActivation")
    assert gelu["erased_bytes"] == gelu["erased_bits"] / 8 == 2 * 17 * 256 / 8
    (first,) = _json(*TINY, "--top", 1)["hot_spots"]["spots"]
    assert first == spots["spots"][0]


def test_tables_fit_100_columns():
    shown = _run(*TINY, "--erasure", "--filter", "verdict=K", "--diff", "vit-tiny-digits", "--compare")
    assert shown.exit_code == 0, shown.output
    lines = shown.stdout.splitlines()
    assert max(map(len, lines)) <= 100
    assert "…" not in shown.stdout
    for title in ("per operator", "where most is erased", "erased per sample, layer by layer", "9 nodes"):
        assert any(line.startswith(title) for line in lines), title


# -- filters and differences ----------------------------------------------------------------------------------------


def test_filters_of_one_kind_are_alternatives_and_of_several_all_hold():
    nodes = _json(*TINY, "--filter", "verdict=k", "--filter", "module=vit.layers.1*", "--filter", "module=classifier")
    found = {node["name"] for node in nodes["nodes"]}
    assert found == {
        "scaled_dot_product_attention_1",
        "vit_layers_1_mlp_activation_fn",
        "vit_layers_1_mlp_fc2",
        "classifier",
    }
    assert sum(row["k"] for row in nodes["operators"]) == 4
    assert nodes["summary"]["k"] == 9
    linear = _json(*TINY, "--filter", "operator=Lin*")["nodes"]
    assert {node["operator"] for node in linear} == {"Linear"}
    assert len(linear) == 2 * 6 + 1


def test_filters_that_are_not_read():
    assert "'block=1' is not read: it is verdict=…, operator=…, module=…" in _refused(*TINY, "--filter", "block=1")
    assert "no such verdict; there are S, K, GRAY" in _refused(*TINY, "--filter", "verdict=Q")


def test_a_difference_names_layers_amounts_and_verdicts(tmp_path):
    from bwsk_fx.training.models import load_config

    config = load_config("vit-tiny-digits", num_hidden_layers=3)
    config.hidden_act, config.intermediate_size = "relu", 64
    config.save_pretrained(tmp_path)
    difference = _json(*TINY, "--diff", tmp_path)["difference"]
    changes = {(change["kind"], change["module"], change["operator"]) for change in difference["changes"]}
    assert ("only in B", "vit.layers.2.mlp.fc1", "Linear") in changes
    assert ("only in A", "vit.layers.0.mlp.activation_fn", "GELUActivation") in changes
    assert ("only in B", "vit.layers.0.mlp.activation_fn", "ReLU") in changes
    # From 64 to 64 dimensions nothing is lost.
    assert {change[1:] for change in changes if change[0] == "verdict differs"} == {
        (f"vit.layers.{index}.mlp.fc2", "Linear") for index in range(2)
    }
    assert difference["only_in_a"] == 2
    counts = [difference[kind] for kind in ("only_in_a", "only_in_b", "verdict_differs", "amount_differs")]
    assert sum(counts) == len(difference["changes"])
    shown = _run(*TINY, "--diff", tmp_path).stdout
    assert [line.split() for line in shown.splitlines() if line.startswith("verdict differs")] == [
        ["verdict", "differs", "2"]
    ]


# -- models ---------------------------------------------------------------------------------------------------------

ARCHITECTURES = {
    "BertForMaskedLM": (transformers.BertConfig(**TEXT), {"input_ids": (2, 16), "labels": (2, 16)}),
    "BertModel": (transformers.BertConfig(**TEXT), {"input_ids": (2, 16)}),
    "BertForQuestionAnswering": (
        transformers.BertConfig(**TEXT),
        {"input_ids": (2, 16), "start_positions": (2,), "end_positions": (2,)},
    ),
    "LlamaForCausalLM": (
        transformers.LlamaConfig(**TEXT, num_key_value_heads=2),
        {"input_ids": (2, 16), "labels": (2, 16)},
    ),
    "T5ForConditionalGeneration": (
        transformers.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2),
        {"input_ids": (2, 16), "labels": (2, 16), "decoder_input_ids": (2, 16)},
    ),
    "ResNetForImageClassification": (
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]),
        {"pixel_values": (2, 3, 224, 224), "labels": (2,)},
    ),
    "CLIPModel": (
        transformers.CLIPConfig(text_config=TEXT, vision_config=IMAGE),
        {"input_ids": (2, 16), "pixel_values": (2, 3, 16, 16)},
    ),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_architecture_gets_inputs_with_which_it_runs(architecture, tmp_path):
    from bwsk_fx.inspection import architectures

    config, shapes = ARCHITECTURES[architecture]
    config.architectures = [architecture]
    config.save_pretrained(tmp_path)
    model = architectures.build(str(tmp_path), {})
    inputs = architectures.inputs_of(str(tmp_path), model, 2)
    assert {name: tuple(value.shape) for name, value in inputs.items()} == shapes
    assert (type(model).__name__, model.training) == (architecture, True)
    output = model(**inputs)
    assert ("loss" in output) == (inputs.keys() > {next(iter(shapes))} and architecture != "CLIPModel")


def test_layers_and_batch_size_and_named_inputs_reach_any_architecture(tmp_path):
    config = transformers.GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=3, n_head=2)
    config.architectures = ["GPT2LMHeadModel"]
    config.save_pretrained(tmp_path)
    contents = _json(tmp_path, "--layers", 1, "--input", "attention_mask=2,16:int64", "--batch-size", 2)
    assert [block["section"] for block in contents["summary"]["blocks"]] == ["transformer.h"]
    assert "names" in _refused(tmp_path, "--input", "2,16")


def test_an_unknown_architecture_says_what_to_do(tmp_path):
    config = transformers.ViTConfig(**IMAGE)
    config.architectures = ["ViTForPoetry"]
    config.save_pretrained(tmp_path)
    line = _refused(tmp_path)
    assert "architecture ViTForPoetry" in line and "inspect it as module:function" in line


FACTORIES = """
import torch
from torch import nn

def alone():
    return nn.Sequential(nn.Linear(4, 2), nn.ReLU())

def both():
    return nn.Embedding(7, 3), {"input": torch.tensor([[1, 2], [3, 4]])}

def wrong():
    return "a model"

def broken():
    raise ValueError("no weather today")

class Pairs:
    @staticmethod
    def make():
        return Sum()

class Sum(nn.Module):
    def forward(self, one, other):
        return one + 2 * other
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "my_factories.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_factory_of_the_current_directory_with_shapes(folder):
    import sys

    before = list(sys.path)
    contents = _json("my_factories:alone", "--input", "5,4")
    assert [(row["operator"], row["k"]) for row in contents["operators"]] == [("Linear", 1), ("ReLU", 1)]
    assert sys.path == before
    by_file = _json(folder / "my_factories.py:alone", "--input", "input=5,4")
    assert by_file["summary"] == contents["summary"]


def test_a_factory_with_inputs_of_its_own(folder):
    (row,) = _json("my_factories:both")["operators"]
    assert row["operator"] == "embedding"
    assert "has nothing to say" in _refused("my_factories:both", "--input", "2,2")


def test_several_inputs_go_by_place_or_by_name(folder):
    by_place = _json("my_factories:Pairs.make", "--input", "2,3", "--input", "2,3")
    by_name = _json("my_factories:Pairs.make", "--input", "other=2,3", "--input", "one=2,3:float32")
    assert by_place["summary"] == by_name["summary"]
    mixed = ("--input", "2,3", "--input", "other=2,3")
    assert "all inputs different names" in _refused("my_factories:Pairs.make", *mixed)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("my_factories:alone",), "returns no inputs: return (module, inputs), or give shapes"),
        (("my_factories:alone", "--input", "2;4"), "--input '2;4' is not read: it is a shape"),
        (("my_factories:alone", "--input", "2,4:float31"), "torch has no dtype 'float31'"),
        (("my_factories:alone", "--input", "2,4", "--layers", 2), "--layers is not for 'my_factories:alone'"),
        (("my_factories:wrong",), "returns str; a factory returns a module"),
        (("my_factories:broken",), "failed: ValueError: no weather today"),
        (("my_factories:missing",), "module 'my_factories' has no 'missing'"),
        (("no_such_module:make",), "'no_such_module' cannot be imported (ModuleNotFoundError"),
    ],
)
def test_factories_that_do_not_work(folder, arguments, words):
    assert words in _refused(*arguments)


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6)) for _ in range(2))
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


@pytest.fixture
def exported(tmp_path) -> Path:
    batch = torch.export.Dim("batch")
    program = torch.export.export(_Net(), (torch.randn(3, 6),), dynamic_shapes={"x": {0: batch}})
    torch.export.save(program, tmp_path / "net.pt2")
    return tmp_path / "net.pt2"


def test_an_exported_program_has_modules_lines_and_amounts(exported):
    contents = _json(exported, "--certify", "--filter", "operator=linear*")
    last = contents["nodes"][-1]
    assert [node["module"] for node in contents["nodes"]] == ["layers.0.1", "layers.1.1", "head"]
    # Of a batch, not of the batch of three with which it was exported.
    assert (last["label"], last["erased_elements"]) == ("K", 4)
    assert last["source"].rpartition(":")[0] == __file__
    assert [(block["section"], block["index"]) for block in contents["summary"]["blocks"]] == [
        ("layers", 0),
        ("layers", 1),
    ]
    assert contents["certificates"]["demoted"] == 0
    assert contents["certificates"]["certified"] == contents["summary"]["s"] == 6


class _Parts(nn.Module):
    def forward(self, x, y):
        with torch.no_grad():
            low, high = (y * 2).split(2, 1)
        return {"sum": x.relu() + low, "high": [high]}


class _Branch(nn.Module):
    def forward(self, x):
        return torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x.cos(), [x])


def test_what_an_exported_program_runs_without_gradients_is_part_of_its_graph():
    import bwsk_fx
    from bwsk_fx.errors import InspectError
    from bwsk_fx.inspection.exported import from_program

    inputs = {"x": torch.randn(3, 2), "y": torch.randn(3, 4)}
    source = from_program(torch.export.export(_Parts(), tuple(inputs.values())))
    expected = _Parts()(**inputs)
    total, high = source.graph(*source.inputs.values())
    assert torch.equal(total, expected["sum"]) and torch.equal(high, expected["high"][0])
    bwsk_fx.type_nodes(source.graph)
    assert {node.name for node in source.graph.graph.nodes if node.meta["bwsk"].counted} >= {"mul", "relu", "add"}
    with pytest.raises(InspectError, match=r"runs a part of it by 'cond'"):
        from_program(torch.export.export(_Branch(), (torch.randn(3),)))


def test_exported_programs_that_do_not_work(exported, tmp_path):
    assert "no such file" in _refused(tmp_path / "missing.pt2")
    (tmp_path / "text.pt2").write_text("not a program")
    assert "cannot be loaded by torch.export.load" in _refused(tmp_path / "text.pt2")
    assert "an exported program has its inputs" in _refused(exported, "--input", "2,6")
    assert "--batch-size is not for" in _refused(exported, "--batch-size", 4)


# -- files ----------------------------------------------------------------------------------------------------------


def test_every_file_is_written(tmp_path):
    kinds = ("svg", "dot", "graphml", "model-explorer")
    options = [part for kind in kinds for part in (f"--{kind}", tmp_path / kind)]
    done = _run(*TINY, *options, "--depth", 2)
    assert done.exit_code == 0, done.output
    assert ">vit.layers<" in (tmp_path / "svg").read_text()
    assert 'label="vit.layers\\n' in (tmp_path / "dot").read_text()
    assert nx.read_graphml(tmp_path / "graphml").nodes["classifier"]["verdict"] == "K"
    results = json.loads((tmp_path / "model-explorer").read_text())["graph"]["results"]
    assert results["classifier"]["value"] == "K"


def test_a_file_that_cannot_be_written(tmp_path):
    assert "cannot be written: No such file" in _refused(*TINY, "--svg", tmp_path / "no" / "file.svg")
