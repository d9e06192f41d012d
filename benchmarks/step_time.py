"""How much longer does a training step take than eager's?

Forward, backward and a fused AdamW step, timed in rounds: every variant runs once per round, so that a busy machine
slows all of them alike. The figure is the median over rounds of each variant's time over eager's in the same round.

    python benchmarks/step_time.py
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
from common import Shape, parser, report, shape_of, variants

QUESTION = "step-time"
WARM_UP = 2


def main() -> None:
    arguments = parser(__doc__, Shape(layers=6, hidden=192, batch=4, image=224, precision="bf16"))
    arguments.add_argument("--rounds", type=int, default=20)
    options = arguments.parse_args()
    shape = shape_of(options)
    inputs = shape.inputs(options.device)
    steps = {
        name: step_of(model, inputs, shape.dtype, options.device)
        for name, model in variants(shape.model(options.device), options.budgets)
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_number in range(WARM_UP + options.rounds):
        for name, step in steps.items():
            seconds = timed(step, options.device)
            if round_number >= WARM_UP:
                times[name].append(seconds)
    rows = [
        {
            "variant": name,
            "ms": 1000 * median(seconds),
            "ratio": median(own / eager for own, eager in zip(seconds, times["eager"], strict=True)),
        }
        for name, seconds in times.items()
    ]
    report(QUESTION, options, rows, {"variant": str, "ms": "{:.1f}".format, "ratio": "{:.3f}".format})


def step_of(
    model: torch.nn.Module, inputs: dict[str, torch.Tensor], dtype: torch.dtype | None, device: str
) -> Callable[[], None]:
    """Return a function that trains `model` for one step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        with torch.autocast(device.split(":")[0], dtype=dtype, enabled=dtype is not None):
            loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def timed(step: Callable[[], None], device: str) -> float:
    """Return the seconds of one call, kernels included."""
    synchronize = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    synchronize()
    began = time.perf_counter()
    step()
    synchronize()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
