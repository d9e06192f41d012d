"""LoRA adapters on frozen models, of peft and by hand on int8 weights."""

import pytest
import torch
from torch import Tensor, nn

import bwsk_fx


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
