"""Axis claims are run on shards of real tensors, and those that do not hold are found."""

import json
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import bwsk_fx
from bwsk_fx.axes import follow_axes
from bwsk_fx.axis_facts import Facts, Shard, shards_of
from bwsk_fx.errors import RuleError
from bwsk_fx.report.axis_certificate import Status
from bwsk_fx.rules.axis import _RULES, Behaviour, along, mapped
from bwsk_fx.rules.axis_merge import ADDED, merge_of


def certified(function, *inputs, shards=2):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = function if isinstance(function, nn.Module) else nn.Identity()

        def forward(self, x, y=None):
            given = (x,) if y is None else (x, y)
            return self.inner(*given) if isinstance(function, nn.Module) else function(*given)

    torch.manual_seed(0)
    model = Model()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return bwsk_fx.certify_axes(bwsk_fx.capture(model, inputs), inputs, shards=shards)


OPERATORS = {
    "linear": nn.Linear(8, 6),
    "layer norm": nn.LayerNorm(8),
    "group norm": nn.GroupNorm(3, 6),
    "batch norm": nn.BatchNorm1d(6),
    "batch norm in eval mode": nn.BatchNorm1d(6).eval(),
    "convolution": nn.Conv1d(6, 4, 3),
    "tiled convolution": nn.Conv1d(6, 4, 2, 2),
    "strided convolution": nn.Conv1d(6, 4, 1, 2),
    "separable convolution": nn.Conv1d(6, 6, 3, padding=1, groups=6),
    "dropout": nn.Dropout(0.5),
    "max pool": nn.MaxPool1d(2),
    "overlapping pool": nn.MaxPool1d(3, 2, 1),
    "average pool": nn.AvgPool1d(4),
    "softmax": lambda x: x.softmax(-1),
    "sum": lambda x: x.sum(1),
    "mean": lambda x: x.mean((1, 2)),
    "product": lambda x: x.prod(-1),
    "logsumexp": lambda x: x.logsumexp(-1),
    "norm": lambda x: torch.linalg.vector_norm(x, 3, -1),
    "var": lambda x: x.var(-1),
    "std": lambda x: x.std(1, correction=0, keepdim=True),
    "var and mean": lambda x: torch.var_mean(x, -1)[0],
    "max": lambda x: x.max(-1)[1],
    "amin": lambda x: x.amin((1, 2)),
    "argmax": lambda x: x.argmax(1),
    "any": lambda x: (x > 1).any(-1),
    "all": lambda x: (x < 1).all(1),
    "heads": lambda x: x.view(x.shape[0], -1, 2, 4).transpose(1, 2),
    "merge": lambda x: x.flatten(1),
    "patches": lambda x: x.reshape(x.shape[0], 3, 2, 8).permute(0, 2, 1, 3),
    "slice": lambda x: x[:, 1:5, ::2],
    "select": lambda x: x[:, 2],
    "chunks": lambda x: torch.cat(x.chunk(2, -1)[::-1], 1),
    "stack": lambda x: torch.stack([x, -x], 1),
    "roll": lambda x: x.roll(2, 1).flip(-1),
    "pad": lambda x: F.pad(x, (1, 2)),
    "reflected": lambda x: F.pad(x, (1, 2), mode="reflect"),
    "centred": lambda x: x - x.mean(1, keepdim=True),
    "scores": lambda x: x @ x.transpose(1, 2),
    "causal": lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
    "diagonal": lambda x: x[torch.arange(6)[:, None], torch.arange(6)],
    "expanded": lambda x: x[:, :, None].expand(-1, -1, 3, -1),
}


@pytest.mark.parametrize("name", OPERATORS)
@settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(batch=st.integers(2, 5), shards=st.integers(2, 4))
def test_claims_hold_for_any_batch_and_number_of_shards(name, batch, shards):
    x = torch.randn(6 if name == "diagonal" else batch, 6, 8)
    certificates = certified(OPERATORS[name], x, shards=shards)
    assert not certificates.wrong and not certificates.unknown and certificates.having(Status.CERTIFIED)


