"""The pipeline runs passes in order and refuses malformed graphs with names."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import fx, nn

import bwsk_fx
from bwsk_fx.passes import Pass, PassError, PassPipeline, PassResult
from bwsk_fx.passes.pipeline import verify


@dataclass(frozen=True)
class _Nothing(Pass):
    name: ClassVar[str] = "nothing"

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        return PassResult(graph_module, False)


@dataclass(frozen=True)
class _ReluToTanh(Pass):
    name: ClassVar[str] = "relu-to-tanh"
    keep_value: bool = True

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        for node in graph_module.graph.find_nodes(op="call_function", target=torch.relu):
            with graph_module.graph.inserting_after(node):
                new = graph_module.graph.call_function(torch.tanh, node.args)
            if self.keep_value:
                new.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(new)
            graph_module.graph.erase_node(node)
        return PassResult(graph_module, True)


@dataclass(frozen=True)
class _Raises(Pass):
    name: ClassVar[str] = "raises"

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        raise ValueError("broken")


@dataclass(frozen=True)
class _ReturnsNothing(Pass):
    name: ClassVar[str] = "returns-nothing"

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        return None  # type: ignore[return-value]


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.linear(x))


@pytest.fixture
def graph_module() -> fx.GraphModule:
    return bwsk_fx.capture(_Model(), torch.randn(2, 3))


def test_a_modified_graph_is_recompiled(graph_module):
    x = torch.randn(4, 3)
    linear = graph_module.linear
    result = PassPipeline([_Nothing(), _ReluToTanh()])(graph_module)
    assert torch.equal(result(x), torch.tanh(linear(x)))


def test_the_callback_sees_each_pass_with_its_graph(graph_module):
    seen = []
    PassPipeline([_Nothing(), _ReluToTanh()], lambda step, graph: seen.append((step.name, "tanh" in graph.code)))(
        graph_module
    )
    assert seen == [("nothing", False), ("relu-to-tanh", True)]


def test_a_pass_that_drops_values_is_named_with_its_node(graph_module):
    pipeline = PassPipeline([_Nothing(), _ReluToTanh(keep_value=False)])
    with pytest.raises(PassError, match=r"after pass 'relu-to-tanh': node 'tanh' .* has no meta\['val'\]"):
        pipeline(graph_module)


def test_a_graph_malformed_before_the_first_pass_is_not_blamed_on_it(graph_module):
    del next(iter(graph_module.graph.nodes)).meta["val"]
    with pytest.raises(PassError, match="before pass 'nothing': node 'x'"):
        PassPipeline([_Nothing()])(graph_module)


def test_an_exception_keeps_its_type_and_names_the_pass(graph_module):
    with pytest.raises(ValueError, match="broken") as caught:
        PassPipeline([_Raises()])(graph_module)
    assert caught.value.__notes__ == ["while pass 'raises' was running"]


def test_a_pass_must_return_a_result(graph_module):
    with pytest.raises(PassError, match="'returns-nothing' returned a NoneType"):
        PassPipeline([_ReturnsNothing()])(graph_module)


def test_options_are_fields_that_cannot_change():
    step = _ReluToTanh()
    with pytest.raises(AttributeError):
        step.keep_value = False
    assert step == _ReluToTanh(True)


def test_verify_refuses_what_lint_refuses(graph_module):
    linear = next(node for node in graph_module.graph.nodes if node.op == "call_module")
    linear.target = "gone"
    with pytest.raises(PassError, match=r"in this graph: .*gone"):
        verify(graph_module)


def test_verify_refuses_a_missing_or_early_output(graph_module):
    output = graph_module.graph.output_node()
    value = output.args[0]
    graph_module.graph.erase_node(output)
    with pytest.raises(PassError, match="no output node"):
        verify(graph_module)
    graph_module.graph.output(value)
    graph_module.graph.call_function(torch.relu, (value,)).meta["val"] = value.meta["val"]
    with pytest.raises(PassError, match="comes after the output node"):
        verify(graph_module)


def test_verify_refuses_a_late_placeholder(graph_module):
    with graph_module.graph.inserting_before(graph_module.graph.output_node()):
        late = graph_module.graph.placeholder("late")
    late.meta["val"] = torch.empty(2)
    with pytest.raises(PassError, match=r"node 'late' .* placeholders come first"):
        verify(graph_module)
