"""What the benchmarks share: the models that are compared, the device's name, and result files."""

from __future__ import annotations

import argparse
import copy
import json
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import ViTConfig, ViTForImageClassification

import bwsk_fx

RESULTS = Path(__file__).parent / "results"
WIDTH = 160
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Shape:
    """A ViT and its input.

    Attributes:
        layers: transformer blocks.
        hidden: width; heads are 64 wide and the MLP is 4 times as wide.
        batch: images per step.
        image: height and width in pixels; patches are 16 pixels wide.
        precision: `fp32`, or the autocast dtype.
    """

    layers: int
    hidden: int
    batch: int
    image: int
    precision: str

    @property
    def dtype(self) -> torch.dtype | None:
        """The autocast dtype; None for none."""
        return DTYPES[self.precision]

    @property
    def unit_bytes(self) -> int:
        """Bytes of one half-precision token×hidden tensor per layer, over all layers."""
        tokens = (self.image // 16) ** 2 + 1
        return self.batch * tokens * self.hidden * 2 * self.layers

    def model(self, device: str) -> ViTForImageClassification:
        """Make the model with random weights, in train mode and without dropout."""
        torch.manual_seed(0)
        config = ViTConfig(
            num_hidden_layers=self.layers,
            hidden_size=self.hidden,
            num_attention_heads=self.hidden // 64,
            intermediate_size=4 * self.hidden,
            image_size=self.image,
            num_labels=10,
        )
        return ViTForImageClassification(config).to(device).train()

    def inputs(self, device: str) -> dict[str, torch.Tensor]:
        """Make a batch of random images with labels."""
        torch.manual_seed(1)
        pixels = torch.randn(self.batch, 3, self.image, self.image, device=device)
        return {"pixel_values": pixels, "labels": torch.arange(self.batch, device=device) % 10}


def variants(model: ViTForImageClassification, budgets: Sequence[float]) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield every way to train the model: eager, checkpointed, and reversible in both faiths at each budget."""
    yield "eager", copy.deepcopy(model)
    yield "checkpoint per block", checkpointed(copy.deepcopy(model))
    for faith in ("exact", "rounded"):
        for budget in budgets:
            variant = bwsk_fx.apply(copy.deepcopy(model), "reversible", budget=budget, faith=faith)
            yield f"{faith}, budget {budget:g}", variant


def checkpointed(model: ViTForImageClassification, **options: Any) -> ViTForImageClassification:
    """Checkpoint every block, in place; `options` are those of `torch.utils.checkpoint.checkpoint`."""
    # transformers 5.24 renamed it.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False, **options})
    return model


def parser(question: str, shape: Shape) -> argparse.ArgumentParser:
    """Return a parser for the options of every benchmark, with a shape as default."""
    arguments = argparse.ArgumentParser(description=question, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for name in ("layers", "hidden", "batch", "image"):
        arguments.add_argument(f"--{name}", type=int, default=getattr(shape, name))
    arguments.add_argument("--precision", choices=list(DTYPES), default=shape.precision)
    arguments.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments.add_argument("--budgets", type=float, nargs="+", default=[0.0, 0.1, 0.25])
    arguments.add_argument("--output", type=Path, default=RESULTS, help="folder of the result file")
    return arguments


def shape_of(options: argparse.Namespace) -> Shape:
    """Read the shape from parsed options."""
    return Shape(options.layers, options.hidden, options.batch, options.image, options.precision)


def device_name(device: str) -> str:
    """Name the device that the figures belong to."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    return f"CPU {_processor()}, {torch.get_num_threads()} threads"


def report(
    question: str, options: argparse.Namespace, rows: Sequence[dict[str, Any]], columns: dict[str, Callable[[Any], str]]
) -> Path:
    """Print the rows as a table, write them with versions and the device's name to a JSON file, and return its path."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=question, title_justify="left")
    for name in columns:
        table.add_column(name, justify="left" if name == "variant" else "right", no_wrap=name == "variant")
    for row in rows:
        table.add_row(*(show(row[name]) for name, show in columns.items()))
    console = Console(highlight=False)
    if not console.is_terminal:
        # Of a narrow table in a file nothing could be read.
        console.width = WIDTH
    console.print(table)
    settings = {name: value for name, value in vars(options).items() if name != "output"}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    content = {"question": question, "device": device_name(options.device), **versions, "settings": settings}
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"{question}-{options.device.split(':')[0]}.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({**content, "rows": list(rows)}, indent=1) + "\n", encoding="utf-8")
    partial.rename(path)
    print(f"written to {path.name}")
    return path


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
