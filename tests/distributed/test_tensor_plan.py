"""Plans of one process: what is sharded with what, and why the rest is not."""

import pytest
import torch
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.nn import functional as F

import bwsk_fx
from bwsk_fx.calm import Analysis
from bwsk_fx.errors import PlanError
from bwsk_fx.parallel import tensor_plan


class _Between(nn.Module):
    """Two Linears with something between them."""

    def __init__(self, between, out=8):
        super().__init__()
        self.first, self.second = nn.Linear(4, out), nn.Linear(out, 4)
        self.between = between

    def forward(self, x):
        return self.second(self.between(self.first(x)))


def _plan(model: nn.Module, devices: int = 2, inputs: object = None):
    inputs = torch.randn(3, 5, 4) if inputs is None else inputs
    return tensor_plan(bwsk_fx.capture(model, inputs), devices)


def _refusal(model: nn.Module, devices: int = 2) -> str:
    with pytest.raises(PlanError) as caught:
        _plan(model, devices)
    return str(caught.value)


def test_a_vit_is_sharded_as_megatron_does(make_vit, make_images):
    plan = _plan(make_vit(), 2, make_images())
    columns = {path for path, style in plan.items() if isinstance(style, ColwiseParallel)}
    rows = {path for path, style in plan.items() if isinstance(style, RowwiseParallel)}
    blocks = [f"vit.layers.{index}." for index in range(2)]
    parts = ("attention.q_proj", "attention.k_proj", "attention.v_proj", "mlp.fc1")
    assert columns == {block + part for block in blocks for part in parts}
    assert rows == {block + part for block in blocks for part in ("attention.o_proj", "mlp.fc2")}
    assert plan.all_reduces == 2 * len(blocks)
    assert [group.axis for group in plan.groups] == ["head", "feature"] * 2
    assert plan.left_out["classifier"] == "the model returns classifier, and would return a shard of it"


def test_eager_attention_is_sharded_by_heads_too(make_vit, make_images):
    by_kind = [set(_plan(make_vit(kind), 2, make_images())) for kind in ("eager", "sdpa")]
    assert by_kind[0] == by_kind[1]


def test_an_analysis_serves_as_well_as_its_graph(make_vit, make_images):
    graph = bwsk_fx.capture(make_vit(), make_images())
    assert list(tensor_plan(Analysis.of(graph), 2)) == list(tensor_plan(graph, 2))


def test_heads_that_do_not_divide_stay_whole(make_vit, make_images):
    plan = _plan(make_vit(num_attention_heads=2), 4, make_images())
    assert [group.axis for group in plan.groups] == ["feature", "feature"]
    reason = plan.left_out["vit.layers.0.attention.q_proj"]
    assert reason == "its 2 shards of axis 'head' do not divide by 4 devices"
    assert reason in str(plan)


def test_nothing_to_share_is_an_error_that_names_the_sizes(make_vit, make_images):
    graph = bwsk_fx.capture(make_vit(), make_images())
    with pytest.raises(PlanError, match="64 shards of axis 'feature' do not divide by 7 devices"):
        tensor_plan(graph, 7)
    with pytest.raises(PlanError, match="expected 1 or more"):
        tensor_plan(graph, 0)


def test_what_lies_between_may_be_elementwise():
    plan = _plan(_Between(nn.GELU()))
    assert set(plan) == {"first", "second"}


@pytest.mark.parametrize("between", [nn.Softmax(-1), nn.LayerNorm(8)])
def test_what_waits_for_all_features_keeps_linears_whole(between):
    assert "first: between" in (message := _refusal(_Between(between)))
    assert "BARRIER" in message


def test_parameters_between_keep_linears_whole():
    assert "between (PReLU) has parameters or buffers" in _refusal(_Between(nn.PReLU()))


class _Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


def test_gates_are_sharded_together():
    (group,) = _plan(_Gated()).groups
    assert (group.columns, group.rows, group.size) == (("gate", "up"), ("down",), 8)


class _MeetsWhole(_Gated):
    """The gate meets features that no Linear made."""

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * torch.cat([x, x], -1))


def test_meeting_what_is_whole_keeps_linears_whole():
    assert "meet cat on the way" in _refusal(_MeetsWhole())


class _Returned(_Between):
    """Hands its hidden features out."""

    def forward(self, x):
        hidden = self.between(self.first(x))
        return self.second(hidden), hidden


def test_what_the_model_returns_is_not_sharded():
    assert "the model returns between, and would return a shard" in _refusal(_Returned(nn.GELU()))


class _Tied(_Between):
    def __init__(self):
        super().__init__(nn.GELU())
        self.other = nn.Linear(4, 8)
        self.other.weight = self.first.weight

    def forward(self, x):
        return super().forward(x) + self.other(x).sum(-1, keepdim=True)


def test_tied_weights_stay_whole():
    assert "first: its weight is shared with other.weight" in _refusal(_Tied())


class _Twice(_Between):
    def forward(self, x):
        return super().forward(x) + F.layer_norm(self.first(x), (8,)).sum(-1, keepdim=True)


def test_a_linear_that_is_called_elsewhere_too_stays_whole():
    assert "first: " in _refusal(_Twice(nn.GELU()))


def test_a_chain_of_linears_is_sharded_in_pairs():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    plan = _plan(model)
    assert [(group.columns, group.rows) for group in plan.groups] == [(("0",), ("2",))]
    assert plan.left_out["4"]


def test_a_bias_by_position_and_head_keeps_attention_whole():
    class Biased(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
            self.bias = nn.Parameter(torch.zeros(1, 2, 5, 5))

        def forward(self, x):
            heads = (one(x).view(-1, 5, 2, 4).transpose(1, 2) for one in (self.q, self.k, self.v))
            mixed = F.scaled_dot_product_attention(*heads, attn_mask=self.bias)
            return self.o(mixed.transpose(1, 2).reshape(-1, 5, 8))

    with pytest.raises(PlanError, match="meet bias on the way, which has the same axis and is not sharded"):
        tensor_plan(bwsk_fx.capture(Biased(), torch.randn(3, 5, 8)), 2)