@pytest.mark.parametrize(
    "loss",
    [
        F.cross_entropy,
        lambda x, y: F.cross_entropy(x, y, reduction="sum", label_smoothing=0.1),
        lambda x, y: F.mse_loss(x, F.one_hot(y, 5).double()),
    ],
)
def test_losses_are_sums_over_samples(loss):
    certificates = certified(loss, torch.randn(6, 5), torch.tensor([0, 4, 2, 2, 1, 3]), shards=4)
    assert not certificates.wrong
    assert [claim.axis for claim in certificates.claims if claim.behaviour is Behaviour.REDUCE][:1] == ["batch"]


@pytest.mark.parametrize(
    ("target", "function", "rule", "behaviour"),
    [
        (F.softmax, lambda x: F.softmax(x, -1), lambda call: mapped(call.operand.layout, "no"), Behaviour.MAP),
        (torch.cumsum, lambda x: torch.cumsum(x, 1), lambda call: mapped(call.operand.layout, "no"), Behaviour.MAP),
        pytest.param(
            torch.quantile,
            lambda x: torch.quantile(x, 0.5, 1),
            lambda call: along(call, (1,), Behaviour.REDUCE, "no", "no", keeps=False),
            Behaviour.REDUCE,
            marks=pytest.mark.skipif(torch.__version__ < "2.12", reason="quantile takes no symbolic sizes there"),
        ),
    ],
)
def test_a_wrong_claim_is_found(target, function, rule, behaviour):
    with patch.dict(_RULES, {target: rule}):
        wrong = certified(function, torch.randn(4, 6, 8)).wrong
    assert {claim.behaviour for claim in wrong} == {behaviour}
    assert all("differ from the unsharded run" in claim.why for claim in wrong)


def test_a_barrier_that_nobody_needs_is_told():
    with patch.dict(_RULES, {torch.exp: lambda call: along(call, (1,), Behaviour.BARRIER, "no", "no", keeps=True)}):
        (cautious,) = certified(torch.exp, torch.randn(4, 6, 8)).having(Status.CAUTIOUS)
    assert cautious.why == "shards do not need each other here"


def test_sharded_parameters_are_named():
    claims = certified(nn.Linear(8, 6), torch.randn(4, 6, 8)).claims
    (output,) = [claim for claim in claims if claim.role == "output"]
    assert output.parameters == (("weight", 0), ("bias", 0))


def test_indices_of_a_merged_axis():
    graph = bwsk_fx.capture(_Merged(), (torch.zeros(2, 6, 8),))
    steps, axes = follow_axes(graph)
    step = next(step for step in steps if step.results and len(step.results[0].shape) == 2)
    facts, (source,), (merged,) = Facts(axes, {}), step.inputs, step.results
    outer, inner = (axes.find(axis) for axis in source.layout[1:])
    assert facts.indices(merged, (2, 48), outer).tolist() == [index // 8 for index in range(48)]
    assert facts.indices(merged, (2, 48), inner).tolist() == [index % 8 for index in range(48)]
    assert facts.indices(source, (2, 6, 8), axes.find(merged.layout[1])).tolist() == [
        [8 * row + column for column in range(8)] for row in range(6)
    ]


class _Merged(nn.Module):
    def forward(self, x):
        return x.flatten(1)


def test_shards_cover_an_axis():
    assert shards_of(7, 3) == [Shard(0, 2), Shard(2, 4), Shard(4, 7)]
    assert shards_of(2, 3) == [Shard(0, 1), Shard(1, 2)]


def test_only_known_operators_merge_in_their_own_way():
    assert merge_of(torch.sum) is ADDED and merge_of("logsumexp") is not ADDED


def test_fused_graphs_are_refused(make_vit, make_images):
    inputs = make_images(2)
    fused = bwsk_fx.fuse_regions(bwsk_fx.capture(make_vit(), inputs))
    with pytest.raises(RuleError, match="certify its axes before fuse_regions"):
        bwsk_fx.certify_axes(fused, inputs)


def test_the_report_says_what_was_found():
    certificates = certified(nn.Linear(8, 6), torch.randn(4, 6, 8))
    contents = json.loads(json.dumps(certificates.to_json()))
    assert contents["counts"] == {"certified": 4, "wrong": 0, "cautious": 0, "untried": 0}
    assert ["feature", "REDUCE", "1"] in [line.split() for line in str(certificates).splitlines()]


def test_the_model_is_left_as_it_was():
    model, x = nn.Sequential(nn.BatchNorm1d(6), nn.Dropout()), torch.randn(4, 6, 8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    graph = bwsk_fx.capture(model, (x,))
    bwsk_fx.certify_axes(graph, (x,))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
