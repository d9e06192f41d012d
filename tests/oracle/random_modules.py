"""Random small modules: lists of steps that hypothesis draws, and the module that interprets them.

A `Spec` holds steps, sizes, inputs and outputs, and prints as the expression that makes it:

    Spec(steps=(step('linear', out=8, bias=True), step('act', name='gelu')), width=4, tokens=3, batch=2)

`build(spec)` is the module, `inputs_of(spec)` are inputs for it. Weights come from a seed of the caller's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import assume
from hypothesis import strategies as st
from random_layers import WIDTHS
from random_steps import KINDS, Chain, Draw, Step, step
from torch import Tensor, nn

IDS = 7  # How many embeddings there are.


@dataclass(frozen=True)
class Spec:
    """A module, its inputs, and what a training step reads of its outputs.

    Attributes:
        steps: What it does, in order.
        width: Of the inputs.
        tokens: The same throughout.
        batch: How many samples the inputs have.
        ids: Whether the first input holds integers, which are embedded.
        grad: Names of the inputs that need gradients: `x`, `y`.
        outputs: `tensor`, `tuple` or `dict`; `loss` for a scalar that the module itself computes.
        head: What comes after the last step: `none`, `mean` over tokens, or the `first` token.
        taps: Steps whose results are outputs, too.
        unused: Those among them that no loss depends on.
        frozen: Places of parameters without gradients, modulo their number.
    """

    steps: tuple[Step, ...]
    width: int
    tokens: int
    batch: int
    ids: bool = False
    grad: tuple[str, ...] = ()
    outputs: str = "tensor"
    head: str = "none"
    taps: tuple[int, ...] = ()
    unused: tuple[int, ...] = ()
    frozen: tuple[int, ...] = ()

    def kinds(self) -> set[str]:
        return {kind for each in self.steps for kind in each.kinds()}


# -- the module -------------------------------------------------------------------------------------------------------


class RandomModule(nn.Module):
    """The module of a spec: embeds ids if there are any, interprets the steps, and returns its outputs."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        if spec.ids:
            self.embedding = nn.Embedding(IDS, spec.width)
        self.chain = Chain(spec.steps, spec.width, spec.tokens, spec.width)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        found = self.chain.results(self.embedding(x) if self.spec.ids else x, y)
        last = found[-1]
        if self.spec.head != "none":
            last = last.mean(1) if self.spec.head == "mean" else last[:, 0]
        if self.spec.outputs == "loss":
            return {"loss": last.sin().mean()}
        results = {"last": last} | {f"tap_{place}": found[place] for place in self.spec.taps}
        if self.spec.outputs == "tensor":
            return last
        return tuple(results.values()) if self.spec.outputs == "tuple" else results


def build(spec: Spec) -> RandomModule:
    """Return the module in train mode; `redraw` gives it weights."""
    model = RandomModule(spec).train()
    parameters = list(model.parameters())
    for place in spec.frozen if parameters else ():
        parameters[place % len(parameters)].requires_grad_(False)
    return model


