"""Hugging Face models through `torch.compile`: the graphs and the precision of Inductor, and fewer bytes."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch._dynamo.utils import counters

import bwsk_fx
from bwsk_fx.planning.plan import Plan

BF16 = torch.bfloat16
BOUND = 1.5
BATCH = 16
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
WITHOUT_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
WORDS = 50


def _vit() -> nn.Module:
    config = transformers.ViTConfig(**SIZES, **WITHOUT_DROPOUT, image_size=16, patch_size=4, num_labels=5)
    return transformers.ViTForImageClassification(config)


def _bert() -> nn.Module:
    config = transformers.BertConfig(
        **SIZES, **WITHOUT_DROPOUT, vocab_size=WORDS, max_position_embeddings=16, num_labels=5
    )
    return transformers.BertForSequenceClassification(config)


def _gpt2() -> nn.Module:
    sizes = {"vocab_size": WORDS, "n_positions": 16, "n_embd": 32, "n_layer": 1, "n_head": 4}
    without_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **without_dropout, **ends, use_cache=False))


def _t5() -> nn.Module:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 4}
    config = transformers.T5Config(
        **sizes, vocab_size=WORDS, dropout_rate=0.0, use_cache=False, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def _resnet(norms: str) -> nn.Module:
    sizes = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"}
    model = transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes, num_labels=5))
    for module in model.modules():
        if norms == "frozen" and isinstance(module, nn.BatchNorm2d):
            module.eval().requires_grad_(False)
    return model.eval() if norms == "eval" else model


def _classified_images(size: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(BATCH, 3, size, size), "labels": torch.arange(BATCH) % 5}


def _tokens() -> dict[str, Tensor]:
    tokens = torch.randint(3, WORDS, (BATCH, 16))
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def _classified_tokens() -> dict[str, Tensor]:
    return _tokens() | {"labels": torch.arange(BATCH) % 5}


def _predicted_tokens() -> dict[str, Tensor]:
    return _tokens() | {"labels": torch.randint(3, WORDS, (BATCH, 16))}


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]]]] = {
    "vit": (_vit, partial(_classified_images, 16)),
    "bert": (_bert, _classified_tokens),
    "gpt2": (_gpt2, _predicted_tokens),
    "resnet": (partial(_resnet, "train"), partial(_classified_images, 32)),
    "resnet in eval mode": (partial(_resnet, "eval"), partial(_classified_images, 32)),
    "resnet with frozen norms": (partial(_resnet, "frozen"), partial(_classified_images, 32)),
    "t5": (_t5, _predicted_tokens),
}


def _made(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a model of which nothing is zero or one by construction, running statistics included, and its inputs."""
    make, inputs = MODELS[name]
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor), alpha=0.1)
    return model, inputs()


@dataclass(frozen=True)
class Step:
    """Gradients of a compiled model, with the number of Dynamo's graphs and the reasons for breaks between them."""

    gradients: dict[str, Tensor]
    graphs: int
    breaks: dict[str, int]


def _step(
    backend: str, options: dict[str, Any], run: Callable[[nn.Module], dict[str, Tensor]], model: nn.Module
) -> Step:
    torch._dynamo.reset()
    counters.clear()
    compiled = copy.deepcopy(model)
    compiled.compile(backend=backend, options=options)
    found = run(compiled)
    return Step(found, counters["stats"]["unique_graphs"], dict(counters["graph_break"]))


@dataclass(frozen=True)
class Comparison:
    """One step each of Inductor, of ours and of the model in float64, and the plans of ours."""

    inductor: Step
    ours: Step
    exact: dict[str, Tensor]
    plans: list[Plan]


# Each model in one precision by default: the other one is compiled anew, which takes as long.
IN_HALF_PRECISION = ("bert", "resnet with frozen norms", "t5")
# Much like those beside them.
SLOW = ("bert", "resnet in eval mode")
CASES = [
    pytest.param(
        (name, dtype),
        id=f"{name}, {dtype or torch.float32}".replace("torch.", ""),
        marks=() if (name in IN_HALF_PRECISION) == (dtype is BF16) and name not in SLOW else pytest.mark.slow,
    )
    for name in MODELS
    for dtype in (None, BF16)
]


@pytest.fixture(scope="module", params=CASES)
def compared(request, gradients, in_float64) -> Iterator[Comparison]:
    name, dtype = request.param
    model, inputs = _made(name)
    run = partial(gradients, inputs=inputs, dtype=dtype)
    # Code from a store could be that of another plan.
    with torch._inductor.config.patch(fx_graph_cache=False), torch._functorch.config.patch(enable_autograd_cache=False):
        inductor = _step("inductor", {}, run, model)
        known = bwsk_fx.compile.reports()
        ours = _step("bwsk_fx", {"budget": 0.2}, run, model)
    plans = [report.plan for report in bwsk_fx.compile.reports() if all(report is not other for other in known)]
    yield Comparison(inductor, ours, in_float64(model, inputs), plans)
    torch._dynamo.reset()


def _norm(errors: dict[str, Tensor]) -> float:
    return float(errors[""]) ** 0.5


def test_there_are_no_more_graphs_than_inductors(compared):
    # Of GPT-2 there are two: it writes to a log before its loss.
    assert compared.inductor.graphs > 0
    assert (compared.ours.graphs, compared.ours.breaks) == (compared.inductor.graphs, compared.inductor.breaks)


def test_gradients_are_as_near_to_float64_as_inductors(compared, squared_errors):
    found, expected = compared.ours.gradients, compared.inductor.gradients
    assert found.keys() == expected.keys() == compared.exact.keys()
    error, allowed = (_norm(squared_errors(one, compared.exact)) for one in (found, expected))
    assert 0 < error <= BOUND * allowed


def test_every_graph_is_planned_and_less_is_kept(compared):
    assert len(compared.plans) == compared.ours.graphs
    kept, conventional = (
        sum(getattr(plan, name) for plan in compared.plans) for name in ("kept_bytes", "conventional_bytes")
    )
    assert kept < 0.5 * conventional
