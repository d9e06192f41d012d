"""The roofline: FLOPs against bytes, launches, and views for nothing."""

import pytest
import torch

from bwsk_fx.planning.cost import DeviceProfile, is_intensive, node_seconds, pointwise_seconds, profile_of
from bwsk_fx.planning.trace import trace
from bwsk_fx.planning.views import is_view

PROFILE = DeviceProfile(flops=1e3, half_flops=1e4, bandwidth=1e6, launch=0.5)


def _nodes(function, *tensors):
    inputs = {f"x{index}": tensor for index, tensor in enumerate(tensors)}
    return {node.name: node for node in trace(function, inputs, [], "small").joint.graph.nodes}


def _random(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize(("dtype", "rate"), [(torch.float32, 1e3), (torch.bfloat16, 1e4), (torch.float16, 1e4)])
def test_a_product_is_bound_by_flops(dtype, rate):
    nodes = _nodes(lambda x, w: [x @ w], _random(4, 8, dtype=dtype), _random(8, 16, dtype=dtype))
    assert node_seconds(nodes["mm"], PROFILE) == pytest.approx(0.5 + 2 * 4 * 8 * 16 / rate)
    assert is_intensive(nodes["mm"])


def test_elementwise_work_is_bound_by_bytes():
    node = _nodes(lambda x: [x.sin()], _random(1000))["sin"]
    assert node_seconds(node, PROFILE) == pytest.approx(0.5 + 2 * 4000 / 1e6)
    assert pointwise_seconds([node, *node.all_input_nodes], PROFILE) == node_seconds(node, PROFILE)
    assert not is_intensive(node) and not is_view(node)


def test_views_and_parts_cost_nothing():
    nodes = _nodes(lambda x: [x.t().unsqueeze(0).sin(), x.chunk(2)[0].cos()], _random(4, 8))
    free = {name for name, node in nodes.items() if node_seconds(node, PROFILE) == 0.0}
    assert {"t", "unsqueeze", "split", "getitem", "x0" if "x0" in nodes else "primals_1"} <= free
    assert {"sin", "cos"}.isdisjoint(free)


def test_attention_counts_two_products_forward_and_five_backward():
    query = _random(1, 2, 16, 8)
    nodes = _nodes(torch_attention, query, query, query)
    forward, backward = (
        next(node for name, node in nodes.items() if "scaled_dot_product" in name and ("backward" in name) == back)
        for back in (False, True)
    )
    product = 2 * (2 * 16 * 16 * 8)
    assert node_seconds(forward, PROFILE) == pytest.approx(0.5 + 2 * product / 1e3)
    assert node_seconds(backward, PROFILE) == pytest.approx(0.5 + 5 * product / 1e3)
    assert is_intensive(forward)


def torch_attention(query, key, value):
    return [torch.nn.functional.scaled_dot_product_attention(query, key, value)]


def test_devices():
    assert profile_of(torch.device("cpu")).launch > 0
    assert profile_of(torch.device("xpu")) == profile_of(torch.device("cuda"))
    assert profile_of(torch.device("cuda")).flops > profile_of(torch.device("cpu")).flops
