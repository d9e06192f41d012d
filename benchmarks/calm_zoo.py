"""Small models of seven architectures, for questions about axes."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

_SMALL = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
_T5 = {"d_model": 32, "num_heads": 4, "d_kv": 8, "d_ff": 64, "vocab_size": 50, "decoder_start_token_id": 0}
_IDS = torch.arange(16).view(2, 8)
_PIXELS = {"pixel_values": torch.rand(2, 3, 32, 32), "labels": torch.tensor([0, 1])}
_TEXT = {"input_ids": _IDS, "labels": _IDS.flip(1)}

# By architecture: the head, what its config is given, and inputs.
SMALL_MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Tensor]]] = {
    "ViT": ("ForImageClassification", {**_SMALL, "image_size": 32, "patch_size": 8}, _PIXELS),
    "Bert": (
        "ForSequenceClassification",
        {**_SMALL, "vocab_size": 50},
        {"input_ids": _IDS, "labels": torch.tensor([0, 1])},
    ),
    "GPT2": ("LMHeadModel", {"n_layer": 1, "n_embd": 32, "n_head": 4, "vocab_size": 50}, _TEXT),
    "T5": ("ForConditionalGeneration", {**_T5, "num_layers": 1}, _TEXT),
    "ResNet": ("ForImageClassification", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}, _PIXELS),
    "Mamba": ("ForCausalLM", {"num_hidden_layers": 1, "hidden_size": 16, "vocab_size": 50}, _TEXT),
    "SwitchTransformers": (
        "ForConditionalGeneration",
        {**_T5, "num_layers": 2, "num_decoder_layers": 2, "num_experts": 2},
        _TEXT,
    ),
}


def small_model(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """Build a model with weights that hide nothing: no scale is one, no bias zero. Return it with its inputs."""
    head, options, inputs = SMALL_MODELS[name]
    config = getattr(transformers, f"{name}Config")(**options)
    config.use_cache = False
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, f"{name}{head}")(config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model, inputs
