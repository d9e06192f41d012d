"""Fused attention erases by counting, and by the number of keys that a query meets."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bwsk_fx.verdict import Label

Q = torch.randn(2, 3, 7, 4)


class _SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def test_fused_attention_counts_operands_less_result(verdict_of):
    verdict = verdict_of(lambda x, y: F.scaled_dot_product_attention(x, y, y + 1), Q, Q + 1)
    assert (verdict.label, verdict.erasure.elements) == (Label.K, 2 * Q[0].numel())


def test_one_operand_in_several_roles_counts_once(verdict_of):
    assert verdict_of(lambda x, y: F.scaled_dot_product_attention(x, y, y), Q, Q + 1).erasure.elements == 84
    assert verdict_of(lambda x: F.scaled_dot_product_attention(x, x, x), Q).label is Label.GRAY


@pytest.mark.parametrize(("keys", "features", "lost"), [(1, 4, 4), (3, 4, 2), (5, 4, 0), (7, 2, 2), (3, 1, 3)])
def test_queries_of_a_static_memory_are_bounded_by_keys_and_values(certified, keys, features, lost):
    key, value = torch.randn(2, 3, keys, 4), torch.randn(2, 3, keys, features)
    verdict = certified(F.scaled_dot_product_attention, Q, key, value, dynamic={id(Q)})
    if lost == 0:
        assert verdict.label is Label.GRAY
    else:
        assert (verdict.label, verdict.erasure.elements) == (Label.K, 2 * 3 * 7 * lost)


def test_the_rank_of_a_query_bounds_its_result():
    key, value = torch.randn(1, 3, 4, dtype=torch.float64), torch.randn(1, 3, 4, dtype=torch.float64)
    query = torch.randn(4, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(
        lambda q: F.scaled_dot_product_attention(q.view(1, 1, 4), key, value)[0, 0], query
    )
    assert torch.linalg.matrix_rank(jacobian) == 2


def test_causal_queries_meet_few_keys(certified):
    key = torch.randn(2, 3, 7, 4)
    verdict = certified(F.scaled_dot_product_attention, Q, key, key + 1, None, 0.0, True, dynamic={id(Q)})
    # Of 4 features, the first query leaves 0 (one key), then 1, 2 and 3.
    assert verdict.erasure.elements == 2 * 3 * (4 + 3 + 2 + 1)


@pytest.mark.parametrize("name", ["_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_attention_math"])
def test_aten_forms(certified, name):
    verdict = certified(getattr(torch.ops.aten, name).default, Q, Q + 1, Q + 2)
    assert (verdict.label, verdict.erasure.elements) == (Label.K, 2 * Q.numel())


def test_attention_with_projections(verdict_of, certified):
    # As much comes out as goes in, and no inverse is known.
    assert verdict_of(_SelfAttention(), torch.randn(2, 5, 4)).label is Label.GRAY
    query, memory = torch.randn(2, 5, 4), torch.randn(2, 7, 4)
    verdict = certified(nn.MultiheadAttention(4, 2, batch_first=True), query, memory, memory, need_weights=False)
    assert (verdict.label, verdict.rule, verdict.erasure.elements) == (Label.K, "attention.multi_head", 2 * 7 * 4)


def test_transformer_layers_that_are_recorded_whole(certified):
    options = {"batch_first": True, "dropout": 0.0}
    encoder = nn.TransformerEncoderLayer(4, 2, 8, **options)
    assert certified(encoder, torch.randn(2, 5, 4)).label is Label.GRAY
    decoder = nn.TransformerDecoderLayer(4, 2, 8, **options)
    verdict = certified(decoder, torch.randn(2, 5, 4), torch.randn(2, 7, 4))
    assert (verdict.label, verdict.erasure.elements) == (Label.K, 2 * 7 * 4)
