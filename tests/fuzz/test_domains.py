"""S verdicts hold at the edges of their domains: every dtype, empty and 0-dimensional tensors, zero, infinities."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from bwsk_fx.rules import sound
from bwsk_fx.rules.round_trip import execute, round_trip
from bwsk_fx.verdict import Label

MANY = int(os.environ.get("BWSK_RANDOM_CALLS", "20000"))
DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool, torch.complex64),
)
SHAPES = ((), (0,), (1,), (3,), (2, 3), (2, 0, 3), (2, 1, 4))
NUMBERS = (0.0, -0.0, 1.0, -1.0, 0.5, 2.0, -3.0, 100.0, 1e-30, 1e30, math.inf, -math.inf, math.nan)
SCALARS = (*NUMBERS, 0, 1, -1, 2, -2, 7, True, False)

# At the ends of what their dtypes hold these count as wrong where the operand is lost to rounding: a sum that absorbs
# an integer, an exponential of 1e30, a power of two that is rounded to half precision, a product with NaN.
OPEN = {"ldexp", "logaddexp", "matmul", "rsub", "xlogy"}

Call = tuple[Callable[..., Any], str]
# What each takes beside its first tensor: t another tensor, s a number, d a dimension.
_PLAIN = (
    "neg exp log sqrt rsqrt reciprocal tanh sigmoid expm1 log1p sinh asinh atan erf square abs sgn floor logit cos tan "
    "bitwise_not logical_not real angle frac exp2 log2 acos"
)
_ACTIVATIONS = "gelu silu mish softsign tanhshrink logsigmoid selu hardswish"
_ALONG = "softmax log_softmax cumsum cumprod sort flip roll diff sum mean amax unsqueeze squeeze logcumsumexp unbind"
CALLS: dict[str, Call] = {
    **{name: (getattr(torch, name), "t") for name in ("add", "sub", "mul", "div", "pow", "fmod", "remainder")},
    **{f"{name} scalar": (getattr(torch, name), "s") for name in ("add", "sub", "mul", "div", "pow", "remainder")},
    **{name: (getattr(torch, name), "t") for name in ("atan2", "hypot", "logaddexp", "copysign", "xlogy", "ldexp")},
    **{name: (getattr(torch, name), "t") for name in ("bitwise_xor", "bitwise_and", "logical_xor", "gcd", "nextafter")},
    **{name: (getattr(torch, name), "t") for name in ("maximum", "floor_divide", "bitwise_left_shift", "eq", "lerp")},
    "rsub": (lambda x, s: s - x, "s"),
    "rdiv": (lambda x, s: s / x, "s"),
    "rpow": (lambda x, s: torch.pow(s, x), "s"),
    "add alpha": (lambda x, y, s: torch.add(x, y, alpha=s), "ts"),
    "sub alpha": (lambda x, y, s: torch.sub(x, y, alpha=s), "ts"),
    "addcmul": (lambda x, y, s: torch.addcmul(x, y, y, value=s), "ts"),
    "addcdiv": (lambda x, y, s: torch.addcdiv(x, y, y, value=s), "ts"),
    "clamp": (torch.clamp, "ss"),
    "leaky_relu": (F.leaky_relu, "s"),
    "elu": (F.elu, "s"),
    "celu": (F.celu, "s"),
    "softplus": (F.softplus, "ss"),
    "threshold": (F.threshold, "ss"),
    "hardtanh": (F.hardtanh, "ss"),
    "masked_fill": (lambda x, s: x.masked_fill(x == x, s), "s"),
    "to float16": (lambda x: x.to(torch.float16), ""),
    "to int64": (lambda x: x.to(torch.int64), ""),
    "to float64": (lambda x: x.to(torch.float64), ""),
    "to uint8": (lambda x: x.to(torch.uint8), ""),
    "to bool": (lambda x: x.to(torch.bool), ""),
    **{name: (getattr(torch, name), "") for name in _PLAIN.split()},
    **{name: (getattr(F, name), "") for name in _ACTIVATIONS.split()},
    **{name: (getattr(torch, name), "d") for name in _ALONG.split()},
    "normalize": (lambda x, d: F.normalize(x, dim=d), "d"),
    "layer_norm": (lambda x: F.layer_norm(x, x.shape[-1:]), ""),
    "narrow": (lambda x, d: x.narrow(d, 0, x.shape[d]), "d"),
    "cat": (lambda x, y, d: torch.cat([x, y], d), "td"),
    "stack": (lambda x, y: torch.stack([x, y]), "t"),
    "matmul": (torch.matmul, "t"),
    "transpose": (lambda x: x.mT, ""),
    "nan_to_num": (torch.nan_to_num, "s"),
}


@st.composite
def tensors(draw, shape: tuple[int, ...] | None = None) -> Tensor:
    shape = draw(st.sampled_from(SHAPES)) if shape is None else shape
    dtype = draw(st.sampled_from(DTYPES))
    count = math.prod(shape)
    edge = st.sampled_from(NUMBERS) | st.floats(-4, 4)
    values = torch.tensor(draw(st.lists(edge, min_size=count, max_size=count)), dtype=torch.float64)
    if not (dtype.is_floating_point or dtype.is_complex):
        values = values.nan_to_num(5.0, 7.0, 0.0).clamp(-100, 100)
    made = values.reshape(shape).to(dtype)
    # The same values, every other element of memory.
    return torch.stack([made, made], -1)[..., 0] if draw(st.booleans()) else made


@st.composite
def calls(draw) -> tuple[str, list[Any]]:
    name = draw(st.sampled_from(sorted(set(CALLS) - OPEN)))
    x = draw(tensors())
    arguments: list[Any] = [x]
    for kind in CALLS[name][1]:
        if kind == "t":
            shape = draw(st.sampled_from([x.shape, (), x.shape[-1:]]))
            arguments.append(x if draw(st.integers(0, 5)) == 0 else draw(tensors(tuple(shape))))
        else:
            arguments.append(draw(st.sampled_from(SCALARS) if kind == "s" else st.integers(-1, 1)))
    return name, arguments


def judge(name: str, arguments: list[Any], static: bool) -> Label | None:
    """Return the label of a call, after its round trip where it is S; None where PyTorch refuses the call."""
    dynamic = {id(arguments[0])} if static else None
    try:
        executed = execute(CALLS[name][0], arguments, {}, dynamic)
    except (RuntimeError, IndexError, ValueError, TypeError, NotImplementedError, ZeroDivisionError, OverflowError):
        return None
    verdict = sound.verdict(executed.call)
    if verdict.label is Label.S:
        trip = round_trip(executed, verdict)
        assert trip.holds, f"{verdict.rationale}: {trip}"
    return verdict.label


@pytest.mark.parametrize(
    "count",
    [
        pytest.param(400, id="few"),
        pytest.param(MANY, id="many", marks=[pytest.mark.slow, pytest.mark.timeout(0)]),
    ],
)
def test_s_verdicts_hold_at_the_edges(count):
    found: Counter[Label | None] = Counter()

    @seed(count)
    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(calls(), st.booleans())
    def holds(call, static):
        label = judge(*call, static)
        found[label] += 1
        assume(label is not None)

    holds()
    assert found[Label.S] > count / 10
