"""Statistics rebuild what was normalised."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bwsk_fx.verdict import Label, WitnessKind

X = torch.randn(2, 3, 4)
IMAGE = torch.randn(2, 6, 5, 5)


def test_layer_norm_is_undone_by_mean_and_rstd(verdict_of):
    norm = nn.LayerNorm(4)
    nn.init.uniform_(norm.weight, 0.5, 2)
    verdict = verdict_of(norm, X)
    assert (verdict.label, verdict.witness.kind, verdict.witness.names) == (
        Label.S,
        WitnessKind.BY_PRODUCTS,
        ("mean", "rstd"),
    )
    assert (verdict.witness.elements, verdict.witness.bytes) == (2 * 3, 4 * 2 * 3)
    y, mean, rstd = torch.native_layer_norm(X, (4,), norm.weight, norm.bias, norm.eps)
    torch.testing.assert_close((y - norm.bias) / norm.weight / rstd + mean, X)


def test_layer_norm_as_a_function(verdict_of):
    verdict = verdict_of(lambda x: F.layer_norm(x, (3, 4)), X)
    assert verdict.witness.elements == 2


def test_group_norm_is_undone_by_the_statistics_of_its_groups(verdict_of):
    norm = nn.GroupNorm(2, 6)
    verdict = verdict_of(norm, IMAGE)
    assert (verdict.label, verdict.witness.elements) == (Label.S, 4)
    y, mean, rstd = torch.native_group_norm(IMAGE, norm.weight, norm.bias, 2, 6, 25, 2, norm.eps)
    groups = (2, 2, -1)
    rebuilt = y.view(groups) / rstd[..., None] + mean[..., None]
    torch.testing.assert_close(rebuilt.view_as(IMAGE), IMAGE)


def test_rms_norm_is_undone_by_rstd(verdict_of):
    verdict = verdict_of(nn.RMSNorm(4), X)
    assert (verdict.label, verdict.witness.names, verdict.witness.elements) == (Label.S, ("rstd",), 3)
    rstd = X.pow(2).mean(-1, keepdim=True).add(torch.finfo(X.dtype).eps).rsqrt()
    torch.testing.assert_close(F.rms_norm(X, (4,)) / rstd, X)


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_depends_on_its_mode(verdict_of, training):
    norm = nn.BatchNorm2d(6).train(training)
    verdict = verdict_of(norm, IMAGE)
    kind = WitnessKind.BY_PRODUCTS if training else WitnessKind.NOTHING
    assert (verdict.label, verdict.witness.kind, verdict.confidence) == (Label.S, kind, 0.8)
    y, mean, rstd = torch.native_batch_norm(IMAGE, norm.weight, norm.bias, None, None, True, 0.1, norm.eps)
    if not training:
        y, mean, rstd = norm(IMAGE), norm.running_mean, (norm.running_var + norm.eps).rsqrt()
    torch.testing.assert_close(y / rstd[:, None, None] + mean[:, None, None], IMAGE)
