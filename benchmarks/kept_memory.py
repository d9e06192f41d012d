"""How much does a training step keep for its backward pass, and hold at its peak?

Saved bytes count distinct storages without parameters, see `bwsk_fx.measure`. A unit is one half-precision token×hidden
tensor per layer. Peak activations are the peak of live tensor bytes without gradients of parameters.

    python benchmarks/kept_memory.py
"""

from __future__ import annotations

from common import Shape, parser, report, shape_of, variants

from bwsk_fx.measure import measure

QUESTION = "kept-memory"


def main() -> None:
    options = parser(__doc__, Shape(layers=6, hidden=192, batch=4, image=224, precision="bf16")).parse_args()
    shape, rows = shape_of(options), []
    for name, model in variants(shape.model(options.device), options.budgets):
        memory = measure(model, shape.inputs(options.device), shape.dtype)
        rows.append(
            {
                "variant": name,
                "units": memory.saved_bytes / shape.unit_bytes,
                "kept MiB": memory.saved_bytes / 2**20,
                "peak activations MiB": memory.peak_activation_bytes / 2**20,
                "peak MiB": memory.peak_bytes / 2**20,
            }
        )
    eager = rows[0]["peak activations MiB"]
    for row in rows:
        row["peak ratio"] = row["peak activations MiB"] / eager
    figure = "{:.2f}".format
    columns = dict.fromkeys(rows[0], figure) | {"variant": str}
    report(QUESTION, options, rows, columns)


if __name__ == "__main__":
    main()
