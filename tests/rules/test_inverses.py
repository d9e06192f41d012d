"""Every planner inverse, run on real values: exact ones give the very bits and strides, the others come close."""

import operator
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from bwsk_fx import _torch_private as private
from bwsk_fx.planning.cost import Roofline, profile_of
from bwsk_fx.planning.derivations import derive
from bwsk_fx.planning.trace import trace
from bwsk_fx.rules.inverse import Inverse, WitnessWriter, inverses_of, registered_inverses

aten = torch.ops.aten
FLOATS = (torch.float32, torch.bfloat16, torch.float64)
NAN, INF = float("nan"), float("inf")


class Rebuilt(NamedTuple):
    inverse: Inverse
    found: Tensor
    expected: Tensor
    tails: list[Tensor]


def _rebuild(function: Callable, *tensors: Tensor, autocast: torch.dtype | None = None) -> dict[str, list[Rebuilt]]:
    """Trace a function, run its forward pass with all witnesses, and run each inverse on what it found, by rule."""
    inputs = {f"in{place}": tensor.requires_grad_(tensor.is_floating_point()) for place, tensor in enumerate(tensors)}
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        joint = trace(lambda *args: [function(*args)], inputs, range(1, len(inputs)), "small").joint
    writer = WitnessWriter(joint.graph)
    # Not of the view that wraps the output.
    nodes = [node for node in joint.forward_nodes() if not node.name.startswith("_unsafe_view")]
    inverses = [inverse for node in nodes for inverse in inverses_of(node, writer)]
    at = dict(zip(joint.primals, (tensor.detach() for tensor in tensors), strict=True))
    for node in joint.graph.nodes:
        if node.op == "call_function" and node not in joint.backward and all(arg in at for arg in node.all_input_nodes):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), at.__getitem__)
            at[node] = node.target(*args, **kwargs)
    rebuilt: dict[str, list[Rebuilt]] = {}
    for inverse in inverses:
        tails = [at[tail] for tail in inverse.tails]
        rebuilt.setdefault(inverse.rule, []).append(Rebuilt(inverse, _run(inverse, tails), at[inverse.head], tails))
    return rebuilt


def _run(inverse: Inverse, tails: list[Tensor]) -> Tensor:
    graph = fx.Graph()
    places = [graph.placeholder(f"tail{place}") for place, _ in enumerate(tails)]
    graph.output(inverse.emit(graph, places))
    return fx.GraphModule(torch.nn.Module(), graph)(*tails)


def _assert_exact(rebuilt: Rebuilt) -> None:
    found, expected = rebuilt.found, rebuilt.expected
    assert rebuilt.inverse.exact
    assert (found.dtype, found.shape, found.stride()) == (expected.dtype, expected.shape, expected.stride())
    assert torch.equal(_bits(found), _bits(expected))


def _bits(value: Tensor) -> Tensor:
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return value.view(integers[value.element_size()]) if value.is_floating_point() else value


def _assert_close(rebuilt: Rebuilt, ulps: float, scale: float = 0.0) -> None:
    """Within some units in the last place of each element; plus as many of `scale`."""
    found, expected = rebuilt.found, rebuilt.expected
    assert not rebuilt.inverse.exact
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    loose = ulps * torch.finfo(expected.dtype).eps
    torch.testing.assert_close(found, expected, rtol=loose, atol=loose * scale, equal_nan=True)


def _random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _special(dtype: torch.dtype = torch.float32) -> Tensor:
    """Random numbers with everything unusual among them."""
    value = _random(6, 8, dtype=dtype)
    value[0] = torch.tensor([NAN, INF, -INF, 0.0, -0.0, 1.0, -1.0, 0.5]).to(dtype)
    return value


