"""Roofline cost of a node: seconds = launch + max(FLOPs / peak, bytes / bandwidth).

Williams, Waterman, Patterson: Roofline, CACM 52(4), 2009. The figures are of the right order for each kind of device;
only their ratios matter to a plan.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import fx
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import flop_registry

from bwsk_fx.planning.joint import nbytes
from bwsk_fx.planning.views import is_view

_HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class DeviceProfile:
    """What a device does per second.

    Attributes:
        flops: Matrix product rate in float32, FLOP/s.
        half_flops: The same in bfloat16 and float16.
        bandwidth: Memory traffic, bytes/s.
        launch: Fixed time per operator, seconds.
    """

    flops: float
    half_flops: float
    bandwidth: float
    launch: float


_PROFILES = {
    "cpu": DeviceProfile(flops=1e11, half_flops=1e11, bandwidth=1.5e10, launch=5e-6),
    "cuda": DeviceProfile(flops=4e13, half_flops=4e14, bandwidth=2e12, launch=4e-6),
}


def profile_of(device: torch.device) -> DeviceProfile:
    """Return the roofline figures for a kind of device; unknown kinds count as CUDA-like."""
    return _PROFILES.get(device.type, _PROFILES["cuda"])


def is_intensive(node: fx.Node) -> bool:
    """Whether the node is a matrix product, a convolution or attention: work that grows faster than its bytes."""
    packet = getattr(node.target, "overloadpacket", None)
    return packet in flop_registry or "scaled_dot_product" in str(packet)


def node_seconds(node: fx.Node, profile: DeviceProfile) -> float:
    """Return the modelled time of one call on its recorded shapes."""
    if node.op != "call_function" or is_view(node) or not hasattr(node.target, "overloadpacket"):
        return 0.0
    rate = profile.half_flops if _is_half(node) else profile.flops
    return profile.launch + max(_flops(node) / rate, _traffic(node) / profile.bandwidth)


def pointwise_seconds(values: list[fx.Node], profile: DeviceProfile) -> float:
    """Return the modelled time of one pass that reads and writes `values`."""
    return profile.launch + sum(map(nbytes, values)) / profile.bandwidth


def _flops(node: fx.Node) -> float:
    packet = node.target.overloadpacket  # type: ignore[union-attr]
    if packet in flop_registry:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda operand: operand.meta["val"])
        return flop_registry[packet](*args, **kwargs, out_val=node.meta["val"])
    if "scaled_dot_product" in str(packet):
        shapes = [operand.meta["val"].shape for operand in node.all_input_nodes[:3]]
        products = 5 if "backward" in str(packet) else 2
        return products * 2.0 * math.prod(shapes[0]) * shapes[1][-2]
    return 0.0


def _traffic(node: fx.Node) -> int:
    written = sum(
        leaf.numel() * leaf.element_size()
        for leaf in pytree.tree_leaves(node.meta.get("val"))
        if isinstance(leaf, torch.Tensor)
    )
    return written + sum(map(nbytes, node.all_input_nodes))


def _is_half(node: fx.Node) -> bool:
    first = next((value for value in node.all_input_nodes if isinstance(value.meta.get("val"), torch.Tensor)), None)
    return first is not None and first.meta["val"].dtype in _HALVES
