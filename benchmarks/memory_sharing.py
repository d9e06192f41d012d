"""Memory-sharing and approximate backpropagation, written from the paper; a peer for the benchmarks, not a feature.

Yang et al., *Reducing Fine-Tuning Memory Overhead by Approximate and Memory-Sharing Backpropagation*, ICML 2024,
arXiv 2406.16282. Two parts, which `share_memory` puts into a ViT:

* **MS-LN**. γ and β of a LayerNorm are folded into the linear maps that follow it, once, before training:
  W ← W·diag(γ), b ← b + W·β. What is left returns x̂, and its backward pass needs x̂ and 1/σ alone, so that the norm
  and the linear maps keep one and the same tensor. The folded maps are the parameters that train; γ and β are gone. The
  gradient of a folded weight is that of the original one where γ = 1 and β = 0, as in a model with fresh weights.
* **ReGELU2**. GELU forward; its derivative is replaced by a step function of four levels, which is kept in 2 bits per
  element. Its gradients are therefore approximations, and worst near zero: over a normal distribution with a standard
  deviation of 1 the slopes are off by 36 %, of 0.3, which fresh weights give, by 72 % (root mean square).

The paper runs both as fused CUDA kernels. With `fuse`, Inductor fuses the same formulas; without it they run operator
by operator.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from scipy.integrate import quad
from scipy.optimize import minimize_scalar
from scipy.stats import norm as normal
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import ViTForImageClassification

LEVELS_PER_BYTE = 4


def share_memory(
    model: ViTForImageClassification, *, approximate: bool, fuse: bool = False
) -> ViTForImageClassification:
    """Replace, in place, every LayerNorm of a ViT by MS-LN and, if `approximate`, every GELU by ReGELU2.

    Args:
        model: a ViT whose blocks norm first.
        approximate: whether GELU's derivative is approximated, too.
        fuse: compile the elementwise formulas with Inductor.

    Returns:
        The model.
    """
    for layer in model.vit.layers:
        attention, mlp = layer.attention, layer.mlp
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        layer.layernorm_before = folded(layer.layernorm_before, projections, fuse)
        layer.layernorm_after = folded(layer.layernorm_after, (mlp.fc1,), fuse)
        if approximate:
            mlp.activation_fn = ReGELU2(fuse).to(mlp.fc1.weight.device)
    model.vit.layernorm = folded(model.vit.layernorm, (model.classifier,), fuse)
    return model


class MemorySharingLayerNorm(nn.Module):
    """LayerNorm over the last axis without γ and β, which keeps its output x̂ instead of its input.

    x̂ is in the autocast dtype where autocast is on, else in the input's, so that a linear map that follows keeps the
    very tensor. Also kept: 1/σ, one fp32 number per row (float64 for a float64 input).
    """

    def __init__(self, eps: float, fuse: bool = False) -> None:
        super().__init__()
        self.eps, self.fuse = eps, fuse

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x`."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        return _SharedNorm.apply(x, self.eps, dtype, self.fuse)


class ReGELU2(nn.Module):
    """GELU whose derivative is a step function of four levels, kept in 2 bits per element."""

    slopes: Tensor

    def __init__(self, fuse: bool = False) -> None:
        super().__init__()
        outer, self.breakpoint = relu_combination()
        self.fuse = fuse
        # The derivative of the sum of ReLUs: it rises by each weight at its breakpoint.
        levels = torch.tensor([0.0, outer, 1.0 - outer, 1.0])
        self.register_buffer("slopes", levels[unpacked(torch.arange(256, dtype=torch.uint8)).long()], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply GELU."""
        return _ApproximateGELU.apply(x, self.breakpoint, self.slopes, self.fuse)


def folded(norm: nn.LayerNorm, linears: Sequence[nn.Linear], fuse: bool = False) -> MemorySharingLayerNorm:
    """Fold γ and β of `norm` into the linear maps that read its output, in place, and return what is left of it."""
    with torch.no_grad():
        for linear in linears:
            shift = linear.weight @ norm.bias
            if linear.bias is None:
                linear.bias = nn.Parameter(shift)
            else:
                linear.bias.add_(shift)
            linear.weight.mul_(norm.weight)
    return MemorySharingLayerNorm(norm.eps, fuse)


