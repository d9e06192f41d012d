"""Random small modules: lists of steps that hypothesis draws, and the module that interprets them.

What works on tensors of sizes (batch, tokens, width) is a `Step`; most keep these sizes, some change the width. A
`Spec` holds steps, sizes, inputs and outputs, and prints as the expression that makes it:

    Spec(steps=(step('linear', out=8, bias=True), step('act', name='gelu')), width=4, tokens=3, batch=2)

`build(spec)` is the module, `inputs_of(spec)` are inputs for it. Weights come from a seed of the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

WIDTHS = (4, 6, 8, 12, 16)
IDS = 7  # How many embeddings there are.

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "silu": nn.SiLU,
    "leaky_relu": partial(nn.LeakyReLU, 0.1),
    "elu": nn.ELU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softmax": partial(nn.Softmax, dim=-1),
}


class Step:
    """One step: its kind, what it does to its inner steps if it has any, and numbers or names that say more."""

    def __init__(self, kind: str, body: tuple[Step, ...], options: dict[str, Any]) -> None:
        self.kind, self.body, self.options = kind, body, options

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["options"][name]
        except KeyError:
            raise AttributeError(name) from None

    def __repr__(self) -> str:
        parts = [repr(self.kind), *map(repr, self.body), *(f"{key}={value!r}" for key, value in self.options.items())]
        return f"step({', '.join(parts)})"

    def kinds(self) -> Iterator[str]:
        """Yield its kind and those of its inner steps."""
        yield self.kind
        for inner in self.body:
            yield from inner.kinds()


def step(kind: str, *body: Step, **options: Any) -> Step:
    return Step(kind, body, options)


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


# -- kinds of steps ---------------------------------------------------------------------------------------------------


class Parts(nn.Module):
    """What one step owns; `chain` makes its inner steps."""


Draw = Callable[[st.SearchStrategy], Any]


class Kind:
    """A kind of step, as static methods; a subclass registers itself under its name."""

    nests = False

    def __init_subclass__(cls, name: str) -> None:
        KINDS[name] = cls

    @staticmethod
    def options(draw: Draw, width: int) -> dict[str, Any]:
        return {}

    @staticmethod
    def build(own: Parts, step: Step, width: int, tokens: int) -> None: ...

    @staticmethod
    def run(own: Parts, step: Step, x: Tensor, y: Tensor) -> Tensor:
        raise NotImplementedError


KINDS: dict[str, type[Kind]] = {}


class Chain(nn.Module):
    """Interprets steps. Its children are named, not numbered: only those of `blocks` are blocks."""

    def __init__(self, steps: tuple[Step, ...], width: int, tokens: int, extra: int) -> None:
        super().__init__()
        self.steps, self.parts = steps, nn.ModuleDict()
        self.widths = [width]
        for place, each in enumerate(steps):
            own = Parts()
            own.extra = extra
            KINDS[each.kind].build(own, each, self.widths[-1], tokens)
            self.parts[f"{each.kind}_{place}"] = own
            self.widths.append(each.options.get("out", self.widths[-1]))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.results(x, y)[-1]

    def results(self, x: Tensor, y: Tensor) -> list[Tensor]:
        found = [x]
        for each, own in zip(self.steps, self.parts.values(), strict=True):
            found.append(KINDS[each.kind].run(own, each, found[-1], y))
        return found


def _chain(own: Parts, step: Step, width: int, tokens: int) -> Chain:
    return Chain(step.body, width, tokens, own.extra)


class _Linear(Kind, name="linear"):
    @staticmethod
    def options(draw, width):
        return {"out": draw(st.sampled_from(WIDTHS)), "bias": draw(st.booleans()), "relu": draw(st.integers(0, 4)) == 4}

    @staticmethod
    def build(own, step, width, tokens):
        own.linear = nn.Linear(width, step.out, bias=step.bias)
        own.act = nn.ReLU(inplace=True)

    @staticmethod
    def run(own, step, x, y):
        return own.act(own.linear(x)) if step.relu else own.linear(x)


class _Autoencoder(Kind, name="autoencoder"):
    """Two maps with one weight, the second time transposed."""

    @staticmethod
    def options(draw, width):
        return {"hidden": draw(st.sampled_from(WIDTHS)), "name": draw(st.sampled_from(sorted(ACTIVATIONS)))}

    @staticmethod
    def build(own, step, width, tokens):
        own.linear, own.act = nn.Linear(width, step.hidden), ACTIVATIONS[step.name]()

    @staticmethod
    def run(own, step, x, y):
        return F.linear(own.act(own.linear(x)), own.linear.weight.t())


class _Tied(Kind, name="tied"):
    """Two modules whose weights are one parameter."""

    @staticmethod
    def build(own, step, width, tokens):
        own.first, own.second = nn.Linear(width, width), nn.Linear(width, width)
        own.second.weight = own.first.weight

    @staticmethod
    def run(own, step, x, y):
        return own.second(own.first(x).tanh())


class _Twice(Kind, name="twice"):
    """The same modules one after the other, twice."""

    nests = True

    @staticmethod
    def build(own, step, width, tokens):
        own.body = _chain(own, step, width, tokens)

    @staticmethod
    def run(own, step, x, y):
        return own.body(own.body(x, y), y)


class _Residual(Kind, name="residual"):
    nests = True

    @staticmethod
    def options(draw, width):
        return {"minus": draw(st.booleans())}

    @staticmethod
    def build(own, step, width, tokens):
        own.body = _chain(own, step, width, tokens)

    @staticmethod
    def run(own, step, x, y):
        return x - own.body(x, y) if step.minus else x + own.body(x, y)


class _Blocks(Kind, name="blocks"):
    """Equal chains with weights of their own, in a `ModuleList`."""

    nests = True

    @staticmethod
    def options(draw, width):
        return {"count": draw(st.integers(2, 3))}

    @staticmethod
    def build(own, step, width, tokens):
        own.blocks = nn.ModuleList([_chain(own, step, width, tokens) for _ in range(step.count)])

    @staticmethod
    def run(own, step, x, y):
        for block in own.blocks:
            x = block(x, y)
        return x


class _Norm(Kind, name="norm"):
    @staticmethod
    def options(draw, width):
        return {"of": draw(st.sampled_from(["layer", "layer", "rms", "group"])), "affine": draw(st.integers(0, 3)) > 0}

    @staticmethod
    def build(own, step, width, tokens):
        if step.of == "group":
            own.norm = nn.GroupNorm(2, width, affine=step.affine)
        else:
            norm = nn.LayerNorm if step.of == "layer" else partial(nn.RMSNorm, eps=1e-6)
            own.norm = norm(width, elementwise_affine=step.affine)

    @staticmethod
    def run(own, step, x, y):
        if step.of == "group":
            return own.norm(x.transpose(1, 2)).transpose(1, 2)
        return own.norm(x)


class _Conv1d(Kind, name="conv1d"):
    @staticmethod
    def options(draw, width):
        return {"out": draw(st.sampled_from(WIDTHS)), "kernel": draw(st.sampled_from([1, 3]))}

    @staticmethod
    def build(own, step, width, tokens):
        own.conv = nn.Conv1d(width, step.out, step.kernel, padding=step.kernel // 2)

    @staticmethod
    def run(own, step, x, y):
        return own.conv(x.transpose(1, 2)).transpose(1, 2)


class _Conv2d(Kind, name="conv2d"):
    """Tokens and width as an image of one channel."""

    @staticmethod
    def options(draw, width):
        return {"channels": draw(st.integers(1, 3)), "bias": draw(st.booleans())}

    @staticmethod
    def build(own, step, width, tokens):
        own.first = nn.Conv2d(1, step.channels, 3, padding=1, bias=step.bias)
        own.second = nn.Conv2d(step.channels, 1, 1)

    @staticmethod
    def run(own, step, x, y):
        return own.second(own.first(x.unsqueeze(1)).relu()).squeeze(1)


class _Act(Kind, name="act"):
    @staticmethod
    def options(draw, width):
        return {"name": draw(st.sampled_from(sorted(ACTIVATIONS)))}

    @staticmethod
    def build(own, step, width, tokens):
        own.act = ACTIVATIONS[step.name]()

    @staticmethod
    def run(own, step, x, y):
        return own.act(x)


class _Dropout(Kind, name="dropout"):
    @staticmethod
    def options(draw, width):
        return {"p": draw(st.sampled_from([0.0, 0.1, 0.5]))}

    @staticmethod
    def build(own, step, width, tokens):
        own.dropout = nn.Dropout(step.p)

    @staticmethod
    def run(own, step, x, y):
        return own.dropout(x)


class _Number(Kind, name="number"):
    """A product, a quotient, a sum or a difference with a number."""

    @staticmethod
    def options(draw, width):
        return {"op": draw(st.sampled_from("*/+-")), "by": draw(st.sampled_from([0.5, 3.0, -1.5, 0.1]))}

    @staticmethod
    def run(own, step, x, y):
        return {"*": x.mul, "/": x.div, "+": x.add, "-": x.sub}[step.op](step.by)


class _Parameter(Kind, name="parameter"):
    """A parameter that the module reads itself: LayerScale or a positional embedding."""

    @staticmethod
    def options(draw, width):
        return {"role": draw(st.sampled_from(["scale", "position"]))}

    @staticmethod
    def build(own, step, width, tokens):
        own.own = nn.Parameter(torch.zeros(width) if step.role == "scale" else torch.zeros(tokens, width))

    @staticmethod
    def run(own, step, x, y):
        return x * own.own if step.role == "scale" else x + own.own


class _Gate(Kind, name="gate"):
    """A product of two things that depend on the input."""

    @staticmethod
    def options(draw, width):
        return {"by": draw(st.sampled_from(["linear", "itself", "detached", "swish", "chunks"]))}

    @staticmethod
    def build(own, step, width, tokens):
        if step.by in ("linear", "chunks"):
            own.gate = nn.Linear(width, width if step.by == "linear" else 2 * width)

    @staticmethod
    def run(own, step, x, y):
        if step.by == "chunks":
            left, right = own.gate(x).chunk(2, dim=-1)
            return left * right.sigmoid()
        gates = {"itself": lambda: x, "detached": lambda: x.detach().sigmoid(), "swish": x.sigmoid}
        return x * (own.gate(x).sigmoid() if step.by == "linear" else gates[step.by]())


class _Reshape(Kind, name="reshape"):
    """A map over other axes: tokens, all but the batch, or halves of the width."""

    @staticmethod
    def options(draw, width):
        return {"to": draw(st.sampled_from(["tokens", "flat", "halves"])), "bias": draw(st.booleans())}

    @staticmethod
    def build(own, step, width, tokens):
        size = {"tokens": tokens, "flat": tokens * width, "halves": width // 2}[step.to]
        own.linear, own.sizes = nn.Linear(size, size, bias=step.bias), (tokens, width)

    @staticmethod
    def run(own, step, x, y):
        if step.to == "tokens":
            return own.linear(x.transpose(1, 2)).transpose(1, 2)
        if step.to == "flat":
            return own.linear(x.flatten(1)).unflatten(1, own.sizes)
        return own.linear(x.reshape(x.shape[0], x.shape[1], 2, -1)).reshape(x.shape)


class _Split(Kind, name="split"):
    """Parts of the width that are treated differently and put together in another order."""

    @staticmethod
    def options(draw, width):
        return {"first": draw(st.integers(1, width - 1)), "name": draw(st.sampled_from(sorted(ACTIVATIONS)))}

    @staticmethod
    def build(own, step, width, tokens):
        own.act, own.sizes = ACTIVATIONS[step.name](), [step.first, width - step.first]

    @staticmethod
    def run(own, step, x, y):
        left, right = x.split(own.sizes, dim=-1)
        return torch.cat([own.act(right), left], dim=-1)


class _Centre(Kind, name="centre"):
    @staticmethod
    def options(draw, width):
        return {"dim": draw(st.sampled_from([1, -1]))}

    @staticmethod
    def run(own, step, x, y):
        return x - x.mean(step.dim, keepdim=True)


class _Extra(Kind, name="extra"):
    """The module's second input comes in."""

    @staticmethod
    def options(draw, width):
        return {"op": draw(st.sampled_from("+*"))}

    @staticmethod
    def build(own, step, width, tokens):
        own.linear = nn.Linear(own.extra, width)

    @staticmethod
    def run(own, step, x, y):
        return x + own.linear(y) if step.op == "+" else x * own.linear(y).sigmoid()


