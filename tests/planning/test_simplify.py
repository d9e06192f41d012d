"""What the backward pass does not use, it does not read; all gradients keep their bits."""

import operator
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from bwsk_fx import _torch_private as private
from bwsk_fx.planning.simplify import drop_no_ops, forget_state_updates, read_less

aten = torch.ops.aten
BF16, FP16 = torch.bfloat16, torch.float16
NAN, INF = float("nan"), float("inf")


def _traced(function: Callable, *tensors: Tensor) -> fx.Graph:
    inputs = [tensor.detach().requires_grad_() for tensor in tensors]
    return private.trace_joint(lambda *args: [function(*args)], inputs).graph


def _simplified(function: Callable, *tensors: Tensor) -> fx.Graph:
    graph = _traced(function, *tensors)
    drop_no_ops(graph)
    graph = private.merge_common_subexpressions(graph)
    read_less(graph)
    graph.lint()
    return graph


def _run(graph: fx.Graph, *args: Tensor) -> list[Tensor]:
    results = fx.Interpreter(fx.GraphModule(nn.Module(), graph)).run(*args)
    return torch.utils._pytree.tree_leaves(results)


def _calls(graph: fx.Graph) -> set[str]:
    return {str(node.target).removeprefix("aten.") for node in graph.nodes if node.op == "call_function"}


def _operand(graph: fx.Graph, target: torch._ops.OpOverload) -> fx.Node:
    """Return what a backward call reads besides the gradient."""
    (node,) = graph.find_nodes(op="call_function", target=target)
    return node.args[1]


def _read(graph: fx.Graph) -> set[str]:
    """Name the forward values of which the backward pass reads, other than weights and empty tensors."""
    backward = {node for node in graph.nodes if node.op == "placeholder" and "tangents" in node.target}
    found = set()
    for node in graph.nodes:
        if node.op == "call_function" and not backward.isdisjoint(node.all_input_nodes):
            backward.add(node)
            found |= set(node.all_input_nodes) - backward
    return {node.name for node in found if node.op == "call_function" and "empty_strided" not in node.name}


def _same_bits(function: Callable, *tensors: Tensor) -> None:
    """Compare the simplified graph with the traced one, on values and gradients with everything unusual among them."""
    before, after = _traced(function, *tensors), _simplified(function, *tensors)
    tangents = [node.meta["val"] for node in before.nodes if node.op == "placeholder" and "tangents" in node.target]
    given = [_unusual(value.shape, value.dtype, seed) for seed, value in enumerate(tangents)]
    expected, found = _run(before, *tensors, *given), _run(after, *tensors, *given)
    for one, other in zip(found, expected, strict=True):
        assert one.stride() == other.stride()
        assert torch.equal(_bits(one), _bits(other))


def _bits(value: Tensor) -> Tensor:
    # What is in a NaN depends on where in memory it is computed.
    value = value.masked_fill(value.isnan(), NAN)
    return value.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[value.element_size()])


def _unusual(shape, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    value = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    odd = torch.tensor([NAN, INF, -INF, 0.0, -0.0, 1.0, -1.0, 0.5, 6.0, 1e-30, -1e-30]).to(dtype)
    flat = value.view(-1)
    # Some in the part that vectorised kernels take, some in the rest.
    for start in (3, flat.numel() - 5):
        count = min(len(odd), flat.numel() - start)
        flat[start : start + count] = odd[:count]
    return value


BRANCHES = {
    "relu": lambda x: F.relu(x),
    "relu in place": lambda x: F.relu(x * 1.0, inplace=True),
    "threshold": lambda x: F.threshold(x, 0.5, 20.0),
    "threshold that rounds": lambda x: F.threshold(x, 0.1, 20.0),
    "leaky relu": lambda x: F.leaky_relu(x, 0.2),
    "leaky relu in place": lambda x: F.leaky_relu(x * 1.0, 0.2, inplace=True),
    "folding relu": lambda x: F.leaky_relu(x, -0.2),
    "hardtanh": lambda x: F.hardtanh(x),
    "relu6": lambda x: F.relu6(x),
    "hardtanh that rounds": lambda x: F.hardtanh(x, -0.1, 0.3),
}


@pytest.mark.parametrize("dtype", [torch.float32, BF16, FP16, torch.float64])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "parts"])
@pytest.mark.parametrize("then", ["read", "unread"])
@pytest.mark.parametrize("name", BRANCHES)
def test_branches_keep_their_bits(name, then, layout, dtype):
    """`then`: whether another operator of the backward pass reads the result, too."""
    value = _unusual((9, 11), dtype)
    value = {"contiguous": value, "transposed": value.t(), "parts": value[:, ::2]}[layout]

    def function(x: Tensor) -> Tensor:
        y = BRANCHES[name](x)
        return y * y if then == "read" else y * 2.0

    _same_bits(function, value)


