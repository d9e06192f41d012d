"""The operations of random programs, by name: which kinds of values they read, their options, and what they do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TOKENS, WIDTH, IDS = 4, 6, 3
FLOAT, INTEGER, BOOLEAN = "f", "i", "b"


class Pool(nn.Module):
    """The modules and parameters that programs use, each as often as it happens; tied and frozen ones among them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.frozen = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.second.weight = self.first.weight
        self.frozen.requires_grad_(False)
        self.norm, self.rms = nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.embedding = nn.Embedding(IDS, WIDTH)
        self.convolution = nn.Conv1d(TOKENS, TOKENS, 3, padding=1)
        self.dropout, self.act = nn.Dropout(0.3), nn.GELU()
        self.inplace = nn.ReLU(inplace=True)
        self.scale, self.shift = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.zeros(()))
        self.matrix = nn.Parameter(torch.ones(WIDTH, WIDTH))
        self.register_buffer("places", torch.tensor([2, 0, 1, 1]))


def kind_of(value: Any) -> str:
    if value.dtype is torch.bool:
        return BOOLEAN
    return FLOAT if value.is_floating_point() else INTEGER


@dataclass(frozen=True)
class Operation:
    kinds: str
    options: Callable[..., dict[str, Any] | None]
    run: Callable[..., Any]


OPERATIONS: dict[str, Operation] = {}


def _none(pick: Any, *values: Tensor) -> dict[str, Any]:
    return {}


def _dim(pick: Any, x: Tensor, *others: Tensor) -> dict[str, Any] | None:
    """Any dimension, counted from either end."""
    return {"dim": pick(range(-x.dim(), x.dim()))} if x.dim() else None


def _inner(pick: Any, x: Tensor, *others: Tensor) -> dict[str, Any] | None:
    """A dimension that is not the first, which may be the batch."""
    return {"dim": pick(range(1, x.dim()))} if x.dim() > 1 else None


def _keep(pick: Any, x: Tensor) -> dict[str, Any] | None:
    return {"dim": pick(range(-x.dim(), x.dim())), "keepdim": pick([False, True])} if x.dim() else None


def _some(pick: Any, *values: Tensor) -> dict[str, Any] | None:
    """At least one dimension each."""
    return {} if all(value.dim() for value in values) else None


def _wide(pick: Any, x: Tensor, *others: Tensor) -> dict[str, Any] | None:
    return {} if x.dim() and x.shape[-1] == WIDTH else None


def _add(name: str, kinds: str, run: Callable[..., Any], options: Callable[..., Any] = _none) -> None:
    OPERATIONS[name] = Operation(kinds, options, run)


def _of(**choices: list[Any]) -> Callable[..., dict[str, Any]]:
    return lambda pick, *values: {name: pick(found) for name, found in choices.items()}


# -- elementwise ------------------------------------------------------------------------------------------------------

_ACTIVATIONS = (
    "relu gelu silu elu selu celu mish softplus leaky_relu hardswish hardsigmoid hardtanh relu6 logsigmoid softsign "
    "tanhshrink hardshrink softshrink"
)
_FUNCTIONS = "tanh sigmoid sin cos atan asinh erf neg square abs sign floor round expm1 sinc"
_UNARY = {name: getattr(F, name) for name in _ACTIVATIONS.split()}
_UNARY |= {name: getattr(torch, name) for name in _FUNCTIONS.split()}
_SAFE: dict[str, Callable[[Tensor], Tensor]] = {
    "exp": lambda x: x.clamp(-3, 3).exp(),
    "log": lambda x: (x * x + 0.5).log(),
    "sqrt": lambda x: (x.abs() + 0.1).sqrt(),
    "rsqrt": lambda x: torch.rsqrt(x.square() + 0.5),
    "reciprocal": lambda x: 1.0 / (2.0 + x.cos()),
    "affine": lambda x: 2.0 * x - 1.0,
    "halved": lambda x: x / 2,
    "same": lambda x: x * 1.0 + 0,
    "rsub": lambda x: 1 - x,
    "sigmoid_gate": lambda x: x * torch.sigmoid(1.702 * x),
    "clamped": lambda x: x.clamp(min=-0.5, max=0.7),
    "cube": lambda x: x.pow(3) / (1 + x.abs().pow(3)),
    "clone": lambda x: x.clone(),
    "contiguous": lambda x: x.contiguous(),
    "detach": lambda x: x.detach(),
    "nan_to_num": lambda x: torch.nan_to_num(x),
    "logit": lambda x: torch.logit(x.sigmoid(), eps=1e-3),
    "exp2_log2": lambda x: torch.log2(torch.exp2(x.clamp(-2, 2)) + 1),
}
for _name, _run in (_UNARY | _SAFE).items():
    _add(_name, FLOAT, lambda pool, x, run=_run: run(x))