# Arithmetic.


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("function", "heads"),
    [
        (lambda x, y: torch.add(x, y, alpha=3.0), 2),
        (lambda x, y: torch.sub(x, y, alpha=-0.25), 2),
        (lambda x, y: x + y, 2),
        (lambda x, y: x - y, 2),
        (lambda x, y: x - y[:1], 1),
        (lambda x, y: torch.sub(x, 0.5, alpha=2), 1),
        (lambda x, y: 1.5 - x, 1),
        (lambda x, y: torch.rsub(x, y), 2),
        (lambda x, y: torch.addcmul(x, y, y, value=-2.0), 1),
    ],
    ids=["add alpha", "sub alpha", "add", "sub", "broadcast", "number", "rsub number", "rsub", "addcmul"],
)
def test_sums_give_their_operands_back(function, heads, dtype):
    rebuilt = _rebuild(
        lambda x, y: function(x, y).sin(), _random(6, 8, dtype=dtype), _random(6, 8, dtype=dtype, seed=1)
    )
    assert len(rebuilt["sum"]) == heads
    for one in rebuilt["sum"]:
        # A difference is as exact as the larger of its operands.
        _assert_close(one, 16, scale=max(tail.abs().max().item() for tail in one.tails))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("function", [lambda x: x * 0.3, lambda x: x / -7, lambda x: x / (x.detach().abs() + 0.1)])
def test_scalings_are_undone(function, dtype):
    (one,) = _rebuild(lambda x: function(x).sin(), _random(6, 8, dtype=dtype))["scaling"]
    _assert_close(one, 2)


@pytest.mark.parametrize("number", [0.0, INF, NAN, 1e-7])
def test_a_number_that_flushes_to_zero_or_overflows_is_no_scaling(number):
    assert "scaling" not in _rebuild(lambda x: (x * number).sin(), _random(4, dtype=torch.float16))
    assert "sum" not in _rebuild(lambda x: torch.add(x, x.cos(), alpha=number).sin(), _random(4, dtype=torch.float16))


def test_a_product_of_tensors_is_never_inverted():
    rebuilt = _rebuild(lambda x, weight: (x * weight * x.exp()).sin(), _random(4, 4), _random(4, 4, seed=1))
    assert rebuilt == {}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("function", "rule"),
    [
        (torch.sqrt, "square of the root"),
        (torch.reciprocal, "reciprocal"),
        (torch.rsqrt, "one over the square"),
    ],
)
def test_powers_come_back_within_a_few_units(function, rule, dtype):
    positive = _random(6, 8, dtype=dtype).abs() * 10.0
    (one,) = _rebuild(lambda x: function(x).sin(), positive)[rule]
    _assert_close(one, 4)


@pytest.mark.parametrize("function", [torch.reciprocal, torch.rsqrt])
def test_float16_powers_that_turn_subnormal_are_left_out(function):
    assert _rebuild(lambda x: function(x).sin(), _random(4, dtype=torch.float16).abs()) == {}


@pytest.mark.parametrize("name", ["exp", "expm1", "log", "log1p", "tanh", "sigmoid", "erf", "abs", "_softmax"])
def test_what_saturates_amplifies_or_folds_has_no_inverse(name):
    assert getattr(aten, name).default not in registered_inverses()


def test_negation_and_widening_keep_every_bit():
    for one in _rebuild(lambda x: (-x).sin(), _special())["negation"]:
        _assert_exact(one)
    for one in _rebuild(lambda x: x.float().sin(), _special(torch.bfloat16))["widening cast"]:
        _assert_exact(one)


def test_a_cast_of_part_of_a_tensor_is_not_said_to_be_exact():
    assert "widening cast" not in _rebuild(lambda x: x[:, ::2].float().sin(), _special(torch.bfloat16))


# Shapes.