class _Attention(Kind, name="attention"):
    @staticmethod
    def options(draw, width):
        return {
            "heads": draw(st.sampled_from([heads for heads in (1, 2, 4) if width % heads == 0])),
            "fused": draw(st.booleans()),
            "by_hand": draw(st.booleans()),
            "causal": draw(st.integers(0, 3)) == 3,
            "dropout": draw(st.sampled_from([0.0, 0.0, 0.0, 0.1])),
        }

    @staticmethod
    def build(own, step, width, tokens):
        own.maps = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width)} if step.fused else {})
        if not step.fused:
            own.maps.update({name: nn.Linear(width, width) for name in ("query", "key", "value")})
        own.dropout = nn.Dropout(step.dropout)
        own.register_buffer("mask", torch.ones(tokens, tokens).tril() == 0)

    @staticmethod
    def run(own, step, x, y):
        maps = own.maps.values()
        parts = next(iter(maps))(x).chunk(3, dim=-1) if step.fused else [linear(x) for linear in maps]
        query, key, value = (part.unflatten(-1, (step.heads, -1)).transpose(1, 2) for part in parts)
        if step.by_hand:
            scores = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
            scores = scores.masked_fill(own.mask, float("-inf")) if step.causal else scores
            context = own.dropout(scores.softmax(-1)) @ value
        else:
            rate = step.dropout if own.training else 0.0
            context = F.scaled_dot_product_attention(query, key, value, dropout_p=rate, is_causal=step.causal)
        return context.transpose(1, 2).flatten(2)


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
