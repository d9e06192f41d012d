"""MS-LN is LayerNorm, ReGELU2 is GELU with the derivative of three ReLUs, and both keep what the paper says."""

import copy

import pytest
import torch
from memory_sharing import MemorySharingLayerNorm, ReGELU2, folded, packed, relu_combination, share_memory, unpacked
from pareto import distance, gradients, loss_of
from scipy.integrate import quad
from scipy.special import ndtr
from torch import nn
from torch.nn import functional as F

from bwsk_fx.measure import saved_for_backward


def _wide(inputs):
    return {"pixel_values": inputs["pixel_values"].double(), "labels": inputs["labels"]}


def _squared_distance(a: float, c: float) -> float:
    def difference(x: float) -> float:
        relus = a * max(x + c, 0) + (1 - 2 * a) * max(x, 0) + a * max(x - c, 0)
        return (x * ndtr(x) - relus) ** 2

    return quad(difference, -12, 12, points=[-c, 0, c], epsabs=1e-13)[0]


def test_the_fit_is_the_papers_and_a_minimum():
    a, c = relu_combination()
    assert (a, c) == pytest.approx((-0.0492, 3.186), rel=0.01)
    least = _squared_distance(a, c)
    assert least < _squared_distance(-0.0492, 3.186)
    for other in ((a + 1e-3, c), (a - 1e-3, c), (a, c + 0.05), (a, c - 0.05)):
        assert _squared_distance(*other) > least


@pytest.mark.parametrize("count", [1, 3, 4, 8, 1001])
def test_packing_round_trip(count):
    levels = torch.randint(0, 4, (count,), generator=torch.Generator().manual_seed(count), dtype=torch.uint8)
    codes = packed(levels)
    assert codes.dtype == torch.uint8
    assert codes.nbytes == -(-count // 4)
    assert torch.equal(unpacked(codes).flatten()[:count], levels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 8)])
def test_regelu2_is_gelu_forward_and_a_step_function_backward(dtype, shape):
    x = torch.linspace(-5, 5, torch.Size(shape).numel()).view(shape).to(dtype).requires_grad_()
    output = ReGELU2()(x)
    assert torch.equal(output, F.gelu(x))
    output.sum().backward()
    a, c = relu_combination()
    slopes = torch.tensor([0.0, a, 1 - a, 1.0]).to(dtype)
    level = sum((x.detach() > edge).long() for edge in (-c, 0.0, c))
    assert set(level.flatten().tolist()) == {0, 1, 2, 3}
    assert torch.equal(x.grad, slopes[level])


def test_regelu2_keeps_two_bits_per_element():
    x = torch.randn(16, 64, requires_grad=True)
    assert saved_for_backward(_Applied(nn.GELU()), x) == 16 * 64 * 4
    assert saved_for_backward(_Applied(ReGELU2()), x) == 16 * 64 // 4


class _Applied(nn.Module):
    """Something that needs nothing of its own in the backward pass, applied to a parameter-free module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x).sum()


def test_ms_ln_has_the_output_and_the_gradient_of_layernorm():
    x = torch.randn(3, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3 + 1
    weights = torch.randn(3, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results = []
    for norm in (nn.LayerNorm(8, eps=1e-3, elementwise_affine=False), MemorySharingLayerNorm(1e-3)):
        leaf = x.clone().requires_grad_()
        output = norm(leaf)
        (output * weights).sum().backward()
        results.append((output, leaf.grad))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_folding_does_not_change_the_output(bias):
    torch.manual_seed(0)
    norm, linear, x = nn.LayerNorm(8).double(), nn.Linear(8, 3, bias=bias).double(), torch.randn(5, 8).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    expected = linear(norm(x))
    rest = folded(norm, [linear])
    torch.testing.assert_close(linear(rest(x)), expected, rtol=1e-12, atol=1e-12)


def test_the_loss_and_the_gradients_of_a_folded_model_are_the_models(shape, reseeded):
    eager, inputs = reseeded(shape.model("cpu")).double(), _wide(shape.inputs("cpu"))
    shared = share_memory(copy.deepcopy(eager), approximate=False)
    torch.testing.assert_close(shared(**inputs).loss, eager(**inputs).loss, rtol=1e-10, atol=0.0)
    expected, found = gradients(eager, inputs, None), gradients(shared, inputs, None)
    assert sorted(expected.keys() - found.keys()) == sorted(name for name in expected if "layernorm" in name)
    folds = {
        "vit.layers.0.layernorm_before": [f"vit.layers.0.attention.{part}_proj" for part in "qkv"],
        "vit.layers.0.layernorm_after": ["vit.layers.0.mlp.fc1"],
        "vit.layernorm": ["classifier"],
    }
    for norm, linears in folds.items():
        gamma, beta = eager.get_parameter(f"{norm}.weight").detach(), eager.get_parameter(f"{norm}.bias").detach()
        # The chain rule through W·diag(γ) and b + W·β.
        for name in linears:
            bias = found[f"{name}.bias"]
            found[f"{name}.weight"] = found[f"{name}.weight"] * gamma + bias[:, None] * beta
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12, msg=name)


def test_under_autocast_ms_ln_is_as_exact_as_eager_and_regelu2_is_not(shape):
    eager, inputs = shape.model("cpu"), shape.inputs("cpu")
    exact = gradients(copy.deepcopy(eager).double(), _wide(inputs), None)
    shared, approximate = (share_memory(copy.deepcopy(eager), approximate=flag) for flag in (False, True))
    expected = loss_of(eager, inputs, shape.dtype).item()
    assert loss_of(shared, inputs, shape.dtype).item() == pytest.approx(expected, rel=2e-3)
    # The forward pass of ReGELU2 has GELU's bits.
    assert torch.equal(loss_of(approximate, inputs, shape.dtype), loss_of(shared, inputs, shape.dtype))
    found = gradients(shared, inputs, shape.dtype)
    eagers = gradients(eager, inputs, shape.dtype)
    own_error = distance({name: eagers[name] for name in found}, exact)
    assert distance(found, exact) <= 1.5 * own_error
    assert distance(gradients(approximate, inputs, shape.dtype), exact) > 5 * own_error


@pytest.mark.slow
def test_fused_formulas_agree_on_the_cpu(shape):
    _assert_fused_agrees(shape, "cpu")


@pytest.mark.gpu
def test_fused_formulas_agree_on_cuda(shape):
    _assert_fused_agrees(shape, "cuda")


def _assert_fused_agrees(shape, device: str) -> None:
    model, inputs = shape.model(device), shape.inputs(device)
    plain, fused = (
        gradients(share_memory(copy.deepcopy(model), approximate=True, fuse=fuse), inputs, None)
        for fuse in (False, True)
    )
    for name, gradient in plain.items():
        torch.testing.assert_close(fused[name], gradient, rtol=1e-3, atol=1e-5, msg=name)
    saved = [
        saved_for_backward(share_memory(copy.deepcopy(model), approximate=True, fuse=fuse), inputs, shape.dtype)
        for fuse in (False, True)
    ]
    assert saved[0] == saved[1]
