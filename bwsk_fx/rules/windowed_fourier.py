"""Short-time Fourier transforms: each window's spectrum has the window, and windows that overlap cover the signal."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bwsk_fx.rules.arguments import Arguments
from bwsk_fx.rules.contraction import value_of
from bwsk_fx.rules.registry import Call, erases, labels, other_operand, preserves, unproven
from bwsk_fx.rules.sizes import as_int, elements
from bwsk_fx.rules.undo import Run, Undo, wide
from bwsk_fx.verdict import NOTHING, REFINED, Verdict


@dataclass(frozen=True)
class Frames:
    """The windows of a short-time Fourier transform.

    Attributes:
        length: Samples of the signal; symbolic where it varies with the batch.
        size: Samples of a window.
        hop: Samples between the starts of two windows.
        shape: What each window is multiplied with; None for ones.
        taken: How many samples `shape` has, in the middle of the window.
        around: Samples of padding on either side.
        mode: What the padding is made of.
        normalized: Whether spectra are divided by the square root of `size`.
    """

    length: Any
    size: int
    hop: int
    shape: Any
    taken: int
    around: int
    mode: str
    normalized: bool

    @property
    def count(self) -> int:
        """How many windows there are."""
        return 1 + (self.length + 2 * self.around - self.size) // self.hop

    def weights(self, shape: Tensor | None) -> Tensor:
        """Return a window's weights with zeros around them, in float64."""
        ones = torch.ones(self.taken, dtype=torch.float64)
        given = ones if shape is None else shape.to(wide(shape.dtype))
        before = (self.size - self.taken) // 2
        return torch.nn.functional.pad(given, (before, self.size - self.taken - before))


def frames(arguments: Arguments) -> Frames:
    """Read `stft(input, n_fft, hop_length, win_length, window, center, pad_mode, normalized, …)`."""
    size = arguments.argument(1, "n_fft")
    hop, taken = arguments.argument(2, "hop_length"), arguments.argument(3, "win_length")
    center = arguments.argument(5, "center", True)
    return Frames(
        value_of(arguments.args[0]).shape[-1],
        size,
        size // 4 if hop is None else hop,
        arguments.argument(4, "window"),
        size if taken is None else taken,
        size // 2 if center else 0,
        arguments.argument(6, "pad_mode", "reflect"),
        arguments.argument(7, "normalized", False),
    )


@labels(ops="stft")
def stft(call: Call) -> Verdict:
    """S where windows that are nowhere zero cover the signal."""
    form = frames(call)
    if not call.is_dynamic(call.args[0]) or as_int(form.length) is None or call.argument(10, "align_to_window"):
        return unproven("only its window is dynamic, its length varies with the batch, or windows are aligned")
    if call.is_dynamic(form.shape):
        domain = "windows that are not zero cover the signal"
        witness = other_operand(call.operands[1])
        return preserves("the window is at hand", witness, REFINED, undo=Undo(_undo_stft), domain=domain)
    shape = call.static(form.shape)
    if shape is None and form.shape is not None:
        return unproven("its window is not at hand")
    missed = uncovered(form, shape)
    if missed == 0:
        why = "spectra of windows that cover the signal, added up"
        return preserves(why, NOTHING, REFINED, undo=Undo(_undo_stft))
    if form.around and form.mode != "constant":
        return unproven("no window covers some samples, but their copies in the padding may be covered")
    total = elements(call.before)
    lost = None if total is None or missed is None else total // form.length * missed
    return erases("no window covers some samples", lost, confidence=REFINED)


_ENDS = 60


def uncovered(form: Frames, shape: Tensor | None) -> int | None:
    """Return how many samples no window covers; None where there are some in a signal of many windows."""
    # Between its ends a long signal repeats itself.
    enough = _ENDS + 4 * -(-form.size // form.hop)
    many = form.count > enough
    count = min(form.count, enough)
    length = form.length - (form.count - count) * form.hop
    cover = added_up(form.weights(shape).abs().expand(1, count, -1), form.hop, length + 2 * form.around)
    missed = int((cover[0, form.around : form.around + length] == 0).sum())
    return None if many and missed else missed


def added_up(pieces: Tensor, hop: int, length: int) -> Tensor:
    """Return signals (batch, length), the sum of windows (batch, count, size) that start `hop` apart."""
    batch, count, size = pieces.shape
    places = (torch.arange(count).unsqueeze(-1) * hop + torch.arange(size)).flatten()
    return pieces.new_zeros(batch, length).index_add(1, places, pieces.reshape(batch, -1))


def _undo_stft(run: Run) -> Tensor:
    form, operand = frames(run), run.args[0]
    spectra = run.output if run.output.is_complex() else torch.view_as_complex(run.output.contiguous())
    spectra = spectra.to(torch.complex128).reshape(-1, *spectra.shape[-2:]).mT
    halved = spectra.shape[-1] != form.size or form.size == 1
    pieces = torch.fft.irfft(spectra, form.size) if halved else torch.fft.ifft(spectra)
    weights = form.weights(form.shape)
    pieces = pieces * weights.conj() * (math.sqrt(form.size) if form.normalized else 1)
    length = form.length + 2 * form.around
    cover = added_up(weights.abs().square().expand(1, form.count, -1), form.hop, length)
    signal = (added_up(pieces, form.hop, length) / cover)[:, form.around : form.around + form.length]
    return (signal if operand.is_complex() else _real(signal)).reshape(operand.shape)


def _real(signal: Tensor) -> Tensor:
    return signal.real if signal.is_complex() else signal


@labels(ops="istft")
def istft(call: Call) -> Verdict:
    """Windows that overlap are added up, and a real signal has no imaginary parts."""
    if not call.is_dynamic(call.args[0]):
        return unproven("only its window is dynamic")
    total, made = elements(call.before), elements(call.value)
    if call.value.is_complex() and (total is None or made is None or made >= total):
        return unproven("its windows may not overlap")
    if total is None or made is None:
        return erases("a real signal has no imaginary parts")
    lost = total - (made if call.value.is_complex() else made / 2)
    # A spectrum's constant has an imaginary part that is never read.
    constants = 0 if call.value.is_complex() else call.before.shape[-1] / 2
    return erases("windows that overlap are added up", max(lost, constants), confidence=REFINED)
