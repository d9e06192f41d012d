"""Axis rules on small models: what they claim, and what they refuse to claim."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import bwsk_fx
from bwsk_fx.axes import follow_axes
from bwsk_fx.calm import analyze_calm
from bwsk_fx.errors import RuleError
from bwsk_fx.report.calm import strictest
from bwsk_fx.rules.axis import Behaviour, axis_rule, axis_rule_of, no_rule
from bwsk_fx.rules.axis_table import AxisTable, Strength

MAP, JOIN, REDUCE, BARRIER = Behaviour
X = torch.zeros(2, 6, 8)
IMAGE = torch.zeros(2, 3, 8, 8)


class _Function(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x, y=None):
        return self.function(x) if y is None else self.function(x, y)


class _Module(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def _report(operator, *inputs):
    model = _Module(operator) if isinstance(operator, nn.Module) else _Function(operator)
    return analyze_calm(bwsk_fx.capture(model, inputs))


def _last(operator, *inputs):
    """The strictest behaviour per axis of the last node."""
    return strictest(_report(operator, *inputs).nodes[-1].facts)


def _facts(operator, *inputs):
    facts = _report(operator, *inputs).nodes[-1].facts
    return {(fact.axis, fact.role): fact.behaviour for fact in facts}


def test_a_linear_map_sums_its_inputs_and_maps_its_outputs():
    assert _facts(nn.Linear(8, 4), X) == {
        ("batch", ""): MAP,
        ("token", ""): MAP,
        ("feature", "input"): REDUCE,
        ("feature", "output"): MAP,
    }


@pytest.mark.parametrize(
    ("operator", "expected"),
    [
        (nn.LayerNorm(8), {"batch": MAP, "token": MAP, "feature": BARRIER}),
        (nn.LayerNorm((6, 8)), {"batch": MAP, "token": BARRIER, "feature": BARRIER}),
        (nn.RMSNorm(8), {"batch": MAP, "token": MAP, "feature": BARRIER}),
        (nn.GELU(), {"batch": MAP, "token": MAP, "feature": MAP}),
        (nn.Dropout(0.5), {"batch": MAP, "token": MAP, "feature": MAP}),
        (nn.Softmax(dim=1), {"batch": MAP, "token": BARRIER, "feature": MAP}),
        (lambda x: x.softmax(-1), {"batch": MAP, "token": MAP, "feature": BARRIER}),
        (lambda x: x.mean(1), {"batch": MAP, "token": REDUCE, "feature": MAP}),
        (lambda x: x.sum((0, 2), keepdim=True), {"batch": REDUCE, "token": MAP, "feature": REDUCE}),
        (lambda x: x.sum(), {"batch": REDUCE, "token": REDUCE, "feature": REDUCE}),
        (lambda x: x.amax(1), {"batch": MAP, "token": JOIN, "feature": MAP}),
        (lambda x: x.argmax(-1), {"batch": MAP, "token": MAP, "feature": JOIN}),
        (lambda x: x[:, 0], {"batch": MAP, "token": MAP, "feature": MAP}),
        (lambda x: x.to(torch.float64), {"batch": MAP, "token": MAP, "feature": MAP}),
        (lambda x: x.flip(1), {"batch": MAP, "token": MAP, "feature": MAP}),
        (lambda x: x.cumsum(1), {"batch": MAP, "token": BARRIER, "feature": MAP}),
        (lambda x: x.sort(-1)[1], {"batch": MAP, "token": MAP}),
        (lambda x: torch.einsum("btf,fg->btg", x, x.new_ones(8, 5)), {"batch": MAP, "token": MAP, "feature": REDUCE}),
        (lambda x: F.interpolate(x, scale_factor=2), {"batch": MAP, "token": MAP, "feature": BARRIER}),
        (lambda x: x.repeat(1, 2, 1), {"batch": MAP, "token": MAP, "feature": MAP}),
    ],
)
def test_behaviours(operator, expected):
    assert _last(operator, X) == expected


def test_a_maximum_with_indices_joins():
    report = _report(lambda x: x.max(1).values, X)
    assert [strictest(node.facts)["batch"] for node in report.nodes] == [MAP] * len(report.nodes)
    assert report.node("max_1").facts[0].behaviour is JOIN
    assert _last(torch.max, X, X) == {"batch": MAP, "token": MAP, "feature": MAP}


def test_batch_norm_needs_the_batch_in_train_mode_only():
    assert _last(nn.BatchNorm2d(3).train(), IMAGE)["batch"] is BARRIER
    assert _last(nn.BatchNorm2d(3).train(), IMAGE)["channel"] is MAP
    assert set(_last(nn.BatchNorm2d(3).eval(), IMAGE).values()) == {MAP}


def test_windows_that_tile_are_mapped_and_windows_that_overlap_are_not():
    channels = {("channel", "input"): REDUCE, ("channel", "output"): MAP, ("batch", ""): MAP}
    windows = {("height", ""): MAP, ("width", ""): MAP, ("window", "window"): REDUCE}
    assert _facts(nn.Conv2d(3, 4, 2, 2), IMAGE) == channels | windows
    assert _facts(nn.MaxPool2d(2), IMAGE)["window", "window"] is JOIN
    assert _facts(nn.AvgPool2d(2), IMAGE)["window", "window"] is REDUCE
    assert _facts(nn.MaxPool2d(3, 2), IMAGE)["height", ""] is BARRIER
    assert _facts(nn.Conv2d(3, 4, 1, 2), IMAGE)["height", "result"] is MAP
    assert _facts(nn.Conv2d(3, 4, 3), IMAGE) == channels | {("height", ""): BARRIER, ("width", ""): BARRIER}
    assert _facts(nn.Conv2d(3, 4, 2, 2, padding=1), IMAGE)["height", ""] is BARRIER
    assert _facts(nn.Conv2d(3, 4, 8), IMAGE) == channels | {("height", ""): REDUCE, ("width", ""): REDUCE}
    assert _facts(nn.Conv2d(3, 3, 2, 2, groups=3), IMAGE)["channel", ""] is MAP


def test_an_unknown_operator_is_a_barrier_on_every_axis():
    report = _report(lambda x: x.relu().unfold(1, 2, 2), X)
    assert report.unknown == ("unfold",)
    assert "1 call without an axis rule, counted as barriers: unfold" in str(report)
    facts = report.node("unfold").facts
    assert {fact.axis: fact.behaviour for fact in facts} == dict.fromkeys(("batch", "token", "feature"), BARRIER)
    assert {fact.reason for fact in facts} == {"no axis rule"}


def test_a_subclass_with_its_own_forward_is_unknown():
    class ChannelsFirst(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x.mT).mT

    assert axis_rule_of(ChannelsFirst(8)) is no_rule
    assert axis_rule_of(nn.LayerNorm(8)) is not no_rule


def test_a_module_without_a_rule_does_what_its_operators_do():
    class Norm(nn.Module):
        def forward(self, x):
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = Norm()

        def forward(self, x):
            return self.norm(x)

    (step,) = [step for step in follow_axes(bwsk_fx.capture(Model(), (X,)))[0] if step.target != "input"][-1:]
    found = {claim.behaviour for claim in step.claims}
    assert found <= {MAP, REDUCE, BARRIER} and not step.unknown


def test_axes_that_a_later_node_identifies_are_one_from_the_start():
    """The loss tells that both inputs of the product are sharded alike, so that rows meet columns of their own axis."""

    def model(x, y):
        return (x @ y.mT).square().sum() + (x + y).sum()

    steps, axes = follow_axes(bwsk_fx.capture(_Function(model), (torch.zeros(2, 6, 8), torch.zeros(2, 6, 8))))
    (product,) = [step for step in steps if step.target == "matmul"]
    rows, columns = product.results[0].layout[1:]
    assert axes.find(rows) != axes.find(columns)
    assert BARRIER in {claim.behaviour for claim in product.claims}


def test_a_constant_does_not_make_one_axis_of_two():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.zeros(6, 8))

        def forward(self, x, y):
            return x + self.mask[:, 0], y + self.mask[:, 0]

    steps, axes = follow_axes(bwsk_fx.capture(Masked(), (torch.zeros(3, 6), torch.zeros(3, 6))))
    first, second = (axes.find(step.results[0].layout[1]) for step in steps if step.target == "add")
    assert first != second


def test_writing_into_a_tensor_is_a_barrier():
    def write(x):
        y = x.clone()
        y[:, 0] = 0
        return y

    report = _report(write, X)
    assert "setitem" in report.unknown
    assert strictest(report.node("setitem").facts)["token"] is BARRIER


def test_a_view_splits_and_merges_by_name():
    report = _report(lambda x: x.view(-1, 6, 2, 4).transpose(1, 2).transpose(1, 2).flatten(2), X)
    split, merged = report.node("view"), report.node("flatten")
    for node in (split, merged):
        assert strictest(node.facts) == {"batch": MAP, "token": MAP, "feature": MAP, "head": MAP}
    assert report.axis("head").nodes == 4
    assert report.axis("head").partitions == (("view", "transpose", "transpose_1", "flatten"),)


def test_a_view_that_mixes_axes_is_a_barrier_on_them():
    facts = {fact.axis: fact for fact in _report(lambda x: x.view(-1, 4, 12), X).nodes[-1].facts}
    assert {axis: fact.behaviour for axis, fact in facts.items()} == {
        "batch": MAP,
        "token": BARRIER,
        "feature": BARRIER,
    }
    assert "mixes axes" in facts["token"].reason


def test_merged_batch_and_token_come_apart_again():
    report = _report(lambda x: x.reshape(-1, 8).relu().view(-1, 6, 8), X)
    for node in report.nodes:
        assert strictest(node.facts) == {"batch": MAP, "token": MAP, "feature": MAP}


def test_positions_become_tokens_and_channels_features():
    report = _report(lambda x: x.flatten(2).transpose(1, 2), IMAGE)
    assert {fact.axis for fact in report.nodes[-1].facts} == {"batch", "token", "feature"}
    assert {fact.axis for fact in report.nodes[0].facts} == {"batch", "feature", "height", "width"}


def test_a_product_of_an_axis_with_itself_waits_for_it():
    facts = _facts(lambda x: x @ x.mT, X)
    assert facts["token", "row"] is MAP
    assert facts["token", "column"] is BARRIER
    assert facts["key", "column"] is MAP
    assert facts["feature", "inner"] is REDUCE


def test_a_product_with_another_axis_maps_both():
    facts = _facts(lambda x, y: x @ y.mT, X, torch.zeros(2, 5, 8))
    assert facts == {
        ("batch", ""): MAP,
        ("token", "row"): MAP,
        ("token", "column"): MAP,
        ("feature", "inner"): REDUCE,
    }


def test_an_axis_that_meets_itself_under_other_indices_is_a_barrier():
    """Rotary embeddings add features to other features: no shard has both."""

    def rotate(x):
        return x + torch.cat((-x[..., 4:], x[..., :4]), dim=-1)

    assert _last(rotate, X)["feature"] is BARRIER
    assert _last(rotate, X)["token"] is MAP


def test_pieces_of_one_axis_meet_index_by_index():
    def gated(x):
        gate, value = x.chunk(2, dim=-1)
        return torch.sigmoid(gate) * value

    assert _last(gated, X) == {"batch": MAP, "token": MAP, "feature": MAP}


def test_attention_maps_queries_and_waits_for_keys():
    x = torch.zeros(2, 2, 6, 4)
    facts = _facts(lambda q: F.scaled_dot_product_attention(q, q, q), x)
    assert [behaviour for (_, role), behaviour in facts.items() if role == "query"] == [MAP]
    assert [behaviour for (_, role), behaviour in facts.items() if role == "key"] == [BARRIER]
    assert [behaviour for (_, role), behaviour in facts.items() if role == "query and key"] == [REDUCE]


def test_losses():
    target = torch.zeros(2, dtype=torch.long)
    logits = torch.zeros(2, 5)
    assert _last(F.cross_entropy, logits, target) == {"class": BARRIER, "batch": REDUCE}
    unreduced = _last(lambda x, y: F.cross_entropy(x, y, reduction="none"), logits, target)
    assert unreduced == {"class": BARRIER, "batch": MAP}
    assert _last(F.mse_loss, X, X) == {"batch": REDUCE, "token": REDUCE, "feature": REDUCE}


def test_two_rules_for_one_target_are_refused():
    with pytest.raises(RuleError, match=r"already has the axis rule 'affine\.linear_axes'"):
        axis_rule(nn.Linear)(no_rule)


def test_names_by_strength_and_identity():
    axes = AxisTable()
    guessed, named, bundle = axes.new("token", Strength.GUESS), axes.new("feature"), axes.new()
    axes.call(guessed, "channel")
    axes.call(guessed, "height")
    assert axes.name(guessed) == "channel"
    axes.call(guessed, "class", Strength.CONTEXT)
    assert axes.name(axes.unify(named, guessed)) == "class"
    axes.decompose(bundle, [(axes.new("batch"), 2), (axes.new("window"), 3)])
    axes.call(bundle, "token")
    assert [axes.name(axis) for axis in axes.atoms([bundle, None, named])] == ["batch", "window", "class"]