@functools.cache
def relu_combination() -> tuple[float, float]:
    """Fit GELU by a sum of three ReLUs and return (a, c), the weight of the outer two and their distance from zero.

    The paper minimises ∫ (GELU(x) − h(x))² dx over h(x) = Σ aᵢ·ReLU(x − cᵢ), i = 1, 2, 3, where Σ aᵢ = 1 and
    Σ aᵢ·cᵢ = 0 let both sides agree at infinity. GELU(x) − ReLU(x) = −|x|·Φ(−|x|) is even, and so is the fit here:
    weights (a, 1 − 2a, a) at (−c, 0, c), which satisfy the constraints by themselves. For x > 0,
    h(x) − ReLU(x) = a·ReLU(c − x); with r(c) = ∫₀ᶜ (c − x)·x·Φ(−x) dx, the best a is −r(c)·3/c³, and it lowers the
    squared distance by r(c)²·3/c³, which is maximised over c. The paper's own numerical search ends at
    a = −0.049 and c = 3.19.
    """

    def overlap(c: float) -> float:
        return quad(lambda x: (c - x) * x * normal.cdf(-x), 0.0, c)[0]

    c = float(minimize_scalar(lambda c: -3.0 * overlap(c) ** 2 / c**3, bounds=(0.5, 10.0), method="bounded").x)
    return -3.0 * overlap(c) / c**3, c


def packed(levels: Tensor) -> Tensor:
    """Pack numbers from 0 to 3, four to a byte.

    Args:
        levels: uint8, any shape, n elements.

    Returns:
        uint8 of shape (⌈n / 4⌉,).
    """
    flat = levels.flatten()
    quads = F.pad(flat, (0, -flat.numel() % LEVELS_PER_BYTE)).view(-1, LEVELS_PER_BYTE)
    return quads[:, 0] | quads[:, 1] << 2 | quads[:, 2] << 4 | quads[:, 3] << 6


def unpacked(codes: Tensor) -> Tensor:
    """Undo `packed`: uint8 of shape (m,) to uint8 of shape (m, 4), padding included."""
    return torch.stack([codes >> shift & 3 for shift in (0, 2, 4, 6)], dim=1)


class _SharedNorm(torch.autograd.Function):
    """x̂ forward; backward dx = (g − mean(g) − x̂·mean(g·x̂)) / σ, with means over the last axis."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, dtype: torch.dtype, fuse: bool) -> Tensor:
        ctx.dtype, ctx.fuse = x.dtype, fuse
        normalised, rstd = _kernel(_normalise, fuse)(x, eps, dtype)
        ctx.save_for_backward(normalised, rstd)
        return normalised

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        kernel = _kernel(_normalise_backward, ctx.fuse)
        return kernel(gradient, *ctx.saved_tensors, ctx.dtype), None, None, None


class _ApproximateGELU(torch.autograd.Function):
    """GELU forward; backward the gradient times the slope that a 2-bit code names."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, breakpoint_: float, slopes: Tensor, fuse: bool) -> Tensor:
        ctx.fuse = fuse
        output, codes = _kernel(_gelu_and_codes, fuse)(x, breakpoint_)
        ctx.save_for_backward(codes, slopes)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _kernel(_scaled, ctx.fuse)(gradient, *ctx.saved_tensors), None, None, None


@functools.cache
def _kernel(formula: Callable[..., Any], fuse: bool) -> Callable[..., Any]:
    return torch.compile(formula) if fuse else formula


def _normalise(x: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normalised, _, rstd = torch.native_layer_norm(wide, x.shape[-1:], None, None, eps)
    return normalised.to(dtype), rstd


def _normalise_backward(gradient: Tensor, normalised: Tensor, rstd: Tensor, dtype: torch.dtype) -> Tensor:
    g, x_hat = gradient.to(rstd.dtype), normalised.to(rstd.dtype)
    projection = (g * x_hat).mean(-1, keepdim=True)
    return ((g - g.mean(-1, keepdim=True) - x_hat * projection) * rstd).to(dtype)


def _gelu_and_codes(x: Tensor, breakpoint_: float) -> tuple[Tensor, Tensor]:
    steps = (x > edge for edge in (-breakpoint_, 0.0, breakpoint_))
    first, second, third = (step.to(torch.uint8) for step in steps)
    return F.gelu(x), packed(first + second + third)


def _scaled(gradient: Tensor, codes: Tensor, slopes: Tensor) -> Tensor:
    looked_up = F.embedding(codes.int(), slopes.to(gradient.dtype))
    return looked_up.flatten()[: gradient.numel()].view(gradient.shape) * gradient