@pytest.mark.parametrize(
    ("function", "rule", "free"),
    [
        (lambda x: x.view(6, 1, 8).sin().squeeze(1).cos(), "inverse of aten.squeeze.dim", True),
        (lambda x: x.view(1, 6, 1, 8).sin().squeeze().cos(), "inverse of aten.squeeze.default", True),
        (lambda x: x.view(1, 6, 1, 8).sin().squeeze((0, 2, 3)).cos(), "inverse of aten.squeeze.dims", True),
        (lambda x: x.sin().unsqueeze(1).expand(2, 6, 3, 8).cos(), "first copy", False),
        (lambda x: x.sin().t().contiguous().cos(), "copy", False),
        (lambda x: torch.cat([x.sin(), x.cos()]).sin(), "part", True),
        (lambda x: torch.cat([x.sin(), x.cos()], dim=-1).sin(), "part", False),
        (lambda x: torch.cat([x.t().sin(), x.t().cos()], dim=1).sin(), "part", False),
        (lambda x: torch.stack([x.sin(), x.cos()]).sin(), "part", True),
        (lambda x: torch.stack([x.sin(), x.cos()], dim=-1).sin(), "part", False),
        (lambda x: _times(x.sin().split(3)), "all parts", False),
        (lambda x: _times(x.sin().split([1, 7], dim=1)), "all parts", False),
        (lambda x: _times(x.t().sin().chunk(2, dim=0)), "all parts", False),
        (lambda x: _times(x.sin().unbind(1)), "all parts", False),
    ],
)
def test_what_is_moved_comes_back_bit_for_bit(function, rule, free):
    found = _rebuild(function, _special())[rule]
    assert {one.inverse.free for one in found} == {free}
    for one in found:
        _assert_exact(one)


def _times(parts) -> Tensor:
    return sum(part.sin().sum() for part in parts)


def test_each_operand_of_a_cat_is_a_part():
    found = _rebuild(lambda x, y: torch.cat([x.sin(), y.cos(), x.tan()], 1).sin(), _random(4, 3), _random(4, 5))["part"]
    assert [one.expected.shape[1] for one in found] == [3, 5, 3]
    for one in found:
        _assert_exact(one)


def test_a_split_of_which_a_part_is_unused_does_not_come_back():
    assert "all parts" not in _rebuild(lambda x: x.sin().split(2)[0].sin(), _random(4, 4))


def test_a_squeeze_with_other_strides_is_no_view_back():
    strided = torch.empty_strided((4, 1, 8), (8, 3, 1)).copy_(_random(4, 1, 8))
    assert _rebuild(lambda x: x.squeeze(1).sin(), strided) == {}


def test_a_part_and_the_whole_are_no_views_of_each_other():
    inputs = {"x": _random(4, 4).requires_grad_()}
    joint = trace(lambda x: [torch.cat([x.sin(), x.cos()]).sin()], inputs, [], "small").joint
    graph = derive(joint, Roofline(profile_of(torch.device("cpu"))), exact=True)
    (cat,) = joint.graph.find_nodes(op="call_function", target=aten.cat.default)
    assert graph.class_of[cat] is cat
    assert {one.head for one in graph.derivations if one.rule == "part"} == set(cat.args[0])


# Masks, signs and indices.


