"""Every row of the study: leaf modules of the real architectures, labelled by the published table."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers

import bwsk_fx
from bwsk_fx.report.modules import summarize_modules
from bwsk_fx.rules.published import module_verdict

DATA = Path(__file__).parents[1] / "data"
STUDY = json.loads((DATA / "published_sk_ratios.json").read_text())["models"]
CONFIGS = json.loads((DATA / "study_configs.json").read_text())["models"]
CNNS = ("resnet50", "efficientnet-b0", "mobilenetv2")
SAME = [name for name in CONFIGS if name not in (*CNNS, "vit-base")]


def _build(name, **changes):
    """Build a model of its real size, without memory for its weights."""
    kind = getattr(transformers, CONFIGS[name]["model"])
    with torch.device("meta"):
        return kind(kind.config_class(**CONFIGS[name]["config"] | changes)).train()


def _totals(summary):
    return summary.total, summary.s, summary.k, summary.gray


def _study_totals(name):
    return tuple(STUDY[name][key] for key in ("leaf_modules", "s", "k", "gray"))


def _blocks(summary):
    return [(block.s, block.k, block.gray) for block in summary.blocks]


def _study_blocks(name):
    return [(block["s_count"], block["k_count"], block["gray_count"]) for block in STUDY[name]["blocks"]]


def _classes(model):
    """Count the leaf modules by class and label."""
    leaves = [module for module in model.modules() if not list(module.children())]
    return Counter((type(leaf).__name__, str(module_verdict(leaf).label)) for leaf in leaves)


def test_the_study_has_17_models():
    assert sorted(STUDY) == sorted(CONFIGS)
    assert (len(STUDY), len(SAME)) == (17, 13)


@pytest.mark.parametrize("name", SAME)
def test_leaf_modules_count_as_in_the_study(name):
    summary = summarize_modules(_build(name))
    assert _totals(summary) == _study_totals(name)
    blocks = _blocks(summary)
    assert len(blocks) == STUDY[name]["n_blocks"]
    assert blocks[:2] == _study_blocks(name)


@pytest.mark.parametrize("name", [name for name in SAME if name not in ("t5-small", "switch-base-8")])
def test_blocks_of_a_plain_stack_are_equal(name):
    assert set(_blocks(summarize_modules(_build(name)))) == set(_study_blocks(name))


def test_blocks_of_an_encoder_and_a_decoder():
    # Switch has experts in every other block; the first block of each stack has the position bias.
    t5 = {(9, 4, 0): 1, (8, 4, 0): 5, (14, 5, 0): 1, (13, 5, 0): 5}
    assert Counter(_blocks(summarize_modules(_build("t5-small")))) == t5
    switch = {(7, 4, 2): 1, (6, 4, 2): 5, (21, 18, 2): 6, (11, 5, 3): 1, (10, 5, 3): 5, (25, 19, 3): 6}
    assert Counter(_blocks(summarize_modules(_build("switch-base-8")))) == switch


@pytest.mark.parametrize(
    ("name", "gray"),
    [
        ("mamba-130m", {"SiLUActivation": 24}),
        ("mamba-370m", {"SiLUActivation": 48}),
        ("switch-base-8", {"SwitchTransformersLayerNorm": 62}),
    ],
)
def test_what_the_study_calls_gray_is_not_in_its_table(name, gray):
    assert Counter(node.operator for node in summarize_modules(_build(name)).gray_nodes) == gray


def test_vit_lacks_one_dropout_per_layer():
    """In transformers 5.2 a ViT layer has two Dropouts; those supported here call a single one twice."""
    summary = summarize_modules(_build("vit-base"))
    total, s, k, gray = _study_totals("vit-base")
    assert _totals(summary) == (total - 12, s, k - 12, gray)
    assert len(summary.blocks) == STUDY["vit-base"]["n_blocks"]
    (expected,) = {(s, k - 1, gray) for s, k, gray in _study_blocks("vit-base")}
    assert set(_blocks(summary)) == {expected} == {(8, 2, 0)}


# What torchvision 0.28 has, by class and label; its totals are the study's.
TORCHVISION = {
    "resnet50": {
        ("Conv2d", "S"): 46,
        ("Conv2d", "K"): 7,
        ("BatchNorm2d", "K"): 53,
        ("ReLU", "K"): 17,
        ("MaxPool2d", "K"): 1,
        ("AdaptiveAvgPool2d", "K"): 1,
        ("Linear", "S"): 1,
    },
    "efficientnet-b0": {
        ("Conv2d", "S"): 76,
        ("Conv2d", "K"): 5,
        ("BatchNorm2d", "K"): 49,
        ("SiLU", "K"): 49,
        ("AdaptiveAvgPool2d", "K"): 17,
        ("Sigmoid", "K"): 16,
        ("StochasticDepth", "GRAY"): 16,
        ("Dropout", "K"): 1,
        ("Linear", "S"): 1,
    },
    "mobilenetv2": {
        ("Conv2d", "S"): 47,
        ("Conv2d", "K"): 5,
        ("BatchNorm2d", "K"): 52,
        ("ReLU6", "K"): 35,
        ("Dropout", "K"): 1,
        ("Linear", "S"): 1,
    },
}
# What transformers has more (or less) of.
DIFFERENCES = {
    # A ReLU for each of a block's three uses of one, an Identity for each shortcut and activation that is absent.
    "resnet50": {("ReLU", "K"): 32, ("Identity", "S"): 28, ("Flatten", "S"): 1},
    # Depthwise convolutions are of a class of their own, and strided ones pad in a module; stochastic depth is a
    # Dropout; the head pools with AvgPool2d.
    "efficientnet-b0": {
        ("Conv2d", "S"): -12,
        ("Conv2d", "K"): -4,
        ("EfficientNetDepthwiseConv2d", "GRAY"): 16,
        ("ZeroPad2d", "GRAY"): 17,
        ("StochasticDepth", "GRAY"): -16,
        ("Dropout", "K"): 16,
        ("AdaptiveAvgPool2d", "K"): -1,
        ("AvgPool2d", "K"): 1,
    },
    # torchvision pools with a function.
    "mobilenetv2": {("AdaptiveAvgPool2d", "K"): 1},
}


@pytest.mark.parametrize("name", CNNS)
def test_cnns_differ_from_torchvisions_in_known_modules(name):
    there = Counter(TORCHVISION[name])
    labels = [sum(count for (_, label), count in there.items() if label == wanted) for wanted in ("S", "K", "GRAY")]
    assert (there.total(), *labels) == _study_totals(name)
    here = _classes(_build(name))
    here.subtract(there)
    assert {key: count for key, count in here.items() if count} == DIFFERENCES[name]


# -- calls, which a graph counts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "depth", "difference"),
    [
        ("pythia-70m", {"num_hidden_layers": 1}, {}),
        ("opt-350m", {"num_hidden_layers": 1}, {}),
        # Fused attention drops out its scores itself, and the module that would do it is not called.
        ("bert-base", {"num_hidden_layers": 1}, {"Dropout": -1}),
        ("gpt2-small", {"n_layer": 1}, {"Dropout": -1}),
        # One Dropout serves attention and MLP of a layer.
        ("phi-2", {"num_hidden_layers": 1}, {"Dropout": 1}),
        # The mixer hands the weights of these to functions.
        ("mamba-130m", {"num_hidden_layers": 1}, {"Conv1d": -1, "SiLUActivation": -1, "Linear": -1}),
    ],
)
def test_calls_differ_from_modules_where_a_module_is_not_called_once(name, depth, difference):
    model = _build(name, **depth).eval()  # in train mode, OPT of transformers 5.17 skips layers at random
    inputs = {"input_ids": torch.ones(2, 3, dtype=torch.long, device="meta")}
    graph = bwsk_fx.capture(model, inputs | ({"use_cache": False} if model.can_generate() else {}))
    called = [type(model.get_submodule(node.target)) for node in graph.graph.find_nodes(op="call_module")]
    counts = Counter(kind.__name__ for kind in called)
    counts.subtract(type(module).__name__ for module in model.modules() if not list(module.children()))
    assert {kind: count for kind, count in counts.items() if count} == difference
    summary = bwsk_fx.summarize(bwsk_fx.type_nodes(graph, "published"))
    assert summary.total == summarize_modules(model).total + sum(difference.values())