@pytest.mark.parametrize("name", ["relu", "relu in place", "threshold", "leaky relu", "leaky relu in place"])
def test_a_branch_is_read_as_a_mask(name):
    graph = _simplified(lambda x: BRANCHES[name](x) * 2.0, _unusual((4, 8)))
    masks = [node for node in graph.nodes if node.name in _read(graph)]
    assert [mask.meta["val"].dtype for mask in masks] == [torch.bool]
    assert masks[0].meta["val"].shape == (4, 8)


def test_nan_passes_relu():
    graph = _simplified(lambda x: F.relu(x) * 1.0, _unusual((4, 8)))
    x = torch.full((4, 8), NAN)
    _, gradient = _run(graph, x, torch.ones(4, 8))
    assert torch.equal(gradient, torch.ones(4, 8))


def test_a_threshold_that_the_dtype_lacks_is_left_to_the_kernel():
    for dtype in (torch.float32, BF16):
        graph = _simplified(lambda x: F.threshold(x, 0.1, 20.0) * 2.0, _unusual((4, 8), dtype))
        assert "le.Scalar" not in _calls(graph)
    assert "le.Scalar" in _calls(
        _simplified(lambda x: F.threshold(x, 0.1, 20.0) * 2.0, _unusual((4, 8), torch.float64))
    )


def test_what_is_read_in_full_anyway_needs_no_mask():
    graph = _simplified(lambda x, w: F.relu(x @ w) @ w, torch.randn(4, 4), torch.randn(4, 4))
    assert _operand(graph, aten.threshold_backward.default).target is aten.relu.default
    assert "le.Scalar" not in _calls(graph)


@pytest.mark.parametrize(
    ("function", "backward", "forward"),
    [
        (F.leaky_relu, aten.leaky_relu_backward.default, aten.leaky_relu.default),
        (F.relu6, aten.hardtanh_backward.default, aten.hardtanh.default),
        (F.hardtanh, aten.hardtanh_backward.default, aten.hardtanh.default),
    ],
)
def test_a_result_that_is_read_anyway_says_the_branch(function, backward, forward):
    weights = torch.randn(4, 4), torch.randn(4, 4)
    graph = _simplified(lambda x, w: function(x @ w) @ w, *weights)
    assert _operand(graph, backward).target is forward
    # Where nothing else reads the result, leaky ReLU has its mask and hardtanh keeps its operand.
    graph = _simplified(lambda x, w: function(x @ w) + x, *weights)
    assert _operand(graph, backward).target is (aten.gt.Scalar if function is F.leaky_relu else aten.mm.default)


@pytest.mark.parametrize("slope", [-0.2, -1e-30])
def test_a_folded_result_does_not_say_the_branch(slope):
    graph = _simplified(lambda x, w: F.leaky_relu(x @ w, slope) @ w, torch.randn(4, 4), torch.randn(4, 4))
    assert _operand(graph, aten.leaky_relu_backward.default).target is aten.gt.Scalar


