"""What nodes launch: one call per operator, everything that a Python function calls, and nothing for views."""

import pytest
import torch
from torch import fx

from bwsk_fx import _torch_private as private
from bwsk_fx.planning.kernels import fake_arguments, fake_mode_of, fill_in_values, kernel_calls, launches_nothing

aten = torch.ops.aten


def _graph(target, *shapes, **kwargs) -> fx.Node:
    """Return a call of `target` on fake tensors of the given shapes, without a value of its own."""
    graph = fx.Graph()
    places = [graph.placeholder(f"x{index}") for index in range(len(shapes))]
    with private.fake_mode():
        for place, shape in zip(places, shapes, strict=True):
            place.meta["val"] = torch.empty(shape)
    return graph.call_function(target, tuple(places), kwargs)


def test_an_operator_is_one_call_with_fake_operands_and_its_result():
    node = _graph(aten.mm.default, (2, 3), (3, 4))
    fill_in_values([node])
    (call,) = kernel_calls(node)
    assert call.target is aten.mm.default
    assert [tuple(tensor.shape) for tensor in call.tensors()] == [(2, 3), (3, 4), (2, 4)]
    assert call.result is node.meta["val"]
    assert all(hasattr(tensor, "fake_mode") for tensor in call.tensors())


def test_a_function_of_tensors_launches_what_it_calls_but_views_and_questions():
    def function(x, scale):
        return (x.to("cpu").t() * scale).exp().t().unsqueeze(0)

    calls = kernel_calls(_graph(function, (2, 3), scale=2.0))
    assert [call.target for call in calls] == [aten.mul.Tensor, aten.exp.default]
    assert tuple(calls[1].result.shape) == (3, 2)


def test_asking_for_a_device_launches_nothing():
    def function(x):
        return torch.zeros(3, device=x.device) + x

    calls = kernel_calls(_graph(function, (3,)))
    assert [call.target for call in calls] == [aten.zeros.default, aten.add.Tensor]


@pytest.mark.parametrize(
    "target",
    [
        aten.view.default,
        aten._unsafe_view.default,
        aten.as_strided.default,
        aten.unbind.int,
        aten.diagonal.default,
        torch.ops.prim.device.default,
        aten.sym_size.int,
    ],
)
def test_views_and_questions_launch_nothing(target):
    assert launches_nothing(target)


@pytest.mark.parametrize("target", [aten.clone.default, aten.add_.Tensor, aten._to_copy.default, torch.add])
def test_whatever_computes_launches(target):
    assert not launches_nothing(target)


def _not_called(*numbers):
    raise AssertionError("a function of numbers launches nothing")


def test_placeholders_outputs_and_functions_of_numbers_launch_nothing():
    node = _graph(aten.exp.default, (3,))
    node.meta["val"] = node.args[0].meta["val"]
    numbers = node.graph.call_function(_not_called, (1, 2))
    output = node.graph.output(node)
    assert [kernel_calls(other) for other in (node.args[0], numbers, output)] == [[], [], []]
    assert len(kernel_calls(node)) == 1


def test_missing_values_are_filled_in_and_others_left():
    first = _graph(aten.exp.default, (2, 3))
    second = first.graph.call_function(aten.t.default, (first,))
    known = first.graph.call_function(aten.exp.default, (second,))
    known.meta["val"] = "known"
    fill_in_values([first, second, known])
    assert tuple(first.meta["val"].shape) == (2, 3)
    assert tuple(second.meta["val"].shape) == (3, 2)
    assert known.meta["val"] == "known"


def test_arguments_are_values_in_place_of_nodes():
    node = _graph(aten.add.Tensor, (3,), (3,), alpha=2)
    args, kwargs = fake_arguments(node)
    assert args == (node.args[0].meta["val"], node.args[1].meta["val"])
    assert kwargs == {"alpha": 2}


def test_the_mode_is_that_of_the_first_fake_tensor():
    node = _graph(aten.exp.default, (3,))
    fake = node.args[0].meta["val"]
    assert fake_mode_of([1.0, torch.ones(2)], {"x": fake}) is fake.fake_mode
    with fake_mode_of([torch.ones(2)]):
        assert not hasattr(torch.ones(2), "fake_mode")
