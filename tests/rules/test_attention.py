"""Fused attention erases two of its three operands' worth."""

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
    verdict = verdict_of(lambda x, y: F.scaled_dot_product_attention(x, y, y), Q, Q + 1)
    assert (verdict.label, verdict.erasure.elements) == (Label.K, 2 * Q[0].numel())


def test_attention_over_one_static_memory(verdict_of):
    memory = nn.Parameter(torch.randn(1, 3, 7, 4))
    verdict = verdict_of(lambda x: F.scaled_dot_product_attention(x, memory, memory), Q)
    assert (verdict.label, verdict.erasure.elements) == (Label.K, 0)


def test_multi_head_attention_is_k(verdict_of):
    verdict = verdict_of(_SelfAttention(), torch.randn(2, 5, 4))
    assert (verdict.label, verdict.rule) == (Label.K, "attention.multi_head")