_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "add_alpha": lambda x, y: torch.add(x, y, alpha=0.5),
    "sub": torch.sub,
    "mul": torch.mul,
    "div": lambda x, y: x / (1 + y * y),
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "lerp": lambda x, y: torch.lerp(x, y, 0.3),
    "lerp_tensor": lambda x, y: torch.lerp(x, y.sigmoid(), y),
    "addcmul": lambda x, y: torch.addcmul(x, x, y, value=0.5),
    "hypot": lambda x, y: torch.hypot(x, y.abs() + 1),
    "atan2": lambda x, y: torch.atan2(x, y.abs() + 1),
    "pow": lambda x, y: (x.abs() + 0.5) ** y.tanh(),
    "logaddexp": torch.logaddexp,
    "fmod": lambda x, y: torch.fmod(x, y.abs() + 0.5),
    "remainder": lambda x, y: x % (y.abs() + 0.5),
    "copysign": torch.copysign,
    "gate": lambda x, y: F.silu(x) * y,
    "smooth_l1": lambda x, y: F.smooth_l1_loss(x, y, reduction="none"),
    "mse": lambda x, y: F.mse_loss(x, y),
    "dist": lambda x, y: torch.dist(x, y),
}
for _name, _run in _BINARY.items():
    _add(_name, FLOAT * 2, lambda pool, x, y, run=_run: run(x, y))
_add("add_both", FLOAT * 2, lambda pool, x, y: (x + y, x - y))
_add("couple", FLOAT * 2, lambda pool, x, y: (x, y + x.tanh()))
_add("by_batch", FLOAT, lambda pool, x: x / x.shape[0], _some)
_add("where", BOOLEAN + FLOAT * 2, lambda pool, b, x, y: torch.where(b, x, y))
_add("where_scalar", BOOLEAN + FLOAT, lambda pool, b, x: torch.where(b, x, 0.25))
_add("masked_fill", FLOAT + BOOLEAN, lambda pool, x, b: x.masked_fill(b, -1.5))
_add("mask_row", FLOAT + BOOLEAN, lambda pool, x, b: x * b.unsqueeze(-1))
_add("scale", FLOAT, lambda pool, x: x * pool.scale, _wide)
_add("shift", FLOAT, lambda pool, x: x + pool.shift)
_add("divide_scale", FLOAT, lambda pool, x: x / (pool.scale.square() + 1), _wide)

# -- modules and products ---------------------------------------------------------------------------------------------

for _name in ("first", "second", "frozen", "norm", "rms"):
    _add(_name, FLOAT, lambda pool, x, name=_name: getattr(pool, name)(x), _wide)
for _name in ("dropout", "act", "inplace"):
    _add(_name, FLOAT, lambda pool, x, name=_name: getattr(pool, name)(x))
_add("embedding", INTEGER, lambda pool, i: pool.embedding(i.remainder(IDS)))
_add("convolution", FLOAT, lambda pool, x: pool.convolution(x), lambda pick, x: {} if _is_row(x) else None)
_add("matrix", FLOAT, lambda pool, x: x @ pool.matrix, _wide)
_add("matrix_t", FLOAT, lambda pool, x: F.linear(x, pool.matrix, pool.scale), _wide)
_add("layer_norm", FLOAT, lambda pool, x: F.layer_norm(x, x.shape[-1:]), _some)
_add("normalize", FLOAT, lambda pool, x, dim: F.normalize(x, dim=dim), _dim)
_add("dropout_twice", FLOAT * 2, lambda pool, x, y: _one_mask(x, y))
_add("scores", FLOAT * 2, lambda pool, x, y: x @ y.transpose(-1, -2))
_add("matmul", FLOAT * 2, lambda pool, x, y: torch.matmul(x, y))
_add("outer", FLOAT * 2, lambda pool, x, y: torch.einsum("btw,bsw->bts", x, y))
_add("einsum", FLOAT * 2, lambda pool, x, y: torch.einsum("btw,btw->bt", x, y))
_add("baddbmm", FLOAT * 3, lambda pool, x, y, z: torch.baddbmm(x, y, z, beta=0.5, alpha=2.0))
_add("attention", FLOAT * 3, lambda pool, x, y, z: F.scaled_dot_product_attention(x, y, z))
_add("causal", FLOAT * 2, lambda pool, x, y: F.scaled_dot_product_attention(x, x, y, is_causal=True))
_add("cdist", FLOAT * 2, lambda pool, x, y: torch.cdist(x, y + 0.1))
_add("cosine", FLOAT * 2, lambda pool, x, y: F.cosine_similarity(x, y, dim=-1))