def _channels_last(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return _random(*shape, dtype=dtype).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("value", [_special(), _special(torch.bfloat16), _special().t(), _channels_last(2, 3, 5, 7)])
@pytest.mark.parametrize(
    ("function", "rule", "bits"),
    [
        (lambda x: x.clamp(-0.5, 0.5), "packed mask", 1),
        (lambda x: torch.maximum(x, x.cos()), "packed mask", 1),
        (lambda x: torch.where((x > 0).unsqueeze(0), x, x.cos()), "packed mask", 1),
        (lambda x: x.abs(), "packed signs", 2),
    ],
    ids=["clamp", "maximum", "view", "abs"],
)
def test_masks_and_signs_are_kept_in_bits(function, rule, bits, value):
    found = _rebuild(function, value.clone(memory_format=torch.preserve_format))[rule]
    for one in found:
        _assert_exact(one)
        (packed,) = one.tails
        assert packed.dtype is torch.uint8
        assert packed.numel() == -(-one.expected.numel() * bits // 8)


def test_a_mask_that_only_the_forward_pass_reads_is_not_packed():
    assert _rebuild(lambda x, y: (x * (y.detach() > 0).sum()).exp(), _random(4), _random(4, seed=1)) == {}


def test_signs_of_everything_unusual_are_those_of_the_operator():
    (one,) = _rebuild(lambda x: x.abs(), _special())["packed signs"]
    assert one.found[0].tolist() == [0.0, 1.0, -1.0, 0.0, 0.0, 1.0, -1.0, 1.0]


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [((16, 16), torch.uint8), ((1, 257), torch.int16), ((8, 4096), torch.int16), ((1, 32769), torch.int32)],
)
def test_pooling_indices_are_kept_in_the_narrowest_dtype(sizes, dtype):
    plane = _random(1, 1, *sizes)
    plane[..., -1, -1] = 100.0
    (one,) = _rebuild(lambda x: F.max_pool2d(x * 2.0, (1, sizes[1])), plane)["narrow indices"]
    _assert_exact(one)
    assert one.tails[0].dtype is dtype
    assert one.expected.max() == plane.numel() - 1


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.adaptive_max_pool2d(x.sin(), 2),
        lambda x: F.max_pool3d(x.sin(), 2),
        lambda x: x.sin().max(-1).values,
        lambda x: x.sin().min(1).values,
    ],
)
def test_indices_come_back(function):
    (one,) = _rebuild(function, _random(2, 4, 6, 8))["narrow indices"]
    _assert_exact(one)
    assert (one.tails[0].dtype, one.expected.dtype) == (torch.uint8, torch.int64)


# Normalisations.


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("affine", [0, 1, 2])
@pytest.mark.parametrize("shape", [(2, 4, 3, 5), (2, 4)])
def test_group_norm_comes_back_through_x_hat(affine, shape, dtype):
    weights = [_random(4, dtype=dtype, seed=seed) for seed in (1, 2)][:affine]
    operand = _random(*shape, dtype=dtype)
    if len(shape) == 4:
        operand = operand.to(memory_format=torch.channels_last)
    rebuilt = _rebuild(lambda x, *weights: F.group_norm(x, 2, *weights).sin(), operand, *weights)
    assert set(rebuilt) == {"GroupNorm input from x̂", "GroupNorm output from x̂"}
    for (one,) in rebuilt.values():
        _assert_close(one, 8, scale=4.0)


def _llama_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x if x.dtype is torch.float64 else x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def _nn_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (8,), weight, 1e-6)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("norm", [_llama_norm, _nn_norm])
def test_rms_norm_comes_back_through_x_hat(norm, dtype):
    rebuilt = _rebuild(lambda x, w: norm(x, w).sin(), _random(6, 8, dtype=dtype) * 30, _random(8, dtype=dtype, seed=1))
    half = torch.bfloat16 if dtype is torch.bfloat16 else dtype
    for found in (rebuilt["RMSNorm input from x̂"], rebuilt.get("RMSNorm x̂ from its half", ())):
        for one in found:
            # In units of the dtype that x̂ is kept in.
            torch.testing.assert_close(one.found, one.expected, rtol=4 * torch.finfo(half).eps, atol=0.0)


