"""A fused graph beside the one it came from: same keys, same parameters, other nodes."""

import copy

import pytest
import torch
from torch import Tensor, nn

import bwsk_fx
from bwsk_fx.errors import PlanError, RegionError
from bwsk_fx.passes.find_regions import FindRegions
from bwsk_fx.passes.fuse_regions import CONTAINER, FuseRegions, fuse_regions
from bwsk_fx.passes.pipeline import PassPipeline
from bwsk_fx.reversible import ReversibleRegion

GRANULARITIES = ["block", "s-run", "whole"]


@pytest.fixture(scope="module")
def model(make_vit):
    return make_vit()


@pytest.fixture(scope="module")
def graph(model, make_images):
    return bwsk_fx.capture(model, make_images())


def _calls(graph) -> list[str]:
    return [node.target.removeprefix(f"{CONTAINER}.") for node in graph.graph.find_nodes(op="call_module")]


def test_names_of_the_regions(graph):
    assert [name for name in _calls(fuse_regions(graph)) if "." not in name] == [
        "segment_0",
        "vit_layers_0",
        "vit_layers_1",
        "segment_1",
    ]
    assert [*dict(fuse_regions(graph, granularity="whole").get_submodule(CONTAINER).named_children())] == ["whole"]


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_state_dict_and_parameters_stay(model, graph, granularity):
    fused = fuse_regions(graph, granularity=granularity)
    assert list(fused.state_dict()) == list(graph.state_dict()) == list(model.state_dict())
    assert [id(parameter) for parameter in fused.parameters()] == [id(parameter) for parameter in model.parameters()]
    assert [name for name, _ in fused.named_buffers()] == [name for name, _ in graph.named_buffers()]
    assert fused.training and type(fused).__name__ == type(graph).__name__


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_captured_graph_is_left_alone(graph, make_images, train_step, assert_same_bits, granularity):
    code = graph.code
    expected = train_step(graph, make_images())
    fused = fuse_regions(graph, granularity=granularity, faith="exact")
    train_step(fused, make_images())
    assert graph.code == code
    assert_same_bits(train_step(graph, make_images()), expected)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_node_names_stay_where_values_are_read(graph, granularity):
    fused = fuse_regions(graph, granularity=granularity)
    before = {node.name: node for node in graph.graph.nodes}
    after = {node.name: node for node in fused.graph.nodes if CONTAINER not in str(node.target)}
    assert set(after) <= set(before)
    assert [node.name for node in after.values() if node.op == "placeholder"] == ["pixel_values", "labels"]
    for name, node in after.items():
        if isinstance(node.meta.get("val"), Tensor):
            assert node.meta["val"] is before[name].meta["val"]


def test_attributes_are_read_at_each_call(graph):
    """Parameters outside leaf modules are inputs of the regions, so that a replaced one is seen."""
    fused = fuse_regions(graph)
    read = {node.target for node in fused.graph.find_nodes(op="get_attr")}
    assert read == {"vit.embeddings.cls_token", "vit.embeddings.position_embeddings"}
    assert fused.get_submodule(f"{CONTAINER}.segment_0").attributes == 2
    assert not list(fused.get_submodule(CONTAINER).parameters())


def test_no_parameter_is_registered_twice(graph):
    fused = fuse_regions(graph)
    paths = [name for name, _ in fused.named_parameters(remove_duplicate=False)]
    assert len(paths) == len(set(paths)) == len(list(graph.named_parameters(remove_duplicate=False)))
    assert not any(CONTAINER in name for name, _ in fused.named_parameters(remove_duplicate=False))


def test_copies_go_their_own_way(graph, make_images, train_step):
    fused = fuse_regions(graph)
    twin = copy.deepcopy(fused)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    before = [parameter.detach().clone() for parameter in fused.parameters()]
    losses = []
    for _ in range(3):
        losses.append(train_step(twin, make_images())["loss"].item())
        optimizer.step()
    assert losses[2] < losses[0]
    assert all(map(torch.equal, before, fused.parameters()))
    assert not any(map(torch.equal, before, twin.parameters()))
    regions = [module for module in twin.modules() if isinstance(module, ReversibleRegion)]
    assert len(regions) == 4 and all(region.program for region in regions)


def test_a_region_with_no_reader(train_step, assert_same_bits):
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            self.idle(x.exp()).sin()
            return self.used(x).sin()

    torch.manual_seed(0)
    model, x = Idle(), torch.randn(4, 8)
    fused = fuse_regions(bwsk_fx.capture(model, x), faith="exact")
    assert_same_bits(train_step(fused, [x]), train_step(model, [x]))


def test_regions_are_named_in_print(graph):
    region = fuse_regions(graph, 0.25).get_submodule(f"{CONTAINER}.vit_layers_0")
    nodes = len(region.subgraph.graph.nodes)
    assert repr(region) == (f"ReversibleRegion(vit_layers_0, {nodes} nodes, budget=0.25, faith='rounded')")


def test_s_runs_are_labelled_on_the_way(make_vit, make_images):
    graph = bwsk_fx.capture(make_vit(), make_images())
    assert not any("bwsk" in node.meta for node in graph.graph.nodes)
    assert any(name.startswith("s_run_") for name in _calls(fuse_regions(graph, granularity="s-run")))


def test_errors(graph):
    with pytest.raises(PlanError, match="granularity is 'layer'"):
        fuse_regions(graph, granularity="layer")
    with pytest.raises(PlanError, match=r"budget is -1\.0"):
        fuse_regions(graph, -1.0)
    with pytest.raises(PlanError, match="faith is 'best'"):
        fuse_regions(graph, faith="best")


def test_a_graph_without_regions_is_refused():
    single = bwsk_fx.capture(nn.Linear(8, 8), torch.randn(4, 8))
    with pytest.raises(RegionError, match="no node of this graph belongs to a region") as failure:
        fuse_regions(single)
    assert failure.value.__notes__ == ["while pass 'fuse-regions' was running"]
    with pytest.raises(RegionError, match="run FindRegions first"):
        PassPipeline([FuseRegions()])(bwsk_fx.capture(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), torch.randn(4, 8)))


def test_passes_compose(make_vit, make_images, train_step, assert_same_bits):
    graph = bwsk_fx.capture(make_vit(), make_images())
    seen = []
    pipeline = PassPipeline([FindRegions("block"), FuseRegions(faith="exact")], lambda step, _: seen.append(step.name))
    fused = pipeline(graph)
    assert seen == ["find-regions", "fuse-regions"]
    assert_same_bits(train_step(fused, make_images()), train_step(graph, make_images()))
