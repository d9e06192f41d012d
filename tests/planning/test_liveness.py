"""The modelled peak of a graph, against a count by hand and against the peak of running it."""

import pytest
import torch
from torch import fx

from bwsk_fx._storage_watch import StorageRecorder
from bwsk_fx.planning.kernels import fill_in_values
from bwsk_fx.planning.liveness import peak_bytes

aten = torch.ops.aten
KIB = 1024


def _graph(build) -> fx.Graph:
    graph = fx.Graph()
    operand = graph.placeholder("x")
    with torch._subclasses.FakeTensorMode() as mode:
        operand.meta["val"] = mode.from_tensor(torch.empty(256))
    graph.output(build(graph, operand))
    fill_in_values(list(graph.nodes))
    return graph


def _sin(graph: fx.Graph, node: fx.Node) -> fx.Node:
    return graph.call_function(aten.sin.default, (node,))


def _chain(graph, x):
    return (_sin(graph, _sin(graph, _sin(graph, x))),)


def _fan(graph, x):
    parts = [_sin(graph, x) for _ in range(3)]
    return (graph.call_function(aten.cat.default, (parts,)),)


def _view_keeps_its_base(graph, x):
    first = _sin(graph, x)
    view = graph.call_function(aten.slice.Tensor, (first, 0, 0, 1))
    second = _sin(graph, _sin(graph, x))
    return (graph.call_function(aten.add.Tensor, (view, second)),)


@pytest.mark.parametrize(
    ("build", "kibibytes"),
    # The input beside an operand and a result; three parts and their union; the slice holds all of the first sine.
    [(_chain, 3), (_fan, 7), (_view_keeps_its_base, 4)],
)
def test_against_a_count_by_hand_and_against_a_run(build, kibibytes):
    graph = _graph(build)
    assert peak_bytes(graph) == kibibytes * KIB
    module = fx.GraphModule(torch.nn.Module(), graph)
    with StorageRecorder([]) as recorder:
        result = module(torch.ones(256))
    del result
    assert recorder.recording.peak() == kibibytes * KIB


def test_what_belongs_to_somebody_else_is_not_counted():
    graph = _graph(_chain)
    (x,) = graph.find_nodes(op="placeholder")
    assert peak_bytes(graph, [x]) == 2 * KIB
    assert peak_bytes(_graph(lambda graph, x: (_sin(graph, x),)), []) == 2 * KIB