@pytest.mark.parametrize("norm", [_llama_norm, _nn_norm, lambda x, w: F.layer_norm(x, (8,), w, w)])
@pytest.mark.parametrize(
    ("reader", "kept"),
    [
        (lambda y, w: y @ w, torch.bfloat16),
        (lambda y, w: y[:, 0] @ w, torch.bfloat16),
        (lambda y, w: y.transpose(0, 1).select(0, 1) @ w, torch.bfloat16),
        (lambda y, w: y[:, 0] @ w + y[:, 1] @ w, torch.bfloat16),
        (lambda y, w: y[:, 0] @ w + y[:, 1].sin(), torch.float32),
        (lambda y, w: y.sin(), torch.float32),
    ],
    ids=["linear", "select", "views", "two views", "one as it is", "as it is"],
)
def test_x_hat_is_kept_in_the_dtype_that_every_reader_casts_to(norm, reader, kept):
    tensors = _random(3, 2, 8) * 5, _random(8, seed=1), _random(8, 8, seed=2)
    rebuilt = _rebuild(lambda x, gamma, w: reader(norm(x, gamma), w).cos(), *tensors, autocast=torch.bfloat16)
    (one,) = rebuilt.get("RMSNorm input from x̂") or rebuilt["LayerNorm input from x̂"]
    assert one.tails[0].dtype is kept
    torch.testing.assert_close(one.found, one.expected, rtol=0.0, atol=32 * torch.finfo(kept).eps)


@pytest.mark.parametrize("norm", [_llama_norm, _nn_norm, lambda x, w: F.layer_norm(x, (8,), w, w)])
@pytest.mark.parametrize(
    ("after", "kept"),
    [
        (lambda stream, norm, w: norm(stream, w).bfloat16().float(), torch.bfloat16),
        (lambda stream, norm, w: stream * 2.0, torch.bfloat16),
        (lambda stream, norm, w: stream.sin(), torch.float32),
        (lambda stream, norm, w: (stream[:, 0] * 3.0).exp(), torch.float32),
        (lambda stream, norm, w: F.mse_loss(stream, w.expand(3, 8)), torch.float32),
    ],
    ids=["norm", "linear", "sine", "view", "mse"],
)
def test_x_hat_is_kept_in_half_only_where_the_stream_bears_it(norm, after, kept):
    def function(x: Tensor, gamma: Tensor, w: Tensor) -> Tensor:
        stream = x + (norm(x, gamma) @ w).float()
        return after(stream + (norm(stream, gamma) @ w).float(), norm, gamma)

    tensors = _random(3, 8) * 5, _random(8, seed=1), _random(8, 8, seed=2)
    rebuilt = _rebuild(function, *tensors, autocast=torch.bfloat16)
    found = rebuilt.get("RMSNorm input from x̂") or rebuilt["LayerNorm input from x̂"]
    assert {one.tails[0].dtype for one in found} == {kept}


def test_the_output_of_a_norm_that_is_returned_as_it_is_keeps_its_dtype():
    rebuilt = _rebuild(lambda x, w: F.layer_norm(x, (8,), w, w), _random(3, 8), _random(8), autocast=torch.bfloat16)
    (one,) = rebuilt["LayerNorm input from x̂"]
    assert one.tails[0].dtype is torch.float32


def test_a_fused_rms_norm_comes_back_through_x_hat():
    """Traced on CUDA alone, but the operator runs anywhere."""
    operand, weight, mode = _random(3, 8) * 30, _random(8, seed=1), private.fake_mode()
    graph = fx.Graph()
    x, gamma = (graph.placeholder(name) for name in ("x", "gamma"))
    node = graph.call_function(aten._fused_rms_norm.default, (x, [8], gamma, 1e-6))
    parts = [graph.call_function(operator.getitem, (node, place)) for place in (0, 1)]
    graph.output(tuple(parts))
    with mode:
        x.meta["val"], gamma.meta["val"] = torch.empty(3, 8), torch.empty(8)
        node.meta["val"] = aten._fused_rms_norm(x.meta["val"], [8], gamma.meta["val"], 1e-6)
        for part, value in zip(parts, node.meta["val"], strict=True):
            part.meta["val"] = value
    into, back = inverses_of(node, WitnessWriter(graph))
    assert (into.head, back.head) == (x, parts[0])
    xhat, rstd = aten._fused_rms_norm(operand, [8], None, 1e-6)
    torch.testing.assert_close(_run(into, [xhat, rstd]), operand, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(_run(back, [xhat, weight]), aten._fused_rms_norm(operand, [8], weight, 1e-6)[0])
