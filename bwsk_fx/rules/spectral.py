"""Fourier transforms: linear maps whose inverse is a Fourier transform again."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fft

from bwsk_fx.rules.affine import first
from bwsk_fx.rules.arguments import Arguments
from bwsk_fx.rules.contraction import value_of
from bwsk_fx.rules.registry import Call, erases, labels, preserves, unproven
from bwsk_fx.rules.sizes import as_int, elements
from bwsk_fx.rules.spelling import function_name
from bwsk_fx.rules.undo import Run, Undo, wide
from bwsk_fx.verdict import REFINED, Verdict

aten = torch.ops.aten

# Of each transform: the one that goes back, over any number of dimensions.
_BACK: dict[str, Callable[..., Tensor]] = {
    "fft": fft.ifftn,
    "ifft": fft.fftn,
    "rfft": fft.irfftn,
    "irfft": fft.rfftn,
    "hfft": fft.ihfftn,
    "ihfft": fft.hfftn,
}
_TRANSFORMS = [getattr(fft, kind + rank) for kind in _BACK for rank in ("", "2", "n")]


@dataclass(frozen=True)
class Transform:
    """A call of a Fourier transform.

    Attributes:
        kind: Its name, without a rank.
        dims: The dimensions that it transforms; the last one is halved, or doubled.
        sizes: The transform's length in each of them; of the real side where one side is.
        norm: The normalization.
    """

    kind: str
    dims: tuple[int, ...]
    sizes: tuple[Any, ...]
    norm: str | None

    @property
    def used(self) -> tuple[Any, ...]:
        """How many elements it reads in each dimension."""
        if self.kind in ("irfft", "hfft"):
            return (*self.sizes[:-1], self.sizes[-1] // 2 + 1)
        return self.sizes


def read(arguments: Arguments) -> Transform:
    """Read a call of one of the functions of `torch.fft`."""
    name = function_name(arguments).removeprefix("fft_")
    kind = name.rstrip("2n")
    shape = value_of(first(arguments)).shape
    sizes, dims = arguments.argument(1, "n" if name == kind else "s"), arguments.argument(2, "dim", _default(name))
    sizes, dims = ((option,) if isinstance(option, int) else option for option in (sizes, dims))
    if dims is None:
        count = len(shape) if sizes is None else len(sizes)
        dims = tuple(range(-count, 0))
    dims = tuple(dim % len(shape) for dim in dims) if shape else ()
    given = (-1,) * len(dims) if sizes is None else tuple(sizes)
    natural = [_natural(kind, shape[dim], dim == dims[-1]) for dim in dims]
    lengths = tuple(one if size == -1 else size for one, size in zip(natural, given, strict=True))
    return Transform(kind, dims, lengths, arguments.argument(3, "norm"))


def _default(name: str) -> Any:
    return None if name.endswith("n") else (-2, -1) if name.endswith("2") else -1


def _natural(kind: str, size: Any, last: bool) -> Any:
    return 2 * (size - 1) if last and kind in ("irfft", "hfft") else size


@labels(*_TRANSFORMS)
def transform(call: Call) -> Verdict:
    """S by the transform back, unless elements are cropped or take part only by their real parts."""
    form = read(call)
    shape = call.before.shape
    sizes = [as_int(size) for size in (*form.used, *(shape[dim] for dim in form.dims))]
    if None in sizes:
        return unproven("its length varies with the batch")
    kept = [min(shape[dim], used) for dim, used in zip(form.dims, form.used, strict=True)]
    lines = [shape[dim] for dim in form.dims]
    cropped = math.prod(lines) - math.prod(kept)
    lost = cropped + _imaginary(form, call.before.is_complex(), kept)
    if not lost:
        if form.kind in ("irfft", "hfft") and any(one < size for one, size in zip(kept[:-1], form.sizes, strict=False)):
            return unproven("its padding mixes elements with zeros at the ends of the spectrum")
        return preserves("the transform back rebuilds the operand", confidence=REFINED, undo=Undo(_undo_transform))
    total = elements(call.before)
    amount = None if total is None else total // math.prod(lines) * lost
    why = "it reads a part of the operand" if cropped else "of its first or middle line, only real parts are read"
    return erases(why, amount, confidence=REFINED)


def _imaginary(form: Transform, is_complex: bool, kept: Sequence[int]) -> float:
    """Return how many elements are lost since a real result has no imaginary parts at the ends of the spectrum.

    There, each element is read as its sum with the conjugate of its mirror image, if that is among the elements, too.
    """
    if form.kind not in ("irfft", "hfft"):
        return 0
    half = form.sizes[-1] // 2
    ends = {0, half} if form.sizes[-1] % 2 == 0 else {0}
    lines = sum(1 for end in ends if end < kept[-1])
    pairs = list(zip(form.sizes[:-1], kept[:-1], strict=True))
    mirrored = math.prod(size if read == size else 1 + max(0, 2 * read - size - 1) for size, read in pairs)
    if is_complex:
        return lines * mirrored / 2
    own = math.prod(1 + (size % 2 == 0 and size // 2 < read) for size, read in pairs)
    return lines * (mirrored - own) // 2


def _undo_transform(run: Run) -> Tensor:
    form, operand = read(run), first(run)
    result = run.output.to(wide(run.output.dtype))
    if not form.dims:
        return _as(result, operand)
    back = _BACK[form.kind](result, s=form.sizes, dim=form.dims, norm=form.norm)
    for dim in form.dims:
        back = back.narrow(dim, 0, operand.shape[dim])
    return _as(back, operand)


def _as(value: Tensor, operand: Tensor) -> Tensor:
    return value.real if value.is_complex() and not operand.is_complex() else value


@labels(fft.fftshift, fft.ifftshift)
def shift(call: Call) -> Verdict:
    """Moves elements around."""
    forward = call.node.target is fft.fftshift
    undo = Undo(_undo_fftshift if forward else _undo_ifftshift)
    return preserves("it moves elements, and moving them back rebuilds the operand", undo=undo)


def _undo_fftshift(run: Run) -> Tensor:
    return fft.ifftshift(run.output, run.argument(1, "dim"))


def _undo_ifftshift(run: Run) -> Tensor:
    return fft.fftshift(run.output, run.argument(1, "dim"))


# -- ATen's transforms, with a number for the normalization: none, by the square root, by the length -------------------

_NORM_BACK = {0: 2, 1: 1, 2: 0}


@labels(atens="_fft_c2c _fft_r2c")
def aten_transform(call: Call) -> Verdict:
    """S by the transform back."""
    undo = Undo(_undo_c2c if "c2c" in str(call.node.target) else _undo_r2c)
    return preserves("the transform back rebuilds the operand", confidence=REFINED, undo=undo)


def _undo_c2c(run: Run) -> Tensor:
    _, dims, norm, forward = run.args
    return aten._fft_c2c(run.output.to(torch.complex128), dims, _NORM_BACK[norm], not forward)


def _undo_r2c(run: Run) -> Tensor:
    operand, dims, norm, onesided = run.args
    result = run.output.to(torch.complex128)
    if onesided:
        return aten._fft_c2r(result, dims, _NORM_BACK[norm], operand.shape[dims[-1]])
    return aten._fft_c2c(result, dims, _NORM_BACK[norm], False).real


@labels(atens="_fft_c2r")
def aten_real_transform(call: Call) -> Verdict:
    """Only real parts are read at the ends of the spectrum."""
    return erases("of its first or middle line, only real parts are read", confidence=REFINED)
