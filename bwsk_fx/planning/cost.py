"""How long a call takes: the interface of cost models, and the roofline.

The roofline: seconds = launch + max(FLOPs / product rate, bytes / bandwidth, elements / elementwise rate). Williams,
Waterman, Patterson: Roofline, CACM 52(4), 2009. Two terms are added for CPUs: the elementwise rate, for functions such
as GELU and for normalisations, which compute more than they move; and the time in which the operating system provides
memory for large results. The built-in figures are of the right order for each kind of device;
`bwsk_fx.planning.calibration` measures a device's own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from bwsk_fx.planning.kernels import KernelCall, fill_in_values, kernel_calls
from bwsk_fx.rules.inverse import Emit

# Operators that compute more than they move on a CPU. Gradients that are plain products (tanh, sigmoid, softmax) don't.
_FUNCTIONS = frozenset(
    [
        "acos",
        "acosh",
        "asin",
        "asinh",
        "atan",
        "atan2",
        "atanh",
        "cos",
        "cosh",
        "digamma",
        "erf",
        "erfc",
        "erfinv",
        "exp",
        "exp2",
        "expm1",
        "lgamma",
        "log",
        "log10",
        "log1p",
        "log2",
        "logsumexp",
        "pow",
        "sigmoid",
        "sin",
        "sinh",
        "tan",
        "tanh",
        "celu",
        "elu",
        "elu_backward",
        "gelu",
        "gelu_backward",
        "log_sigmoid_backward",
        "log_sigmoid_forward",
        "mish",
        "mish_backward",
        "silu",
        "silu_backward",
        "softplus",
        "softplus_backward",
        "_log_softmax",
        "_softmax",
        "bernoulli",
        "native_dropout",
        "normal",
        "rand",
        "rand_like",
        "randn",
        "randn_like",
        "uniform",
    ]
)
_NORMALIZATION = "_norm"
# The largest block that glibc keeps when it is freed (DEFAULT_MMAP_THRESHOLD_MAX on 64 bits).
KEPT_BLOCK = 32 * 2**20


class CostModel(Protocol):
    """Says how long a node of a planned graph takes on its recorded shapes."""

    def seconds(self, node: fx.Node) -> float:
        """Return the modelled time of one call of `node`, in seconds; 0.0 for views, placeholders and parts."""
        ...


@dataclass(frozen=True)
class DeviceProfile:
    """What a device does per second.

    Attributes:
        products_float32: Matrix products and convolutions, FLOP/s.
        products_bfloat16: The same in bfloat16.
        products_float16: The same in float16.
        attention_float32: Fused attention, FLOP/s.
        attention_bfloat16: The same in bfloat16.
        attention_float16: The same in float16.
        bandwidth: What elementwise work reads and writes, bytes/s.
        functions: Transcendental functions (exp, erf, GELU, softmax, …), elements of the operand/s.
        normalizations: LayerNorm and its like, elements of the operand/s.
        fresh: Memory that large results take from the operating system each time, bytes/s; infinite where the allocator
            keeps what it has.
        launch: Fixed time per operator, seconds.
    """

    products_float32: float
    products_bfloat16: float
    products_float16: float
    attention_float32: float
    attention_bfloat16: float
    attention_float16: float
    bandwidth: float
    functions: float
    normalizations: float
    fresh: float
    launch: float

    def flops(self, work: str, dtype: torch.dtype) -> float:
        """Return the FLOP/s of `products` or `attention` on operands of `dtype`; of float32 for any other dtype."""
        own = dtype if dtype in (torch.bfloat16, torch.float16) else torch.float32
        return getattr(self, f"{work}_{str(own).removeprefix('torch.')}")


@dataclass(frozen=True)
class Roofline:
    """The cost model of a device profile."""

    profile: DeviceProfile

    def seconds(self, node: fx.Node) -> float:
        """Return the sum over the ATen calls that `node` makes."""
        return sum(map(self.call_seconds, kernel_calls(node)))

    def call_seconds(self, call: KernelCall) -> float:
        """Return the modelled time of one ATen call."""
        profile = self.profile
        rate = profile.flops("attention" if _is_attention(call.target) else "products", _dtype(call))
        traffic = sum(tensor.numel() * tensor.element_size() for tensor in call.tensors())
        work = max(flops(call) / rate, traffic / profile.bandwidth, self._elementwise_seconds(call))
        return profile.launch + work + _large_bytes(call) / profile.fresh

    def _elementwise_seconds(self, call: KernelCall) -> float:
        name = _name(call.target)
        if _NORMALIZATION in name:
            return _elements(call) / self.profile.normalizations
        if name in _FUNCTIONS and not _is_square(call):
            return _elements(call) / self.profile.functions
        return 0.0


_PROFILES = {
    "cpu": DeviceProfile(
        products_float32=1e11,
        products_bfloat16=1e11,
        products_float16=1e11,
        attention_float32=1e11,
        attention_bfloat16=1e11,
        attention_float16=1e11,
        bandwidth=1.5e10,
        functions=1.5e9,
        normalizations=1.5e9,
        fresh=4e9,
        launch=5e-6,
    ),
    "cuda": DeviceProfile(
        products_float32=4e13,
        products_bfloat16=4e14,
        products_float16=4e14,
        attention_float32=2e13,
        attention_bfloat16=2e14,
        attention_float16=2e14,
        bandwidth=2e12,
        functions=2e12,
        normalizations=2e12,
        fresh=math.inf,
        launch=4e-6,
    ),
}


def profile_of(device: torch.device) -> DeviceProfile:
    """Return the built-in figures for a kind of device; unknown kinds count as CUDA-like."""
    return _PROFILES.get(device.type, _PROFILES["cuda"])


def is_intensive(node: fx.Node) -> bool:
    """Whether the node is a matrix product, a convolution or attention: work that grows faster than its bytes."""
    return getattr(node.target, "overloadpacket", None) in flop_registry or _is_attention(node.target)


def emitted_seconds(costs: CostModel, emit: Emit, tails: tuple[fx.Node, ...]) -> float:
    """Return the modelled time of what `emit` appends to a graph for `tails`."""
    graph = fx.Graph()
    places = [graph.placeholder(tail.name) for tail in tails]
    for place, tail in zip(places, tails, strict=True):
        place.meta["val"] = tail.meta["val"]
    emit(graph, places)
    fill_in_values(list(graph.nodes))
    return sum(costs.seconds(node) for node in graph.nodes)


def flops(call: KernelCall) -> float:
    """Return the floating-point operations of a matrix product, a convolution or attention; 0.0 of anything else."""
    packet = getattr(call.target, "overloadpacket", None)
    if packet in flop_registry:
        return flop_registry[packet](*call.args, **call.kwargs, out_val=call.result)
    if _is_attention(call.target):
        # Attention on a CPU, which PyTorch's counter does not know.
        backward = "backward" in _name(call.target)
        # (query, key, …), or (gradient, query, key, …) with the gradient as large as the query.
        query, key = _operands(call)[0 : (3 if backward else 2) : (2 if backward else 1)]
        return (5 if backward else 2) * 2.0 * math.prod(query.shape) * key.shape[-2]
    return 0.0


def _is_attention(target: object) -> bool:
    return "scaled_dot_product" in _name(target)


def _is_square(call: KernelCall) -> bool:
    return call.target is torch.ops.aten.pow.Tensor_Scalar and call.args[1] == 2


def _name(target: object) -> str:
    packet = getattr(target, "overloadpacket", None)
    return "" if packet is None else packet.__name__


def _operands(call: KernelCall) -> list[Tensor]:
    return [leaf for leaf in tree_leaves((call.args, dict(call.kwargs))) if isinstance(leaf, Tensor)]


def _large_bytes(call: KernelCall) -> int:
    results = [leaf for leaf in tree_leaves(call.result) if isinstance(leaf, Tensor)]
    sizes = (result.numel() * result.element_size() for result in results)
    return sum(size for size in sizes if size > KEPT_BLOCK)


def _dtype(call: KernelCall) -> torch.dtype:
    return next((operand.dtype for operand in _operands(call)), torch.float32)


def _elements(call: KernelCall) -> int:
    return max((operand.numel() for operand in _operands(call)), default=0)
