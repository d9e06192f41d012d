"""Short-time spectra hold the signal where their windows cover it."""

import pytest
import torch

from bwsk_fx.verdict import Label, WitnessKind

SIGNAL = torch.randn(2, 40, dtype=torch.double, generator=torch.Generator().manual_seed(0))
HANN = torch.hann_window(8, dtype=torch.double)


def _stft(certified, signal=SIGNAL, window=None, dynamic=None, **options):
    options = {"n_fft": 8, "return_complex": True, **options}
    return certified(torch.stft, signal, window=window, dynamic=dynamic or {id(signal)}, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalized": True},
        {"hop_length": 4, "onesided": False},
        {"n_fft": 7, "hop_length": 3, "pad_mode": "constant"},
        {"win_length": 6, "hop_length": 2},
        {"center": False, "hop_length": 8},
        {"return_complex": False},
    ],
)
@pytest.mark.filterwarnings("ignore:stft")
def test_windows_that_overlap_are_added_up(certified, options):
    verdict = _stft(certified, **options)
    assert (verdict.label, verdict.witness.kind) == (Label.S, WitnessKind.NOTHING)


def test_signals_that_are_complex_or_alone(certified):
    assert _stft(certified, SIGNAL[0].clone(), HANN).label is Label.S
    assert _stft(certified, torch.randn(40, dtype=torch.cdouble), HANN, onesided=False).label is Label.S


def test_a_window_of_activations_is_a_witness(certified):
    window = HANN + 0.1
    verdict = _stft(certified, window=window, dynamic={id(SIGNAL), id(window)})
    assert verdict.witness.names == ("operand_1",)


def test_samples_that_no_window_covers_are_lost(certified):
    # Windows of six samples, every eight.
    gaps = _stft(certified, center=False, hop_length=8, win_length=6)
    assert (gaps.label, gaps.erasure.elements) == (Label.K, 2 * 5 * 2)
    cut = _stft(certified, SIGNAL[:, :38].clone(), center=False, hop_length=8)
    assert cut.erasure.elements == 2 * 6
    # The first weight of a Hann window is zero.
    assert _stft(certified, window=HANN, center=False, hop_length=4).erasure.elements == 2
    assert _stft(certified, center=True, hop_length=8, win_length=6).label is Label.GRAY


def test_long_signals_are_judged_by_their_ends(certified):
    signal = torch.randn(1, 20_000, dtype=torch.double)
    assert _stft(certified, signal, HANN).label is Label.S
    gaps = _stft(certified, signal, center=False, hop_length=8, win_length=6)
    assert (gaps.label, gaps.erasure) == (Label.K, None)


def test_signals_have_fewer_numbers_than_their_spectra(certified):
    spectra = torch.stft(SIGNAL, 8, 2, window=HANN, return_complex=True)
    verdict = certified(torch.istft, spectra, 8, 2, window=HANN, dynamic={id(spectra)})
    assert (verdict.label, verdict.erasure.elements) == (Label.K, 2 * 5 * 21 - 40)
