"""Small models with random weights: every S label of theirs survives certification, or says what is lost."""

from collections.abc import Callable

import pytest
import torch
import transformers
from torch import Tensor, nn

import bwsk_fx
from bwsk_fx.verdict import Label

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SIZES, "intermediate_size": 128, "vocab_size": 100, "max_position_embeddings": 32}
IMAGE = {"image_size": 32, "patch_size": 8}

Make = Callable[[], nn.Module]

VISION: dict[str, Make] = {
    "vit": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(**SIZES, **IMAGE, intermediate_size=128)
    ),
    "dinov2": lambda: transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**SIZES, **IMAGE)),
    # Its position indices are remembered by a method.
    "beit": lambda: transformers.BeitForImageClassification(
        transformers.BeitConfig(**SIZES, **IMAGE, intermediate_size=128, use_relative_position_bias=True)
    ),
    "convnext": lambda: transformers.ConvNextForImageClassification(
        transformers.ConvNextConfig(depths=[1, 1, 1, 1], hidden_sizes=[16, 32, 64, 64], image_size=32)
    ),
    "mobilenet_v2": lambda: transformers.MobileNetV2ForImageClassification(
        transformers.MobileNetV2Config(image_size=32, depth_multiplier=0.25)
    ),
}
LANGUAGE: dict[str, Make] = {
    "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=100, n_positions=32, n_embd=64, n_layer=2, n_head=4, use_cache=False)
    ),
    "opt": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(**TEXT, ffn_dim=128, word_embed_proj_dim=64, use_cache=False)
    ),
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**TEXT, num_key_value_heads=2, use_cache=False)
    ),
}
# OPT counts its positions by a product of integers that both depend on the mask.
GRAY = {"opt": ["mul"]}


def _inputs(name: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    if name in VISION:
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}
    tokens = torch.randint(3, 100, (2, 16), generator=generator)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


@pytest.mark.parametrize("name", [*VISION, *LANGUAGE])
def test_no_s_label_is_false(name):
    torch.manual_seed(0)
    model, inputs = (VISION | LANGUAGE)[name]().eval(), _inputs(name)
    graph = bwsk_fx.type_nodes(bwsk_fx.capture(model, inputs))
    gray = [node.name for node in graph.graph.nodes if node.meta["bwsk"].label is Label.GRAY]
    assert gray == GRAY.get(name, [])
    certificates = bwsk_fx.certify(graph, inputs, dtypes=(torch.float64,))
    assert len(certificates.nodes) > 30
    assert [node for node in certificates.nodes if node.verdict.label is Label.GRAY] == []
    assert len(certificates.certified) >= len(certificates.nodes) / 2
