"""The roofline: FLOPs against bytes against elements, launches, and views for nothing."""

import math

import pytest
import torch
from torch import fx

from bwsk_fx import _torch_private as private
from bwsk_fx.planning.cost import (
    KEPT_BLOCK,
    DeviceProfile,
    Roofline,
    emitted_seconds,
    flops,
    is_intensive,
    profile_of,
)
from bwsk_fx.planning.kernels import KernelCall, kernel_calls
from bwsk_fx.planning.trace import trace

aten = torch.ops.aten
PROFILE = DeviceProfile(
    products_float32=1e3,
    products_bfloat16=1e4,
    products_float16=1e5,
    attention_float32=2e3,
    attention_bfloat16=2e4,
    attention_float16=2e5,
    bandwidth=1e6,
    functions=1e4,
    normalizations=2e4,
    fresh=math.inf,
    launch=0.5,
)
COSTS = Roofline(PROFILE)


def _nodes(function, *tensors):
    inputs = {f"x{index}": tensor for index, tensor in enumerate(tensors)}
    return {node.name: node for node in trace(function, inputs, [], "small").joint.graph.nodes}


def _random(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def _call(target, *args) -> KernelCall:
    return KernelCall(target, args, {}, target(*args))


@pytest.mark.parametrize(("dtype", "rate"), [(torch.float32, 1e3), (torch.bfloat16, 1e4), (torch.float16, 1e5)])
def test_a_product_is_bound_by_flops(dtype, rate):
    nodes = _nodes(lambda x, w: [x @ w], _random(4, 8, dtype=dtype), _random(8, 16, dtype=dtype))
    assert COSTS.seconds(nodes["mm"]) == pytest.approx(0.5 + 2 * 4 * 8 * 16 / rate)
    assert is_intensive(nodes["mm"])


def test_any_other_dtype_has_the_rates_of_float32():
    assert PROFILE.flops("products", torch.float64) == 1e3
    assert PROFILE.flops("attention", torch.float64) == 2e3


def test_elementwise_work_is_bound_by_bytes():
    node = _nodes(lambda x, y: [x * y], _random(1000), _random(1000))["mul"]
    assert COSTS.seconds(node) == pytest.approx(0.5 + 3 * 4000 / 1e6)
    assert not is_intensive(node)


@pytest.mark.parametrize("function", [torch.sin, torch.nn.functional.gelu, torch.sigmoid, lambda x: x**3])
def test_functions_are_bound_by_elements(function):
    forward = _nodes(lambda x: [function(x)], _random(1000))
    call = next(node for node in forward.values() if node.op == "call_function")
    assert COSTS.seconds(call) == pytest.approx(0.5 + 1000 / 1e4)


def test_functions_are_bound_by_bytes_where_those_take_longer():
    slow = Roofline(DeviceProfile(**{**PROFILE.__dict__, "bandwidth": 1e3}))
    assert slow.seconds(_nodes(lambda x: [x.sin()], _random(1000))["sin"]) == pytest.approx(0.5 + 8000 / 1e3)


def test_squares_and_gradients_of_products_are_no_functions():
    nodes = _nodes(lambda x: [x.pow(2).tanh()], _random(1000))
    assert COSTS.seconds(nodes["pow_1"]) == pytest.approx(0.5 + 2 * 4000 / 1e6)
    gradient = next(node for name, node in nodes.items() if "tanh_backward" in name or name.startswith("mul"))
    assert COSTS.seconds(gradient) < 0.5 + 1000 / 1e4


def test_normalizations_are_bound_by_elements():
    nodes = _nodes(lambda x: [torch.nn.functional.layer_norm(x, (8,))], _random(1000, 8))
    assert COSTS.seconds(nodes["native_layer_norm"]) == pytest.approx(0.5 + 8000 / 2e4)
    assert COSTS.seconds(nodes["native_layer_norm_backward"]) == pytest.approx(0.5 + 8000 / 2e4)


def test_large_results_take_memory_from_the_system():
    profile = DeviceProfile(**{**PROFILE.__dict__, "fresh": 1e7})
    with private.fake_mode():
        kept, fresh = torch.empty(KEPT_BLOCK // 4), torch.empty(KEPT_BLOCK // 4 + 1)
        for tensor, extra in ((kept, 0.0), (fresh, (KEPT_BLOCK + 4) / 1e7)):
            call = _call(aten.neg.default, tensor)
            assert Roofline(profile).call_seconds(call) - COSTS.call_seconds(call) == pytest.approx(extra)


def test_views_and_parts_cost_nothing():
    nodes = _nodes(lambda x: [x.t().unsqueeze(0).sin(), x.chunk(2)[0].cos()], _random(4, 8))
    free = {name for name, node in nodes.items() if COSTS.seconds(node) == 0.0}
    assert {"t", "unsqueeze", "split", "getitem", "x0" if "x0" in nodes else "primals_1"} <= free
    assert {"sin", "cos"}.isdisjoint(free)


def test_attention_counts_two_products_forward_and_five_backward():
    query, key = _random(1, 2, 16, 8), _random(1, 2, 4, 8)
    nodes = _nodes(torch_attention, query, key, key)
    forward, backward = (
        next(node for name, node in nodes.items() if "scaled_dot_product" in name and ("backward" in name) == back)
        for back in (False, True)
    )
    product = 2 * (2 * 16 * 4 * 8)
    assert COSTS.seconds(forward) == pytest.approx(0.5 + 2 * product / 2e3)
    assert COSTS.seconds(backward) == pytest.approx(0.5 + 5 * product / 2e3)
    assert is_intensive(forward)


def torch_attention(query, key, value):
    return [torch.nn.functional.scaled_dot_product_attention(query, key, value)]


def test_work_without_products_has_no_flops():
    with private.fake_mode():
        assert flops(_call(aten.add.Tensor, torch.empty(3), torch.empty(3))) == 0.0
        assert flops(_call(aten.mm.default, torch.empty(2, 3), torch.empty(3, 4))) == 2 * 2 * 3 * 4


def test_what_a_rule_emits_is_the_sum_of_its_calls():
    def emit(graph: fx.Graph, tails) -> fx.Node:
        turned = graph.call_function(aten.t.default, (tails[0],))
        return graph.call_function(aten.add.Tensor, (graph.call_function(aten.neg.default, (turned,)), 1.0))

    tail = next(iter(_nodes(lambda x: [x.sin()], _random(10, 20)).values()))
    assert len(kernel_calls(tail)) == 0
    assert emitted_seconds(COSTS, emit, (tail,)) == pytest.approx(2 * (0.5 + 2 * 800 / 1e6))


def test_devices():
    assert profile_of(torch.device("cpu")).launch > 0
    assert profile_of(torch.device("xpu")) == profile_of(torch.device("cuda"))
    assert profile_of(torch.device("cuda")).products_float32 > profile_of(torch.device("cpu")).products_float32
    assert profile_of(torch.device("cuda")).fresh == math.inf
