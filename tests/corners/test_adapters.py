"""LoRA adapters on frozen models, of peft and by hand on int8 weights."""

import pytest
import torch
from torch import Tensor, nn

import bwsk_fx
from bwsk_fx.errors import CaptureError
from bwsk_fx.modes import applied


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_peft(make_vit, make_images, train_step, assert_same_bits, dropout):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    runs = []
    for mode in ("conventional", "reversible"):
        torch.manual_seed(0)
        config = peft.LoraConfig(
            r=8, target_modules=["q_proj", "v_proj"], lora_dropout=dropout, modules_to_save=["classifier"]
        )
        model = peft.get_peft_model(make_vit(), config)
        keys = list(peft.get_peft_model_state_dict(model))
        bwsk_fx.apply(model, mode, **({"faith": "exact", "budget": 0.1} if mode == "reversible" else {}))
        runs.append(train_step(model, make_images()))
        assert list(peft.get_peft_model_state_dict(model)) == keys
        if mode == "reversible":
            bwsk_fx.restore(model)
        merged = model.merge_and_unload()
        assert type(merged) is type(make_vit())
    assert_same_bits(*runs)
    assert sum(gradient is not None for name, gradient in runs[0].items() if "lora" in name) == 8


class Magnitude(nn.Module):
    """As in DoRA, a module without children that is called with others, and reads their weights."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor, *, base: nn.Linear, down: nn.Linear, up: nn.Linear) -> Tensor:
        weight = base.weight + up(down(torch.eye(down.weight.shape[1]))).T.detach()
        return (self.weight / weight.norm(dim=1).detach()) * (base(x) + up(down(x)))


class Dora(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base, self.down, self.up = nn.Linear(8, 8), nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)
        self.base.requires_grad_(False)
        self.magnitude = Magnitude(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.magnitude(x, base=self.base, down=self.down, up=self.up)


def _dora() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), Dora(), nn.GELU(), nn.LayerNorm(8))


def test_modules_that_take_modules_join_regions(train_step, assert_same_bits):
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    model = bwsk_fx.apply(_dora(), faith="exact", budget=0.1)
    assert_same_bits(train_step(model, [x]), train_step(_dora(), [x]))
    outside = {str(node.target) for node in applied(model).rewritten.graph.find_nodes(op="call_module")}
    assert not {"1.base", "1.magnitude"} & outside


def test_hooks_on_modules_that_take_modules_are_refused():
    model = _dora()
    model[1].magnitude.register_forward_hook(lambda module, args, result: None)
    with pytest.raises(CaptureError, match=r"module '1.magnitude' \(Magnitude\) carries the hook"):
        bwsk_fx.capture(model, torch.randn(4, 8))


def test_peft_dora(make_vit, make_images, train_step, assert_same_bits):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    runs = []
    for mode in ("conventional", "reversible"):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True, modules_to_save=["classifier"])
        model = peft.get_peft_model(make_vit(), config)
        bwsk_fx.apply(model, mode, **({"faith": "exact", "budget": 0.1} if mode == "reversible" else {}))
        runs.append(train_step(model, make_images()))
    assert_same_bits(*runs)


class Quantized(nn.Module):
    """A frozen base in eight bits, beside a trained low-rank part."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)).requires_grad_(False)
        self.base = torch.ao.quantization.quantize_dynamic(self.base, {nn.Linear}, dtype=torch.qint8)
        self.down, self.up, self.norm = nn.Linear(8, 2), nn.Linear(2, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.base(x) + self.up(self.down(x)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.skipif("fbgemm" not in torch.backends.quantized.supported_engines, reason="no engine for eight bits")
def test_dynamic_quantisation_of_a_frozen_base(train_step, assert_same_bits):
    x, runs = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), []
    for mode in ("conventional", "reversible"):
        torch.manual_seed(0)
        model = bwsk_fx.apply(Quantized(), mode, **({"faith": "exact"} if mode == "reversible" else {}))
        runs.append(train_step(model, [x]))
    assert_same_bits(*runs)
    outside = {str(node.target) for node in applied(model).rewritten.graph.find_nodes(op="call_module")}
    assert {"base.0", "base.2"} <= outside


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, use_cache=False))


class Prompted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = _gpt2().requires_grad_(False)
        self.prompt = nn.Parameter(torch.randn(2, 8))

    def forward(self, tokens: Tensor) -> Tensor:
        words = self.model.get_input_embeddings()(tokens)
        prompt = self.prompt.expand(words.shape[0], -1, -1)
        return self.model(inputs_embeds=torch.cat([prompt, words], 1)).logits


@pytest.mark.parametrize("inner", [False, True])
def test_a_learned_prompt_before_a_frozen_model(train_step, assert_same_bits, inner):
    runs = []
    for mode in ("conventional", "reversible"):
        model = Prompted()
        options = {"faith": "exact", "budget": 0.1} if mode == "reversible" else {}
        bwsk_fx.apply(model.model if inner else model, mode, **options)
        runs.append(train_step(model, [torch.tensor([[1, 2, 3], [4, 5, 6]])]))
    assert_same_bits(*runs)


def test_embeddings_that_are_resized_after_apply(train_step, assert_same_bits):
    runs = []
    for mode in ("conventional", "reversible"):
        model = bwsk_fx.apply(_gpt2(), mode, **({"faith": "exact"} if mode == "reversible" else {}))
        found = {}
        for size in (20, 24):
            torch.manual_seed(1)
            model.resize_token_embeddings(size, mean_resizing=False)
            tokens = torch.tensor([[1, 2, size - 1], [4, 5, 6]])
            step = train_step(model, {"input_ids": tokens, "labels": tokens})
            found |= {f"{size} {name}": value for name, value in step.items()}
        runs.append(found)
    assert_same_bits(*runs)


class Int8Linear(nn.Module):
    """A frozen weight in eight bits, and a trained low-rank one on top."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randint(-127, 128, (size, size), dtype=torch.int8))
        self.register_buffer("scale", torch.full((size, 1), 0.01))
        self.down, self.up = nn.Linear(size, 2, bias=False), nn.Linear(2, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale) + self.up(self.down(x))


def test_adapters_on_int8_weights(train_step, assert_same_bits):
    runs = []
    for mode in ("conventional", "reversible"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), Int8Linear(8), nn.GELU(), Int8Linear(8), nn.LayerNorm(8))
        bwsk_fx.apply(model, mode, **({"faith": "exact", "budget": 0.1} if mode == "reversible" else {}))
        runs.append(train_step(model, [torch.randn(4, 8, generator=torch.Generator().manual_seed(0))]))
    assert_same_bits(*runs)
