"""How long a call takes: the interface of cost models, and the roofline.

The roofline: seconds = launch + max(FLOPs / product rate, bytes / bandwidth, elements / elementwise rate). Williams,
Waterman, Patterson: Roofline, CACM 52(4), 2009. The last term is for functions such as GELU and for normalisations,
which a CPU is too slow at for its memory to be the limit. The built-in figures are of the right order for each kind of
device; `bwsk_fx.planning.calibration` measures a device's own.
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
    "acos acosh asin asinh atan atan2 atanh cos cosh digamma erf erfc erfinv exp exp2 expm1 lgamma log log10 log1p log2 "
    "logsumexp pow sigmoid sin sinh tan tanh "
    "celu elu elu_backward gelu gelu_backward log_sigmoid_backward log_sigmoid_forward mish mish_backward silu "
    "silu_backward softplus softplus_backward _log_softmax _softmax "
    "bernoulli native_dropout normal rand rand_like randn randn_like uniform".split()
)
_NORMALIZATION = "_norm"


class CostModel(Protocol):
    """Says how long a node of a planned graph takes on its recorded shapes."""

    def seconds(self, node: fx.Node) -> float:
        """Return the modelled time of one call of `node`, in seconds; 0.0 for views, placeholders and parts."""
        ...


@dataclass(frozen=True)
class Rates:
    """FLOP/s by the dtype of the operands.

    Attributes:
        float32: In float32, and in every dtype that has no figure of its own.
        bfloat16: In bfloat16.
        float16: In float16.
    """

    float32: float
    bfloat16: float
    float16: float

    def of(self, dtype: torch.dtype) -> float:
        """Return the rate for operands of `dtype`."""
        return {torch.bfloat16: self.bfloat16, torch.float16: self.float16}.get(dtype, self.float32)


@dataclass(frozen=True)
class DeviceProfile:
    """What a device does per second.

    Attributes:
        products: Matrix products and convolutions, FLOP/s.
        attention: Fused attention, forward and backward, FLOP/s.
        bandwidth: What elementwise work reads and writes, bytes/s.
        functions: Transcendental functions (exp, erf, GELU, softmax, …), elements of the operand/s.
        normalizations: LayerNorm and its like, elements of the operand/s.
        launch: Fixed time per operator, seconds.
    """

    products: Rates
    attention: Rates
    bandwidth: float
    functions: float
    normalizations: float
    launch: float


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
        rates = profile.attention if _is_attention(call.target) else profile.products
        traffic = sum(tensor.numel() * tensor.element_size() for tensor in call.tensors())
        compute = flops(call) / rates.of(_dtype(call))
        return profile.launch + max(compute, traffic / profile.bandwidth, self._elementwise_seconds(call))

    def _elementwise_seconds(self, call: KernelCall) -> float:
        name = _name(call.target)
        if _NORMALIZATION in name:
            return _elements(call) / self.profile.normalizations
        if name in _FUNCTIONS and not _is_square(call):
            return _elements(call) / self.profile.functions
        return 0.0


_PROFILES = {
    "cpu": DeviceProfile(
        products=Rates(float32=1e11, bfloat16=1e11, float16=1e11),
        attention=Rates(float32=1e11, bfloat16=1e11, float16=1e11),
        bandwidth=1.5e10,
        functions=1.5e9,
        normalizations=1.5e9,
        launch=5e-6,
    ),
    "cuda": DeviceProfile(
        products=Rates(float32=4e13, bfloat16=4e14, float16=4e14),
        attention=Rates(float32=2e13, bfloat16=2e14, float16=2e14),
        bandwidth=2e12,
        functions=5e11,
        normalizations=5e11,
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


def _dtype(call: KernelCall) -> torch.dtype:
    return next((operand.dtype for operand in _operands(call)), torch.float32)


def _elements(call: KernelCall) -> int:
    return max((operand.numel() for operand in _operands(call)), default=0)
