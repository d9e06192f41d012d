"""What the backend says about a graph: labels, coordination, plan, and the files of the structured trace."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import bwsk_fx
from bwsk_fx.dynamo_graphs import path_of
from bwsk_fx.report.nodes import source_line


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled_once(model: nn.Module, inputs: dict, **options) -> None:
    torch.compile(model, backend="bwsk_fx", options={"compiler": "eager", **options})(**inputs)


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("L['self']", ""),
        ("L['self'].vit.layers.0.mlp", "vit.layers.0.mlp"),
        ("L['self'].layers[3].mlp", "layers.3.mlp"),
        ("L['self']._modules['vit']._modules['layers']._modules['0']._parameters['weight']", "vit.layers.0.weight"),
        ("L['fn']._modules['0']._buffers['running_mean']", "0.running_mean"),
        ("G['model']._modules['head']", "head"),
        ("vit.layers.0", "vit.layers.0"),
    ],
)
def test_sources_become_paths(source, path):
    assert path_of(source) == path


def test_typed_graphs_are_as_captured_ones(make_vit, make_images):
    model, inputs = make_vit(), make_images()
    compiled_once(model, inputs)
    typed = bwsk_fx.compile.last_report().typed
    assert {name: value.shape for name, value in typed.named_parameters()} == {
        name: value.shape for name, value in model.named_parameters()
    }
    assert [node.target for node in typed.graph.find_nodes(op="placeholder")] == [
        "L_kwargs_pixel_values_",
        "L_kwargs_labels_",
    ]
    captured = bwsk_fx.type_nodes(bwsk_fx.capture(model, inputs))
    ours, theirs = (
        {block.index: (block.s, block.k, block.gray) for block in bwsk_fx.summarize(graph).blocks}
        for graph in (typed, captured)
    )
    assert ours == theirs
    norm = next(node for node in typed.graph.nodes if "layernorm_after" in str(node.all_input_nodes[1:2]))
    assert list(norm.meta["nn_module_stack"])[-1] == "vit.layers.0.layernorm_after"
    assert "modeling_vit.py" in source_line(norm)


def test_the_graph_itself_stays_as_it_is(make_vit, make_images):
    compiled_once(make_vit(), make_images())
    report = bwsk_fx.compile.last_report()
    before = report.graph.code
    assert report.typed is report.typed
    assert report.graph.code == before
    assert not any("bwsk" in node.meta for node in report.graph.graph.nodes)


def test_coordination_is_reported(make_vit, make_images):
    model, inputs = make_vit(), make_images(7)
    compiled_once(model, inputs)
    report = bwsk_fx.compile.last_report()
    expected = bwsk_fx.analyze_calm(bwsk_fx.type_nodes(bwsk_fx.capture(model, inputs)))
    assert not report.calm.unknown
    found, captured = (calm.axis("batch") for calm in (report.calm, expected))
    assert found.counts == captured.counts
    assert len(found.reduces) == len(captured.reduces) == 1


def test_the_joint_graph_of_a_partitioner_is_typed(make_vit, make_images):
    changes = {"custom_partitioner_fn": bwsk_fx.compile.Partitioner(0.1), "force_disable_caches": True}
    with torch._inductor.config.patch(changes), torch.autocast("cpu", torch.bfloat16):
        torch.compile(make_vit(num_hidden_layers=1))(**make_images(7))
    report = bwsk_fx.compile.last_report()
    casts = [node for node in report.typed.graph.nodes if "convert_element_type" in node.name]
    assert {node.meta["bwsk"].label for node in casts} == {"S", "K"}
    assert report.calm.axis("batch").nodes > 0


def test_blocks_are_known_to_the_planner(make_vit, make_images):
    """Its rule on transients goes by blocks."""
    compiled_once(make_vit(), make_images(), budget=0.5)
    nodes = bwsk_fx.compile.last_report().forward.graph.nodes
    stacks = [list(node.meta["nn_module_stack"]) for node in nodes if node.meta.get("nn_module_stack")]
    assert {"vit.layers.0", "vit.layers.1"} <= {path for stack in stacks for path in stack}
    assert not any(path.isdecimal() for stack in stacks for path in stack)


@contextmanager
def structured_trace() -> Iterator[dict[str, str]]:
    """Note the files that are added to the trace, by name."""
    written: dict[str, str] = {}

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            artifact = record.metadata.get("artifact", {})
            if "bwsk_fx" in str(artifact.get("name")):
                written[artifact["name"]] = record.payload

    log, handler = logging.getLogger("torch.__trace"), Handler()
    level = log.level
    log.setLevel(logging.DEBUG)
    log.addHandler(handler)
    try:
        yield written
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def test_the_structured_trace_has_labels_plan_and_halves(make_vit, make_images):
    with structured_trace() as written:
        compiled_once(make_vit(), make_images(), budget=0.2)
    assert written.keys() == {f"bwsk_fx_{part}" for part in ("types", "plan", "forward", "backward")}
    plan = bwsk_fx.compile.last_report().plan
    assert json.loads(written["bwsk_fx_plan"])["kept_bytes"] == plan.kept_bytes
    assert "vit.layers.1.mlp.fc1" in written["bwsk_fx_types"]
    assert "torch.ops.aten" in written["bwsk_fx_backward"]


def test_a_trace_leaves_the_compilation_alone(make_vit, make_images):
    """Labels are found while the graph is compiled, and rules ask fake tensors for numbers."""
    changes = {"custom_partitioner_fn": bwsk_fx.compile.Partitioner(0.2), "force_disable_caches": True}
    model = make_vit()
    model(**make_images())
    with structured_trace() as written, torch._inductor.config.patch(changes):
        torch.compile(model, dynamic=True, fullgraph=True)(**make_images(7))
    assert "bwsk_fx_types" in written
