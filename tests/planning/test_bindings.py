"""Generated code dispatches the operators that it was written with, whatever it calls them by."""

import pytest
import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bwsk_fx.planning import bindings
from bwsk_fx.planning.bindings import bound

aten = torch.ops.aten
MATRIX, VECTOR, BATCH = (2, 2), (2,), (2, 2, 2)

# Per operator, sizes of its tensors, what else it takes by place, and by name.
CALLS = {
    **{op: ((MATRIX, MATRIX), (), {}) for op in (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)},
    **dict.fromkeys((aten.neg.default, aten.exp.default, aten.sqrt.default, aten.rsqrt.default), ((MATRIX,), (), {})),
    **dict.fromkeys((aten.relu.default, aten.sigmoid.default, aten.tanh.default), ((MATRIX,), (), {})),
    **dict.fromkeys((aten.logical_not.default, aten.t.default), ((MATRIX,), (), {})),
    **dict.fromkeys((aten.le.Scalar, aten.gt.Scalar, aten.pow.Tensor_Scalar), ((MATRIX,), (2,), {})),
    aten.mm.default: ((MATRIX, MATRIX), (), {}),
    aten.bmm.default: ((BATCH, BATCH), (), {}),
    aten.addmm.default: ((VECTOR, MATRIX, MATRIX), (), {"beta": 2, "alpha": 3}),
    aten.baddbmm.default: ((BATCH, BATCH, BATCH), (), {"beta": 2, "alpha": 3}),
    aten.view.default: ((MATRIX,), ([4, -1],), {}),
    aten.transpose.int: ((MATRIX,), (0, 1), {}),
    aten.permute.default: ((BATCH,), ([2, 0, 1],), {}),
    aten.expand.default: ((VECTOR,), ([3, 2],), {}),
    aten.unsqueeze.default: ((VECTOR,), (-1,), {}),
    aten.squeeze.dim: (((2, 1),), (1,), {}),
    aten.select.int: ((MATRIX,), (0, 1), {}),
    aten.clone.default: ((MATRIX,), (), {"memory_format": torch.contiguous_format}),
    aten.sum.dim_IntList: ((MATRIX,), ([0], True), {"dtype": torch.float64}),
    aten.mean.dim: ((MATRIX,), ([0], True), {"dtype": torch.float64}),
    aten.gelu.default: ((MATRIX,), (), {"approximate": "tanh"}),
    aten.native_layer_norm.default: ((MATRIX,), ([2], None, None, 1e-5), {}),
    aten.convolution.default: (((1, 2, 4, 4), (2, 1, 3, 3)), (None, [1, 1], [1, 1], [1, 1], False, [0, 0], 2), {}),
    aten._to_copy.default: (
        (MATRIX,),
        (),
        {"dtype": torch.float64, "layout": torch.strided, "device": torch.device("cpu")},
    ),
}


class Calls(TorchDispatchMode):
    """Records what is dispatched, with whatever is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        others = tuple(arg for arg in args if not isinstance(arg, torch.Tensor))
        given = {name: value for name, value in (kwargs or {}).items() if name not in ("layout", "device")}
        self.seen.append((func, others, given))
        return func(*args, **(kwargs or {}))


def dispatched(module, inputs):
    with Calls() as calls, torch.no_grad():
        result = module(*inputs)
    return calls.seen, result


def written(target, *args, **kwargs):
    """Write a module of one call, whose tensors are inputs, and return it with them."""
    graph, inputs = fx.Graph(), []
    operands = []
    for number, arg in enumerate(args):
        if isinstance(arg, torch.Tensor):
            operands.append(graph.placeholder(f"x{number}"))
            operands[-1].meta["val"] = arg
            inputs.append(arg)
        else:
            operands.append(arg)
    graph.output(graph.call_function(target, tuple(operands), kwargs))
    return fx.GraphModule(nn.Module(), graph), inputs


@pytest.mark.parametrize("target", CALLS, ids=str)
def test_the_same_call_is_dispatched(target):
    sizes, others, named = CALLS[target]
    torch.manual_seed(0)
    module, inputs = written(target, *(torch.rand(size) + 0.5 for size in sizes), *others, **named)
    fast = bound(module)
    calls, expected = dispatched(module, inputs)
    found, result = dispatched(fast, inputs)
    assert found == calls
    torch.testing.assert_close(result, expected, rtol=0, atol=0)
    assert f"{target}(" not in fast.code and f"{target}(" in module.code


def test_every_binding_is_tried():
    assert {*bindings._METHODS, *bindings._FUNCTIONS, aten._to_copy.default} == set(CALLS)


@pytest.mark.parametrize(
    ("target", "args", "kwargs"),
    [
        (aten._to_copy.default, (torch.ones(2),), {}),
        (aten._to_copy.default, (torch.ones(2),), {"dtype": torch.float32}),
        (aten._to_copy.default, (torch.ones(2),), {"dtype": torch.float64, "memory_format": torch.contiguous_format}),
        (aten.mul.Tensor, (torch.ones(2), 2), {}),
        (aten.mul.Scalar, (torch.ones(2), 2), {}),
    ],
)
def test_what_python_would_call_otherwise_stays(target, args, kwargs):
    module, inputs = written(target, *args, **kwargs)
    assert f"{target}(" in bound(module).code
    assert bound(module)(*inputs).data_ptr() != inputs[0].data_ptr()


def test_what_is_not_needed_any_more_is_freed():
    graph = fx.Graph()
    first = graph.call_function(aten.exp.default, (graph.placeholder("x"),))
    graph.output(graph.call_function(aten.exp.default, (graph.call_function(aten.exp.default, (first,)),)))
    module = fx.GraphModule(nn.Module(), graph)
    assert "exp_default = None" in bound(module).code