def test_limits_that_the_dtype_lacks_do_not_say_the_branch():
    def function(x: Tensor, w: Tensor) -> Tensor:
        return F.hardtanh(x @ w, -0.1, 0.3) @ w

    graph = _simplified(function, torch.randn(4, 4).to(BF16), torch.randn(4, 4).to(BF16))
    assert _operand(graph, aten.hardtanh_backward.default).target is aten.mm.default


POOLS = {
    "max": (2, lambda x: F.max_pool2d(x, 2), aten.max_pool2d_with_indices_backward.default),
    "max 3d": (3, lambda x: F.max_pool3d(x, 2), aten.max_pool3d_with_indices_backward.default),
    "max 1d": (1, lambda x: F.max_pool1d(x, 2), aten.max_pool2d_with_indices_backward.default),
    "adaptive max": (2, lambda x: F.adaptive_max_pool2d(x, 2), aten.adaptive_max_pool2d_backward.default),
    "adaptive max 3d": (3, lambda x: F.adaptive_max_pool3d(x, 2), aten.adaptive_max_pool3d_backward.default),
    "mean": (2, lambda x: F.avg_pool2d(x, 2), aten.avg_pool2d_backward.default),
    "mean 3d": (3, lambda x: F.avg_pool3d(x, 2), aten.avg_pool3d_backward.default),
    "adaptive mean": (2, lambda x: F.adaptive_avg_pool2d(x, 2), aten._adaptive_avg_pool2d_backward.default),
    "adaptive mean 3d": (3, lambda x: F.adaptive_avg_pool3d(x, 2), aten._adaptive_avg_pool3d_backward.default),
}


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", POOLS)
def test_pooling_reads_the_shape_of_its_operand_alone(name, channels_last, dtype):
    dims, pool, backward = POOLS[name]
    if name == "mean 3d" and dtype is BF16:
        pytest.skip("PyTorch has no such operator on CPUs")
    value = torch.randn(2, 3, *[7] * dims).to(dtype)
    if channels_last and dims > 1:
        value = value.to(memory_format=torch.channels_last if dims == 2 else torch.channels_last_3d)

    def function(x: Tensor) -> Tensor:
        return pool(x.sin()) * 2.0

    graph = _simplified(function, value)
    empty = _operand(graph, backward)
    assert empty.target is aten.empty_strided.default
    assert "sin" not in _read(graph)
    _same_bits(function, value)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("frozen", ["input", "weight", None])
def test_convolutions_read_the_shape_of_what_serves_no_gradient(frozen, dtype, channels_last):
    values = {"input": torch.randn(2, 3, 8, 8, dtype=dtype), "weight": torch.randn(4, 3, 3, 3, dtype=dtype)}
    if channels_last:
        values = {name: value.to(memory_format=torch.channels_last) for name, value in values.items()}
    inputs = [value.requires_grad_(name != frozen) for name, value in values.items()]
    graphs = [private.trace_joint(lambda x, w: [F.conv2d(x.sin(), w.cos(), padding=1)], inputs).graph for _ in range(2)]
    read_less(graphs[1])
    (call,) = graphs[1].find_nodes(op="call_function", target=aten.convolution_backward.default)
    empty = {place for place in (1, 2) if call.args[place].target is aten.empty_strided.default}
    assert empty == {"input": {2}, "weight": {1}, None: set()}[frozen]
    given = [*(value.detach() for value in inputs), torch.randn(2, 4, 8, 8).to(dtype)]
    for found, expected in zip(*(_run(graph, *given) for graph in reversed(graphs)), strict=True):
        assert found is expected is None or torch.equal(found, expected)


def test_pooling_reads_what_is_there_anyway():
    graph = _simplified(lambda x: F.avg_pool2d(x.sigmoid(), 2), torch.randn(1, 1, 4, 4))
    assert _operand(graph, aten.avg_pool2d_backward.default).target is aten.sigmoid.default


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_a_stem_reads_one_mask_and_indices(dtype):
    def function(x: Tensor, weight: Tensor) -> Tensor:
        return F.max_pool2d(F.relu(F.conv2d(x, weight)), 3, 2, 1)

    tensors = torch.randn(2, 3, 9, 9).to(dtype), torch.randn(4, 3, 2, 2).to(dtype)
    graph = _simplified(function, *tensors)
    kinds = {node.meta["val"].dtype for node in graph.nodes if node.name in _read(graph)}
    assert kinds == {torch.bool, torch.int64}
    _same_bits(function, *tensors)


