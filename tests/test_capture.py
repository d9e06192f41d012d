"""Capture against the model itself: same outputs and gradients bit for bit, and a graph that people can read."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

import bwsk_fx
from bwsk_fx.errors import CaptureError

transformers = pytest.importorskip("transformers")

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 16,
    "patch_size": 4,
    "num_labels": 5,
}
DROPOUT = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.2}


def _vit(seed: int = 0, **changes) -> nn.Module:
    torch.manual_seed(seed)
    attention = changes.pop("attn_implementation", "sdpa")
    config = transformers.ViTConfig(**(SMALL | changes), attn_implementation=attention)
    return transformers.ViTForImageClassification(config).train()


def _batch(size: int, classes: int = 5, pixels: int = 16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(size)
    return {
        "pixel_values": torch.randn(size, 3, pixels, pixels, generator=generator),
        "labels": torch.randint(classes, (size,), generator=generator),
    }


def _step(model: nn.Module, batch: dict[str, torch.Tensor], bf16: bool = False):
    """One seeded forward and backward pass: outputs by name, gradients by parameter name."""
    model.zero_grad()
    torch.manual_seed(7)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        outputs = model(**batch)
    outputs["loss"].backward()
    return dict(outputs), {name: parameter.grad for name, parameter in model.named_parameters()}


def _assert_same_bits(left: dict, right: dict) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert (tensor is None) == (right[name] is None), name
        assert tensor is None or (tensor.dtype == right[name].dtype and torch.equal(tensor, right[name])), name


def _assert_same_step(model: nn.Module, graph: nn.Module, batch: dict[str, torch.Tensor], **options) -> None:
    for eager, captured in zip(_step(model, batch, **options), _step(graph, batch, **options), strict=True):
        assert eager
        _assert_same_bits(eager, captured)


def _leaves(graph: torch.fx.GraphModule) -> list[str]:
    return [node.target for node in graph.graph.find_nodes(op="call_module")]


@pytest.fixture(scope="module")
def base():
    """ViT-base as the study counted it, on fake weights: nothing is computed, so nothing needs to be drawn."""
    with torch.device("meta"):
        model = transformers.ViTForImageClassification(transformers.ViTConfig())
    inputs = {"pixel_values": torch.empty(2, 3, 224, 224, device="meta")}
    return model, bwsk_fx.capture(model.train(), inputs)


def test_vit_base_has_136_leaf_module_calls(base):
    model, graph = base
    leaves = _leaves(graph)
    assert len(leaves) == 136
    calls = Counter(type(model.get_submodule(path)).__name__ for path in leaves)
    assert (calls["Linear"], calls["LayerNorm"], calls["Dropout"], calls["Conv2d"]) == (73, 25, 25, 1)
    # One Dropout of each of the 12 layers is called twice.
    assert sorted(Counter(leaves).values()) == [1] * 112 + [2] * 12


def test_targets_are_the_models_own_modules(base):
    model, graph = base
    modules = dict(model.named_modules())
    for path in _leaves(graph):
        assert graph.get_submodule(path) is modules[path]
    assert list(dict(graph.named_modules())) == list(modules)


class UsedInAnotherOrder(nn.Module):
    """As T5: the shared embedding is defined first, and called under another name first."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.norm = nn.Embedding(5, 4), nn.LayerNorm(4)
        self.encoder = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4))
        self.encoder[0].weight = self.shared.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.norm(self.encoder(tokens) @ self.shared.weight.T @ self.shared(tokens))


def test_parameters_keep_their_order_and_their_first_names():
    model = UsedInAnotherOrder()
    graph = bwsk_fx.capture(model, torch.zeros(2, 5, dtype=torch.long))
    for candidate in (graph, bwsk_fx.fuse_regions(graph, granularity="whole")):
        assert [name for name, _ in candidate.named_parameters()] == [name for name, _ in model.named_parameters()]
        assert list(candidate.state_dict()) == list(model.state_dict())


def test_state_is_shared_and_keeps_its_names():
    model = _vit()
    graph = bwsk_fx.capture(model, _batch(2))
    assert list(graph.state_dict()) == list(model.state_dict())
    shared = dict(graph.named_parameters())
    assert list(shared) == [name for name, _ in model.named_parameters()]
    for name, parameter in model.named_parameters():
        assert shared[name] is parameter


