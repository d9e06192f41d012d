"""How much does fine-tuning a frozen ViT with LoRA adapters keep, and how much less with regions?

Adapters of rank 8 on the query and value projections, a trainable head, everything else frozen. *Kept* counts distinct
storages saved for the backward pass without parameters, see `bwsk_fx.measure`. A unit is one half-precision
token×hidden tensor per layer. Needs `peft`.

    python benchmarks/lora.py
"""

from __future__ import annotations

from typing import Any

import torch
from common import Shape, parser, report, shape_of
from peft import LoraConfig, PeftModel, get_peft_model

import bwsk_fx
from bwsk_fx.measure import saved_for_backward

QUESTION = "lora"


def with_adapters(model: Any) -> PeftModel:
    """Freeze a ViT and put adapters on it, with random values in both factors."""
    torch.manual_seed(2)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        # They start as zeros, with which the other factor would have no gradient.
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return adapted


def main() -> None:
    options = parser(__doc__, Shape(layers=12, hidden=768, batch=16, image=224, precision="bf16"))
    options.set_defaults(budgets=[0.0, 0.1, 0.2])
    options = options.parse_args()
    shape, rows = shape_of(options), []
    model = with_adapters(shape.model(options.device))
    for budget in (None, *options.budgets):
        name = "eager" if budget is None else f"rounded, budget {budget:g}"
        bwsk_fx.apply(model, "conventional" if budget is None else "reversible", budget=budget)
        kept = saved_for_backward(model, shape.inputs(options.device), shape.dtype)
        rows.append({"variant": name, "units": kept / shape.unit_bytes, "kept MiB": kept / 2**20})
        rows[-1]["kept ratio"] = rows[-1]["kept MiB"] / rows[0]["kept MiB"]
        print(rows[-1], flush=True)
    report(QUESTION, options, rows, dict.fromkeys(rows[0], "{:.2f}".format) | {"variant": str})


if __name__ == "__main__":
    main()
