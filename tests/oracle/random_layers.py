"""Kinds of random steps that hold no others: maps, norms, activations, reshapes, attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from hypothesis import strategies as st
from random_steps import Kind
from torch import nn
from torch.nn import functional as F

WIDTHS = (4, 6, 8, 12, 16)

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