@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_tensor_node_has_a_fake_value_with_a_symbolic_batch(batch_size):
    model = _vit()
    graph = bwsk_fx.capture(model, _batch(batch_size))
    symbol = graph.graph.find_nodes(op="placeholder")[0].meta["val"].shape[0]
    assert isinstance(symbol, torch.SymInt)
    kinds = Counter()
    for node in graph.graph.nodes:
        value = node.meta["val"]
        tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
        assert all(type(tensor).__name__ == "FakeTensor" for tensor in tensors), node
        kinds[node.op] += bool(tensors)
        if node.op == "call_module":
            assert value.shape[0] == symbol, node
    assert kinds["call_module"] == 26
    assert kinds["placeholder"] == 2
    assert kinds["get_attr"] == 2


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_outputs_and_gradients_are_bit_identical_at_every_batch_size(attention, bf16):
    model = _vit(attn_implementation=attention)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        graph = bwsk_fx.capture(model, _batch(3))
    for size in (3, 5, 1):
        _assert_same_step(model, graph, _batch(size), bf16=bf16)


def test_a_graph_captured_from_one_sample_holds_for_more():
    model = _vit()
    graph = bwsk_fx.capture(model, _batch(1))
    for size in (1, 4):
        _assert_same_step(model, graph, _batch(size))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_dropout_stays_and_draws_the_same_numbers(attention):
    model = _vit(attn_implementation=attention, **DROPOUT)
    graph = bwsk_fx.capture(model, _batch(3))
    for size in (3, 4):
        _assert_same_step(model, graph, _batch(size))
    outputs, _ = _step(graph, _batch(3))
    torch.manual_seed(8)
    assert not torch.equal(graph(**_batch(3))["logits"], outputs["logits"])


def test_a_cast_to_an_activations_dtype_binds_the_graph_to_the_autocast_state():
    # Eager attention casts its probabilities to `query.dtype`.
    model = _vit(attn_implementation="eager", **DROPOUT)
    graph = bwsk_fx.capture(model, _batch(2))
    message = (
        r"captured under autocast cpu off and is run under cpu bfloat16.*capture it again inside the autocast block"
    )
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(CaptureError, match=message):
        graph(**_batch(2))
    with torch.autocast("cpu", torch.bfloat16):
        graph = bwsk_fx.capture(model, _batch(2))
    _assert_same_step(model, graph, _batch(2), bf16=True)


def test_autocast_around_a_capture_is_not_part_of_the_graph():
    model = _vit()
    with torch.autocast("cpu", torch.bfloat16):
        graph = bwsk_fx.capture(model, _batch(2))
    assert str(graph.code) == str(bwsk_fx.capture(model, _batch(2)).code)
    _assert_same_step(model, graph, _batch(2))


def test_the_loss_is_there_when_labels_are():
    model, batch = _vit(), _batch(2)
    assert set(bwsk_fx.capture(model, batch)(**batch)) == {"loss", "logits"}
    without = bwsk_fx.capture(model, {"pixel_values": batch["pixel_values"]})
    result = without(batch["pixel_values"])
    assert type(result) is type(model(batch["pixel_values"]))
    assert set(result) == {"logits"}
    assert [node.target for node in without.graph.find_nodes(op="placeholder")] == ["pixel_values"]


def test_capture_leaves_no_trace():
    model = _vit(**DROPOUT)
    model.vit.eval()
    flags = [module.training for module in model.modules()]
    state = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    attributes = [set(vars(module)) for module in model.modules()]
    random = torch.get_rng_state()
    bwsk_fx.capture(model, _batch(2))
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == flags
    assert [set(vars(module)) for module in model.modules()] == attributes
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert tensor is state[name][0]
        assert torch.equal(tensor, state[name][1])
    assert all(parameter.grad is None for parameter in model.parameters())
    assert type(nn.Module.__call__).__name__ == "function" and nn.Module.__call__.__module__.startswith("torch.")


def test_lines_are_those_of_the_models_source():
    graph = bwsk_fx.capture(_vit(), _batch(2))
    folder = str(Path(transformers.__file__).parent)
    for node in graph.graph.nodes:
        if node.op.startswith("call") and isinstance(node.meta["val"], torch.Tensor):
            assert node.stack_trace.startswith(f'File "{folder}'), node
            assert node.meta["nn_module_stack"], node
    classifier = next(node for node in graph.graph.nodes if node.target == "classifier")
    assert "self.classifier(" in classifier.stack_trace
    assert list(classifier.meta["nn_module_stack"]) == ["", "classifier"]