def test_views_of_a_value_count_as_the_value():
    """The transposed result is read by the gradient of the second factor."""
    graph = _simplified(lambda x, w: w @ F.relu(x @ w).t(), torch.randn(4, 4), torch.randn(4, 4))
    assert "le.Scalar" not in _calls(graph)


@pytest.mark.parametrize(
    ("function", "dropped"),
    [
        (lambda x: x.sin().narrow(1, 0, 8).cos(), aten.slice.Tensor),
        (lambda x: x.sin().expand(4, 8).cos(), aten.expand.default),
    ],
)
def test_a_view_of_everything_is_dropped(function, dropped):
    value = torch.randn(4, 8)
    assert str(dropped).removeprefix("aten.") in _calls(_traced(function, value))
    assert str(dropped).removeprefix("aten.") not in _calls(_simplified(function, value))
    _same_bits(function, value)


def test_a_power_of_one_is_dropped():
    """The gradient of a square is written with one, RMSNorm's among them."""

    def function(x: Tensor) -> Tensor:
        return F.rms_norm(x, (8,))

    def exponents(graph: fx.Graph) -> set[float]:
        return {node.args[1] for node in graph.find_nodes(op="call_function", target=aten.pow.Tensor_Scalar)}

    value = torch.randn(4, 8)
    assert exponents(_traced(function, value)) == {1, 2, 3}
    assert exponents(_simplified(function, value)) == {2, 3}
    _same_bits(function, value)


def test_part_of_a_tensor_stays():
    assert "slice.Tensor" in _calls(_simplified(lambda x: x.sin()[:, 1:].cos(), torch.randn(4, 8)))


def test_assertions_of_the_trace_are_dropped():
    def function(x: Tensor) -> Tensor:
        return x.sin().to(torch.float32) * 2.0

    assert "_assert_tensor_metadata.default" in _calls(_traced(function, torch.randn(4)))
    assert "_assert_tensor_metadata.default" not in _calls(_simplified(function, torch.randn(4)))


@pytest.mark.parametrize("train", [True, False])
def test_batch_norms_running_statistics_are_read_in_eval_mode_alone(train):
    def norm(x, w, mean, deviation):
        return aten.native_batch_norm(x, w, w, mean.detach() + 0, deviation.detach() + 0, train, 0.1, 1e-5)[0]

    graph = _simplified(norm, torch.randn(4, 3, 2), torch.randn(3), torch.zeros(3), torch.ones(3))
    (backward,) = graph.find_nodes(op="call_function", target=aten.native_batch_norm_backward.default)
    assert [argument is None for argument in backward.args[3:5]] == [train, train]


def test_batch_norms_that_run_again_update_nothing():
    graph = fx.Graph()
    operands = [graph.placeholder(name) for name in ("x", "weight", "mean", "deviation")]
    x, weight, mean, deviation = operands
    norm = graph.call_function(
        aten._native_batch_norm_legit_functional.default, (x, weight, None, mean, deviation, True, 0.1, 1e-5)
    )
    norm.meta["val"] = (torch.zeros(4, 3, 2), *(torch.zeros(3) for _ in range(4)))
    graph.output(tuple(graph.call_function(operator.getitem, (norm, place)) for place in range(3)))
    inputs = torch.randn(4, 3, 2), torch.randn(3), torch.zeros(3), torch.ones(3)
    expected = _run(graph, *inputs)
    forget_state_updates(graph)
    assert not mean.users and not deviation.users
    assert all(map(torch.equal, _run(graph, *inputs), expected))
