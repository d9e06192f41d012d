"""Linear maps undone by QR: only those with a frozen weight, and well-conditioned."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import torch
from torch import Tensor, fx
from torch.utils.weak import WeakIdKeyDictionary

from bwsk_fx import _torch_private as private
from bwsk_fx.rules.inverse import Inverse, WitnessWriter, calls, inverts

aten = torch.ops.aten

# Marks a placeholder whose weight may be undone.
WELL_CONDITIONED = "well_conditioned"
# Rounding of the result grows by at most this much on the way back.
_LARGEST_CONDITION = 4.0
_WIDE = (torch.float32, torch.float64)

# What has been computed about a weight, and which weight a fake tensor stands for; neither keeps a tensor alive.
_known: WeakIdKeyDictionary = WeakIdKeyDictionary()
_originals: WeakIdKeyDictionary = WeakIdKeyDictionary()


def is_well_conditioned(weight: Tensor) -> bool:
    """Whether y = x Wᵀ can be undone: W is frozen, has at least as many rows as columns, and κ(W) ≤ 4.

    The answer is remembered until the weight is written into. A weight that trains has none for long, and half
    precision rounds the result more than the bound on gradients allows.
    """
    original = _originals.get(weight)
    weight = weight if original is None else original()
    if weight.requires_grad or weight.dim() != 2 or weight.shape[0] < weight.shape[1] or weight.dtype not in _WIDE:
        return False
    version, answer = _known.get(weight, (None, False))
    if version != weight._version:
        answer = _condition(weight) <= _LARGEST_CONDITION
        _known[weight] = (weight._version, answer)
    return answer


def stands_for(fake: Tensor, weight: Tensor) -> None:
    """Let `is_well_conditioned` look at `weight` when it is asked about `fake`."""
    _originals[fake] = weakref.ref(weight)


def _condition(weight: Tensor) -> float:
    # Plans are made on fake tensors, too.
    with torch.no_grad(), private.without_fake_mode():
        values = torch.linalg.svdvals(weight.double()).tolist()
    return values[0] / values[-1] if values and values[-1] else torch.inf


@inverts(aten.mm.default, aten.addmm.default)
def linear_inverse(node: fx.Node, _: WitnessWriter) -> Iterator[Inverse]:
    """The operand of a frozen, well-conditioned linear map, from its result."""
    *bias, operand, weight = node.args
    is_linear = isinstance(weight, fx.Node) and weight.target is aten.t.default and not node.kwargs
    if not is_linear or not weight.args[0].meta.get(WELL_CONDITIONED):  # type: ignore[union-attr]
        return
    if node.meta["val"].dtype in _WIDE:
        tails = (node, weight, *bias)
        back, rule = calls(solve_linear), "frozen linear map"
        yield Inverse(operand, tails, back, False, rule=rule, intensive=True, magnifies=True)  # type: ignore[arg-type]


def solve_linear(result: Tensor, weight_t: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the x of `result` = x `weight_t` + `bias` by least squares: W = Q R, x = (y − b) Q R⁻ᵀ.

    Args:
        result: (rows, m).
        weight_t: (n, m), the transposed weight, of rank n.
        bias: (m,) or broadcast to it.
    """
    q, r = torch.linalg.qr(weight_t.mT)
    y = result if bias is None else result - bias
    return torch.linalg.solve_triangular(r.mT, y @ q, upper=False, left=False)
