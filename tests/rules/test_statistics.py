"""Norms that models write out in separate operators are S with their statistics; the modules of transformers."""

import importlib

import pytest
import torch
from torch import nn

import bwsk_fx
from bwsk_fx.verdict import Label, WitnessKind

X = torch.randn(2, 5, 16)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ONE_MEAN = [
    "llama.modeling_llama.LlamaRMSNorm",
    "mistral.modeling_mistral.MistralRMSNorm",
    "qwen2.modeling_qwen2.Qwen2RMSNorm",
    "t5.modeling_t5.T5LayerNorm",
    "switch_transformers.modeling_switch_transformers.SwitchTransformersLayerNorm",
    "mamba.modeling_mamba.MambaRMSNorm",
    "gemma.modeling_gemma.GemmaRMSNorm",
    "gemma3n.modeling_gemma3n.Gemma3nRMSNorm",
]
TWO_MEANS = ["deberta.modeling_deberta.DebertaLayerNorm", "cohere.modeling_cohere.CohereLayerNorm"]


def _module(path: str, *args: object, **kwargs: object) -> nn.Module:
    file, _, name = f"transformers.models.{path}".rpartition(".")
    module = getattr(importlib.import_module(file), name)(*args, **kwargs)
    for parameter in module.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    return module


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", ONE_MEAN + TWO_MEANS)
def test_norms_of_transformers(certified, path, dtype):
    verdict = certified(_module(path, 16).to(dtype), X.to(dtype))
    assert (verdict.label, verdict.witness.kind) == (Label.S, WitnessKind.BY_PRODUCTS)
    assert verdict.witness.elements == 10 * (1 if path in ONE_MEAN else 2)


def test_norms_that_compute_in_a_narrower_dtype_erase(certified):
    assert certified(_module(ONE_MEAN[0], 16).double(), X.double()).label is Label.K
    # T5's keeps the operand as it is.
    assert certified(_module("t5.modeling_t5.T5LayerNorm", 16).double(), X.double()).label is Label.S


def test_a_scale_of_zero_still_erases(certified):
    module = _module(ONE_MEAN[0], 16)
    with torch.no_grad():
        module.weight[3] = 0
    verdict = certified(module, X)
    assert (verdict.label, verdict.erasure.elements) == (Label.K, 10)


def test_a_gated_norm_needs_its_gate_and_its_mean(certified):
    module = _module("qwen3_next.modeling_qwen3_next.Qwen3NextRMSNormGated", 16)
    verdict = certified(module, X, torch.randn(2, 5, 16))
    assert verdict.witness.kind is WitnessKind.OTHER_OPERAND
    assert len(verdict.witness.names) == 2


class _Centred(nn.Module):
    def forward(self, x):
        return x - x.mean(-1, keepdim=True)


class _OwnRow(nn.Module):
    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1)


class _Squared(nn.Module):
    def forward(self, x):
        return x.pow(2).mean(-1, keepdim=True).sqrt()


def test_only_roots_of_means_are_statistics(certified):
    assert certified(_OwnRow(), X).witness.elements == 2 * 16
    # Means that nothing is scaled by are no by-product, and a mean of one element would be the operand itself.
    assert certified(_Centred(), X).label is not Label.S
    assert certified(_OwnRow(), X[:, :1]).label is not Label.S
    assert certified(_Squared(), X).label is Label.K


def test_channels_first_layer_norm(certified):
    module = _module("convnext.modeling_convnext.ConvNextLayerNorm", 6, data_format="channels_first")
    verdict = certified(module, torch.randn(2, 6, 4, 4))
    assert (verdict.label, verdict.witness.elements) == (Label.S, 2 * 2 * 16)


def test_layer_scale_and_frozen_batch_norm_are_static_maps(certified):
    config = importlib.import_module("transformers").Dinov2Config(hidden_size=16)
    scale = certified(_module("dinov2.modeling_dinov2.Dinov2LayerScale", config), X)
    frozen = certified(_module("detr.modeling_detr.DetrFrozenBatchNorm2d", 6), torch.randn(2, 6, 4, 4))
    assert [verdict.witness.kind for verdict in (scale, frozen)] == [WitnessKind.NOTHING] * 2


@pytest.mark.parametrize("name", ["Dinov2DropPath", "ConvNextDropPath", "SwinDropPath"])
def test_drop_path_erases_its_share_of_the_samples(certified, name):
    family = name.removesuffix("DropPath").lower()
    path = f"{family}.modeling_{family}.{name}"
    verdict = certified(_module(path, 0.25), X)
    assert (verdict.label, verdict.erasure.elements) == (Label.K, pytest.approx(0.25 * X.numel()))
    assert certified(_module(path, 0.25).eval(), X).label is Label.S
    assert certified(_module(path, 0.0), X).label is Label.S


def test_rotary_embeddings_do_not_read_the_activation(certified):
    config = importlib.import_module("transformers").LlamaConfig(hidden_size=16, num_attention_heads=2)
    rotary = importlib.import_module("transformers.models.llama.modeling_llama").LlamaRotaryEmbedding(config)
    verdict = certified(rotary, X, torch.arange(5)[None])
    assert (verdict.label, verdict.erasure.elements) == (Label.K, X.numel())


class _Rotated(nn.Module):
    def __init__(self):
        super().__init__()
        angles = torch.outer(torch.arange(1.0, 6.0), torch.tensor([1.0, 0.3])).repeat(1, 2)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, q):
        first, second = q.chunk(2, -1)
        return q * self.cos + torch.cat((-second, first), -1) * self.sin


def test_a_rotation_is_typed_step_by_step():
    graph = bwsk_fx.type_nodes(bwsk_fx.capture(_Rotated(), torch.randn(2, 3, 5, 4)))
    counted = [node for node in graph.graph.nodes if node.meta["bwsk"].counted]
    # Each step keeps its operand, with the other summand as the sum's witness: no angle has a cosine or sine of zero.
    assert {node.meta["bwsk"].label for node in counted} == {Label.S}
    assert counted[-1].meta["bwsk"].witness.kind is WitnessKind.OTHER_OPERAND


def test_a_whole_rotation_has_no_order_of_undoing(certified):
    assert certified(_Rotated(), torch.randn(2, 3, 5, 4)).label is Label.GRAY
