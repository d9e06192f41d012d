"""The rewritten graph on one device, where every sum has one addend."""

import copy

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import bwsk_fx
from bwsk_fx.errors import PlanError
from bwsk_fx.parallel import full_state_dict, tensor_parallel, tensor_plan
from bwsk_fx.parallel.collectives import RowLinear


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.fixture
def graph(make_vit, make_images):
    return bwsk_fx.capture(make_vit(), make_images())


def _called(graph: torch.fx.GraphModule) -> list[str]:
    return [node.target.__name__ for node in graph.graph.nodes if node.op == "call_function"]


def test_queries_keys_and_values_share_one_sum_of_gradients(graph, mesh):
    local = tensor_parallel(graph, tensor_plan(graph, 1), mesh)
    # One before attention and one before the MLP, in each of two blocks.
    assert _called(local).count("fan_out") == 4


def test_the_graph_that_was_captured_stays_as_it_is(graph, mesh, make_images):
    code, modules, wanted = graph.code, dict(graph.named_modules()), graph(**make_images()).loss
    local = tensor_parallel(graph, tensor_plan(graph, 1), mesh)
    assert graph.code == code
    assert all(modules[name] is module for name, module in graph.named_modules())
    assert isinstance(local.get_submodule("vit.layers.0.mlp.fc2"), RowLinear)
    assert local.get_submodule("vit.layers.0.layernorm_before") is modules["vit.layers.0.layernorm_before"]
    torch.testing.assert_close(local(**make_images()).loss, wanted)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_names_and_order_of_parameters_stay(graph, mesh, sequence_parallel):
    local = tensor_parallel(graph, tensor_plan(graph, 1), mesh, sequence_parallel=sequence_parallel)
    assert list(local.state_dict()) == list(graph.state_dict())
    whole = full_state_dict(bwsk_fx.fuse_regions(local))
    assert all(torch.equal(whole[name], tensor) for name, tensor in graph.state_dict().items())


def test_half_precision_stays_half_precision(mesh):
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
    graph = bwsk_fx.capture(model, torch.randn(2, 4))
    local = tensor_parallel(graph, tensor_plan(graph, 1), mesh)
    with torch.autocast("cpu", torch.bfloat16):
        assert local(torch.randn(2, 4)).dtype is model(torch.randn(2, 4)).dtype is torch.bfloat16


def test_frozen_weights_stay_frozen(make_vit, make_images, mesh):
    model = make_vit()
    model.vit.layers[0].requires_grad_(False)
    graph = bwsk_fx.capture(model, make_images())
    local = tensor_parallel(graph, tensor_plan(graph, 1), mesh)
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert {name: parameter.requires_grad for name, parameter in local.named_parameters()} == wanted


def test_what_does_not_fit_is_refused(graph, mesh):
    plan = tensor_plan(graph, 1)
    with pytest.raises(PlanError, match="made for another graph"):
        tensor_parallel(copy.deepcopy(graph), plan, mesh)
    with pytest.raises(PlanError, match="has no shards"):
        full_state_dict(graph)
    graph.get_submodule("vit.layers.0.mlp.fc1").register_forward_hook(lambda *_: None)
    with pytest.raises(PlanError, match=r"vit\.layers\.0\.mlp\.fc1 carries hooks"):
        tensor_parallel(graph, plan, mesh)