def redraw(model: nn.Module, seed: int) -> None:
    """Draw every parameter: norms near one, everything else such that a map keeps the size of what it maps."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        fan = parameter[0].numel() if parameter.dim() > 1 else 8
        drawn = torch.randn(parameter.shape) / fan**0.5
        parameter.data.copy_(drawn + 1.0 if name.endswith("norm.weight") else drawn)


def inputs_of(spec: Spec, seed: int) -> dict[str, Tensor]:
    """Return random inputs by name; `y` where a step reads it."""
    torch.manual_seed(seed)
    names = ("x", "y") if "extra" in spec.kinds() else ("x",)
    inputs = {name: torch.randn(spec.batch, spec.tokens, spec.width) for name in names}
    if spec.ids:
        inputs["x"] = torch.randint(IDS, (spec.batch, spec.tokens))
    return {
        name: value.requires_grad_(name in spec.grad and value.is_floating_point()) for name, value in inputs.items()
    }


def casts_once(spec: Spec) -> bool:
    """Whether autocast casts every weight, and every input with a gradient, once at most.

    Where a leaf is cast twice, autocast's cache lets eager execution add its gradients in half precision, which a
    region does in full. Without the cache, eager execution does it in full, too.
    """
    return not spec.grad and spec.kinds().isdisjoint({"twice", "tied", "autoencoder"})


def loss_of(spec: Spec, output: Any) -> Tensor:
    """Return a scalar that depends on every output but the unused ones, in float32 or more."""
    if spec.outputs == "loss":
        return output["loss"]
    names = ["last", *(f"tap_{place}" for place in spec.taps)]
    results = {"tensor": lambda: {"last": output}, "tuple": lambda: dict(zip(names, output, strict=True))}
    found = results.get(spec.outputs, lambda: output)()
    used = [value for name, value in found.items() if name not in {f"tap_{place}" for place in spec.unused}]
    return sum(
        (value.to(torch.promote_types(value.dtype, torch.float32)).sin().sum() for value in used), torch.zeros(())
    )


# -- strategies -------------------------------------------------------------------------------------------------------


@st.composite
def specs(draw: Draw, most: int = 6) -> Spec:
    """Draw a spec of a module that trains, with at most that many steps; half of them have blocks, at the top."""
    width, ids = draw(st.sampled_from(WIDTHS)), draw(st.integers(0, 7)) == 7
    count = draw(st.integers(2, most))
    steps = _steps(draw, width, count, 2 if most > 3 else 1, blocks_at=draw(st.integers(0, 2 * count - 1)))
    outputs = draw(st.sampled_from(["tensor", "tensor", "tuple", "dict", "loss"]))
    taps = draw(st.lists(st.integers(1, count), unique=True, max_size=2)) if outputs in ("tuple", "dict") else []
    spec = Spec(
        steps,
        width,
        tokens=draw(st.integers(3, 6)),
        batch=draw(st.integers(2, 4)),
        ids=ids,
        grad=tuple(name for name in "xy" if draw(st.booleans())),
        outputs=outputs,
        head=draw(st.sampled_from(["none", "none", "mean", "first"])),
        taps=tuple(taps),
        unused=tuple(tap for tap in taps if draw(st.booleans())),
        frozen=tuple(draw(st.lists(st.integers(0, 20), max_size=3))) if draw(st.booleans()) else (),
    )
    assume(trains(spec))
    return spec


def trains(spec: Spec) -> bool:
    """Whether anything needs a gradient."""
    wanted = [*build(spec).parameters(), *inputs_of(spec, 0).values()]
    return any(tensor.requires_grad for tensor in wanted)


def _steps(draw: Draw, width: int, count: int, depth: int, blocks_at: int | None = None) -> tuple[Step, ...]:
    """Draw steps, nested down to a depth; inner ones return to the width that they start from, and hold no blocks."""
    # Residual sums are what inverses are mostly about.
    more = ["residual"] * 4 if depth else []
    kinds = [kind for kind in KINDS if kind != "blocks" and (depth or not KINDS[kind].nests)] + more
    steps: list[Step] = []
    before = width
    for place in range(count):
        kind = "blocks" if place == blocks_at else draw(st.sampled_from(kinds))
        options = KINDS[kind].options(draw, width)
        body = _body(draw, kind, width, depth) if KINDS[kind].nests else ()
        steps.append(step(kind, *body, **options))
        width = options.get("out", width)
    if blocks_at is None and width != before:
        steps.append(step("linear", out=before, bias=True, relu=False))
    return tuple(steps)


def _body(draw: Draw, kind: str, width: int, depth: int) -> tuple[Step, ...]:
    """Draw inner steps: often a branch with a norm ahead of a map, as transformers have, since it can be inverted."""
    # A block of one operator would be no region.
    steps = _steps(draw, width, draw(st.integers(2 if kind == "blocks" else 1, 3)), depth - 1)
    if kind == "twice" or draw(st.booleans()):
        return steps
    map_of = draw(st.sampled_from(["attention", "linear", "gate"]))
    branch = (step("norm", of="layer", affine=True), step(map_of, **KINDS[map_of].options(draw, width)))
    width_after = branch[1].options.get("out", width)
    if width_after != width:
        branch += (
            step("act", **KINDS["act"].options(draw, width_after)),
            step("linear", out=width, bias=True, relu=False),
        )
    return (step("residual", *branch, minus=False), *steps) if kind == "blocks" else (*branch, *steps)