def test_a_graph_that_depends_on_the_mode_refuses_the_other_one():
    model = _vit(attn_implementation="eager", **DROPOUT)
    graph = bwsk_fx.capture(model, _batch(2))
    graph.eval()
    with pytest.raises(CaptureError, match="captured in train mode"):
        graph(**_batch(2))
    graph.train()
    assert graph(**_batch(2))["loss"] > 0


def test_a_graph_of_leaf_dropouts_holds_in_both_modes():
    model = _vit(hidden_dropout_prob=0.5)
    graph = bwsk_fx.capture(model, _batch(2))
    model.eval()
    graph.eval()
    assert torch.equal(graph(**_batch(2))["logits"], model(**_batch(2))["logits"])


def test_a_copy_is_its_own_model():
    model = _vit()
    graph = bwsk_fx.capture(model, _batch(2))
    twin = copy.deepcopy(graph)
    _assert_same_step(model, twin, _batch(2))
    assert not {id(parameter) for parameter in twin.parameters()} & {id(parameter) for parameter in model.parameters()}


def test_a_copy_refuses_what_the_graph_refuses():
    twin = copy.deepcopy(copy.deepcopy(bwsk_fx.capture(_vit(attn_implementation="eager", **DROPOUT), _batch(2))))
    twin.eval()
    assert len(twin._forward_pre_hooks) == 1
    with pytest.raises(CaptureError, match="captured in train mode"):
        twin(**_batch(2))


# -- other models -------------------------------------------------------------------------------------------------


def _deit() -> nn.Module:
    return transformers.DeiTForImageClassification(transformers.DeiTConfig(**SMALL))


def _dinov2() -> nn.Module:
    settings = {key: value for key, value in SMALL.items() if key != "intermediate_size"}
    return transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**settings, mlp_ratio=2))


class ConvNet(nn.Module):
    """Convolutions, batch statistics and a residual, in nothing but torch.nn."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.head = nn.Linear(8, 5)

    def forward(self, pixel_values, labels):
        features = self.stem(pixel_values)
        features = torch.relu(self.block(features) + features)
        logits = self.head(features.mean((2, 3)))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def _called_leaves(model: nn.Module, batch: dict[str, torch.Tensor]) -> list[str]:
    """The modules without children that a run of the model itself calls, in order."""
    called: list[str] = []
    hooks = [
        module.register_forward_hook(lambda *_, path=path: called.append(path))
        for path, module in model.named_modules()
        if not list(module.children())
    ]
    model(**batch)
    for hook in hooks:
        hook.remove()
    return called


@pytest.mark.parametrize(("make", "least"), [(_deit, 26), (_dinov2, 26), (ConvNet, 6)])
def test_other_models(make, least):
    torch.manual_seed(0)
    model = make().train()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    graph = bwsk_fx.capture(model, _batch(3))
    assert _leaves(graph) == _called_leaves(copy.deepcopy(model), _batch(3))
    assert len(_leaves(graph)) >= least
    assert list(graph.state_dict()) == list(model.state_dict())
    _assert_same_bits(dict(model.named_buffers()), buffers)
    twin = copy.deepcopy(model)
    for size in (3, 4):
        _assert_same_step(twin, graph, _batch(size))
    _assert_same_bits(dict(twin.named_buffers()), dict(graph.named_buffers()))


class _Remembers(nn.Module):
    """Computes positions once per size, as BEiT does."""

    @staticmethod
    @functools.lru_cache
    def positions(size: int) -> torch.Tensor:
        return torch.arange(size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.positions(x.shape[1])


@pytest.mark.parametrize("inside", [False, True])
def test_what_methods_remember_of_a_capture_does_not_outlive_it(inside):
    model = nn.Sequential(_Remembers()) if inside else _Remembers()
    x = torch.randn(2, 3)
    expected = model(x)
    graph = bwsk_fx.type_nodes(bwsk_fx.capture(model, x))
    assert torch.equal(model(x), expected)
    assert torch.equal(graph(x), expected)


def test_sharded_parameters_are_refused():
    from torch import distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_module

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = distribute_module(nn.Linear(4, 4), init_device_mesh("cpu", (1,)))
        with pytest.raises(CaptureError, match=r"'weight' is a DTensor.*fully_shard_blocks"):
            bwsk_fx.capture(model, torch.randn(2, 4))
    finally:
        dist.destroy_process_group()
