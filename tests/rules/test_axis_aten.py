"""Axis rules of exported programs: what they say of ATen operators is what they say of the functions, and holds."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import bwsk_fx
from bwsk_fx.inspection.exported import from_program


class Text(nn.Module):
    """Embedding, attention, slices, and a loss: what ATen's arguments are ordered otherwise for, too."""

    def __init__(self):
        super().__init__()
        self.words, self.norm, self.qkv = nn.Embedding(11, 8), nn.LayerNorm(8), nn.Linear(8, 24)
        self.out, self.head = nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, ids, target):
        x = F.dropout(self.words(ids), 0.0, True)
        query, key, value = self.qkv(self.norm(x)).view(ids.shape[0], 6, 2, 12).transpose(1, 2).split(4, -1)
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(ids.shape[0], 6, 8)
        x = x + F.gelu(self.out(attended.contiguous()))
        scores = self.head(x[:, 1:4].repeat(1, 2, 1)[:, -1])
        return F.cross_entropy(scores, target), F.mse_loss(scores, scores.relu().detach(), reduction="none")


class Images(nn.Module):
    """Convolutions, norms and pools."""

    def __init__(self):
        super().__init__()
        self.conv, self.deep = nn.Conv2d(4, 6, 2, stride=2), nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.batch, self.group, self.still = nn.BatchNorm2d(6), nn.GroupNorm(2, 6), nn.BatchNorm2d(6).eval()

    def forward(self, x):
        y = F.silu(self.still(self.group(self.batch(self.conv(x)))))
        pooled = F.max_pool2d(self.deep(y), 2) + F.avg_pool2d(y, 2)
        return torch.stack([pooled, pooled.to(torch.float64).float()]).expand(2, -1, -1, -1, -1), F.adaptive_avg_pool2d(
            y, 1
        )


MODELS = {
    "text": (Text, {"ids": torch.randint(11, (4, 6)), "target": torch.tensor([0, 1, 2, 3])}),
    "images": (Images, {"x": torch.randn(4, 4, 8, 8)}),
}


def _exported(name):
    model, inputs = MODELS[name]
    torch.manual_seed(0)
    batch = torch.export.Dim("batch")
    program = torch.export.export(model(), (), inputs, dynamic_shapes={each: {0: batch} for each in inputs})
    return from_program(program)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_said_of_a_program_is_what_is_said_of_its_model(name):
    model, inputs = MODELS[name]
    said = bwsk_fx.analyze_calm(_exported(name).graph)
    captured = bwsk_fx.analyze_calm(bwsk_fx.capture(model(), inputs))
    assert said.unknown == captured.unknown == ()

    def points(report):
        return {
            axis.axis: tuple(sorted(point.reason for point in (*axis.barriers, *axis.reduces))) for axis in report.axes
        }

    assert points(said) == points(captured)
    assert sum(map(len, points(said).values())) > 4


@pytest.mark.parametrize("name", MODELS)
def test_what_is_said_of_a_program_holds_on_shards(name):
    source = _exported(name)
    certificates = bwsk_fx.certify_axes(source.graph, source.inputs)
    counts = certificates.to_json()["counts"]
    assert counts["certified"] > 40
    assert (counts["wrong"], counts["untried"]) == (0, 0)