def _is_row(x: Tensor) -> bool:
    return x.dim() == 3 and x.shape[1] == TOKENS


def _one_mask(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    mask = F.dropout(torch.ones_like(x), 0.4)
    return x * mask, y * mask


# -- views and shapes -------------------------------------------------------------------------------------------------


def _halves(pick: Any, x: Tensor) -> dict[str, Any] | None:
    dims = [dim for dim in range(1, x.dim()) if x.shape[dim] % 2 == 0]
    return {"dim": pick(dims)} if dims else None


def _dims(pick: Any, x: Tensor) -> dict[str, Any] | None:
    return {"one": pick(range(x.dim())), "other": pick(range(-x.dim(), 0))} if x.dim() > 1 else None


def _row(pick: Any, x: Tensor, *others: Tensor) -> dict[str, Any] | None:
    return {} if x.dim() == 3 else None


_add("split", FLOAT, lambda pool, x, dim: torch.split(x, x.shape[dim] // 2, dim), _halves)
_add("split_uneven", FLOAT, lambda pool, x: x.split([1, 2, 3], dim=-1), _wide)
_add("chunk", FLOAT, lambda pool, x, dim: x.chunk(2, dim), _halves)
_add("unbind", FLOAT, lambda pool, x, dim: x.unbind(dim)[:3], _inner)
_add("glu", FLOAT, lambda pool, x, dim: F.glu(x, dim), _halves)
_add("cat", FLOAT * 2, lambda pool, x, y, dim: torch.cat([x, y], dim), _dim)
_add("cat_thrice", FLOAT, lambda pool, x, dim: torch.cat([x, x, x], dim), _inner)
_add("stack", FLOAT * 2, lambda pool, x, y, dim: torch.stack([x, y], dim), _dim)
_add("narrow", FLOAT, lambda pool, x, dim: x.narrow(dim, 1, x.shape[dim] - 1), _inner)
_add("select", FLOAT, lambda pool, x, dim: x.select(dim, -1), _dim)
_add("strided", FLOAT, lambda pool, x: x[..., ::2], _some)
_add("head", FLOAT, lambda pool, x: x[:, 0], lambda pick, x: {} if x.dim() > 1 else None)
_add("newaxis", FLOAT, lambda pool, x: x[:, None], lambda pick, x: {} if x.dim() > 1 else None)
_add("flip", FLOAT, lambda pool, x, dim: x.flip(dim), _dim)
_add("roll", FLOAT, lambda pool, x, dim: x.roll(1, dim), _dim)
_add("transpose", FLOAT, lambda pool, x, one, other: x.transpose(one, other), _dims)
_add("flatten", FLOAT, lambda pool, x: x.flatten(1), lambda pick, x: {} if x.dim() > 1 else None)
_add("merge", FLOAT, lambda pool, x: x.reshape(-1, x.shape[-1]), lambda pick, x: {} if x.dim() > 1 else None)
_add("part", FLOAT, lambda pool, x: x.reshape(x.shape[0], -1, 2), lambda pick, x: {} if x.dim() > 1 else None)
_add("unflatten", FLOAT, lambda pool, x: x.unflatten(-1, (2, 3)), _wide)
_add("unsqueeze", FLOAT, lambda pool, x, dim: x.unsqueeze(dim), _dim)
_add("squeeze", FLOAT, lambda pool, x: x.squeeze(-1), _some)
_add("expand", FLOAT, lambda pool, x: x.unsqueeze(1).expand(-1, 3, *x.shape[1:]), _some)
_add("expand_shift", FLOAT, lambda pool, x: pool.shift.expand_as(x) * x)
_add("repeat", FLOAT, lambda pool, x: x.repeat(1, 2), lambda pick, x: {} if x.dim() == 2 else None)
_add("repeat_interleave", FLOAT, lambda pool, x, dim: x.repeat_interleave(2, dim), _inner)
_add("pad", FLOAT, lambda pool, x: F.pad(x, (1, 1), value=0.5), _some)
_add("reflect", FLOAT, lambda pool, x: F.pad(x, (1, 1), mode="reflect"), _row)
_add("unfold", FLOAT, lambda pool, x: x.unfold(-1, 3, 2), _wide)
_add("diagonal", FLOAT, lambda pool, x: x.diagonal(dim1=-2, dim2=-1), lambda pick, x: {} if x.dim() > 1 else None)
_add("tril", FLOAT, lambda pool, x: x.tril(), lambda pick, x: {} if x.dim() > 1 else None)
_add("diag_embed", FLOAT, lambda pool, x: torch.diag_embed(x), lambda pick, x: {} if x.dim() == 2 else None)
_add("permute", FLOAT, lambda pool, x: x.permute(2, 0, 1), _row)
_add("window", FLOAT, lambda pool, x: F.avg_pool1d(x, 2), _row)
_add("max_window", FLOAT, lambda pool, x: F.max_pool1d(x, 2, return_indices=True), _row)
_add("upsample", FLOAT, lambda pool, x: F.interpolate(x, scale_factor=2, mode="nearest"), _row)

# -- gathers, integers, booleans, casts -------------------------------------------------------------------------------

_add("index", FLOAT, lambda pool, x: x[:, pool.places], lambda pick, x: {} if _is_row(x) else None)
_add("index_list", FLOAT, lambda pool, x: x[..., [0, -1, 0]], _some)
_add("index_select", FLOAT, lambda pool, x: x.index_select(-1, pool.places), _wide)
_add(
    "index_ids",
    FLOAT + INTEGER,
    lambda pool, x, i: x[:, i[0].remainder(2)],
    lambda pick, x, i: {} if i.dim() == 2 and _is_row(x) else None,
)
_add(
    "pairs",
    FLOAT + INTEGER,
    lambda pool, x, i: x[torch.arange(x.shape[0]), i[:, 0].remainder(2)],
    lambda pick, x, i: {} if i.dim() == 2 and _is_row(x) else None,
)
_add("gather", FLOAT + INTEGER, lambda pool, x, i: x.gather(1, i.remainder(x.shape[1])))
_add(
    "gather_rows", FLOAT + INTEGER, lambda pool, x, i: x.gather(1, i.remainder(x.shape[1])[..., None].expand(-1, -1, 2))
)
_add("take_along", FLOAT, lambda pool, x: torch.take_along_dim(x, x.argsort(-1), -1), _some)
_add("scatter", FLOAT + INTEGER, lambda pool, x, i: x.scatter(1, i.remainder(x.shape[1]), 0.5))
_add("scatter_add", FLOAT * 2 + INTEGER, lambda pool, x, y, i: x.scatter_add(1, i.remainder(x.shape[1]), y))
_add("index_add", FLOAT * 2, lambda pool, x, y: x.index_add(1, pool.places, y), _row)
_add("index_copy", FLOAT * 2, lambda pool, x, y: x.index_copy(1, pool.places[:3], y[:, :3]), _row)
_add("index_fill", FLOAT, lambda pool, x: x.index_fill(-1, pool.places, 0.1), _wide)
_add("sort", FLOAT, lambda pool, x, dim: x.sort(dim), _inner)
_add("topk", FLOAT, lambda pool, x, dim: x.topk(2, dim), _inner)
_add("argmax", FLOAT, lambda pool, x, dim: x.argmax(dim), _inner)
_add("compare", FLOAT * 2, lambda pool, x, y: x > y)
_add("positive", FLOAT, lambda pool, x: x > 0)
_add("not", BOOLEAN, lambda pool, b: ~b)
_add("and", BOOLEAN * 2, lambda pool, a, b: a & b)
_add("to_float", BOOLEAN, lambda pool, b: b.double())
_add("to_long", BOOLEAN, lambda pool, b: b.long())
_add("int_add", INTEGER, lambda pool, i: i + 1)
_add("int_cumsum", INTEGER, lambda pool, i: i.cumsum(-1), lambda pick, i: {} if i.dim() else None)
_add("int_to_float", INTEGER, lambda pool, i: i.double())
_add("int_mul", FLOAT + INTEGER, lambda pool, x, i: x * i[..., None])
_add("one_hot", INTEGER, lambda pool, i: F.one_hot(i.remainder(IDS), IDS).double())
_add("arange", FLOAT, lambda pool, x: x * torch.arange(WIDTH), _wide)
_add("zeros", FLOAT, lambda pool, x: torch.zeros_like(x) + x.mean())
_add("new_ones", FLOAT, lambda pool, x: x.new_ones(x.shape) - x)
_add("constant", FLOAT, lambda pool, x: x * torch.tensor([1.0, -2.0, 0.5, 1.0, 0.0, 3.0], dtype=torch.float64), _wide)
_add("single", FLOAT, lambda pool, x: x.float().double())
_add("half", FLOAT, lambda pool, x: x.bfloat16().to(x.dtype))

# -- reductions and scans ---------------------------------------------------------------------------------------------

for _name in ["sum", "mean", "amax", "amin", "var", "std", "logsumexp"]:
    _add(
        _name, FLOAT, lambda pool, x, dim, keepdim, name=_name: getattr(torch, name)(x, dim=dim, keepdim=keepdim), _keep
    )
for _name in ["max", "min", "median"]:
    _add(_name, FLOAT, lambda pool, x, dim, keepdim, name=_name: getattr(x, name)(dim, keepdim), _keep)
_add("prod", FLOAT, lambda pool, x, dim: x.tanh().prod(dim), _inner)
_add("norm_of", FLOAT, lambda pool, x, dim: torch.linalg.vector_norm(x, dim=dim), _inner)
_add("var_mean", FLOAT, lambda pool, x, dim: torch.var_mean(x, dim), _inner)
_add("total", FLOAT, lambda pool, x: x.sum())
_add("mean_all", FLOAT, lambda pool, x: x.mean())
_add("centre", FLOAT, lambda pool, x, dim: x - x.mean(dim, keepdim=True), _dim)
_add("softmax", FLOAT, lambda pool, x, dim: x.softmax(dim), _dim)
_add("log_softmax", FLOAT, lambda pool, x, dim: x.log_softmax(dim), _dim)
_add("cumsum", FLOAT, lambda pool, x, dim: x.cumsum(dim), _inner)
_add("cumprod", FLOAT, lambda pool, x, dim: x.tanh().cumprod(dim), _inner)
_add("logcumsumexp", FLOAT, lambda pool, x, dim: x.logcumsumexp(dim), _inner)
_add("cummax", FLOAT, lambda pool, x, dim: x.cummax(dim), _inner)
_add("diff", FLOAT, lambda pool, x: x.diff(dim=-1), _some)
_add(
    "cross_entropy",
    FLOAT + INTEGER,
    lambda pool, x, i: F.cross_entropy(x.flatten(0, 1), i.flatten().remainder(2)),
    lambda pick, x, i: {} if _is_row(x) else None,
)

# -- in place ---------------------------------------------------------------------------------------------------------


def _assign(x: Tensor, y: Tensor, place: Any) -> Tensor:
    x[place] = y
    return x


_add("add_", FLOAT * 2, lambda pool, x, y: x.add_(y))
_add("mul_", FLOAT, lambda pool, x: x.mul_(0.5))
_add("mul_own_", FLOAT * 2, lambda pool, x, y: x.clone().mul_(y))
_add("relu_", FLOAT, lambda pool, x: F.relu_(x))
_add("tanh_", FLOAT, lambda pool, x: x.tanh_())
_add("clamp_", FLOAT, lambda pool, x: x.clamp_(min=0.0))
_add("masked_fill_", FLOAT + BOOLEAN, lambda pool, x, b: x.masked_fill_(b, 0.0))
_add("copy_", FLOAT * 2, lambda pool, x, y: x.copy_(y))
_add("zero_", FLOAT, lambda pool, x: x.zero_())
_add("write_head", FLOAT * 2, lambda pool, x, y: _assign(x, y[:, 0], (slice(None), 0)), _row)
_add("write_own", FLOAT * 2, lambda pool, x, y: _assign(x.clone(), y[..., :1], (Ellipsis, slice(0, 1))), _some)
_add("view_write", FLOAT, lambda pool, x: (x, x.select(-1, 0).add_(1.0)), _some)
_add("scatter_", FLOAT + INTEGER, lambda pool, x, i: x.clone().scatter_(1, i.remainder(x.shape[1]), 0.5))
_add("int_add_", INTEGER, lambda pool, i: i.clone().add_(1))

WRITES = frozenset({name for name in OPERATIONS if name.endswith("_")} | {"write_head", "view_write", "inplace"})
