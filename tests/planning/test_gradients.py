"""SiLU and Mish have the gradient operators, and the bits, of eager execution."""

import pytest
import torch
from torch import nn

import bwsk_fx
from bwsk_fx.reversible import ReversibleRegion

aten = torch.ops.aten


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("module", "target"), [(nn.SiLU(), aten.silu_backward.default), (nn.Mish(), aten.mish_backward.default)]
)
def test_the_fused_operator_runs(module, target, dtype):
    model, x = nn.Sequential(module, nn.Identity()), torch.randn(7, 33, dtype=dtype, requires_grad=True)
    fused = bwsk_fx.fuse_regions(bwsk_fx.capture(model, x), faith="exact", granularity="whole")
    expected, found = (torch.autograd.grad(candidate(x).sin().sum(), x)[0] for candidate in (model, fused))
    assert torch.equal(found, expected)
    (region,) = (module for module in fused.modules() if isinstance(module, ReversibleRegion))
    calls = [node.target for node in region.program.backward.graph.nodes if node.op == "call_function"]
    assert calls == [target]
