"""Recurrent layers with tanh are undone step by step; ReLU, dropout and fewer features erase; gates are unproven."""

import pytest
import torch
from torch import nn

from bwsk_fx.verdict import Label, WitnessKind

SEQUENCE = torch.randn(6, 2, 3, generator=torch.Generator().manual_seed(0)).double()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(
    "options",
    [
        {"hidden_size": 3},
        {"hidden_size": 5, "bias": False},
        {"hidden_size": 5, "num_layers": 2},
        {"hidden_size": 2, "bidirectional": True},
        {"hidden_size": 3, "num_layers": 2, "bidirectional": True},
        {"hidden_size": 4, "batch_first": True},
    ],
)
def test_layers_with_tanh_are_undone(certified, options):
    verdict = certified(nn.RNN(3, **options).double(), SEQUENCE)
    assert (verdict.label, verdict.witness.kind) == (Label.S, WitnessKind.NOTHING)
    assert "saturated" in verdict.domain


def test_a_first_state_is_a_witness(certified):
    layer = nn.RNN(3, 4, num_layers=2).double()
    state = torch.randn(2, 2, 4).double()
    assert certified(layer, SEQUENCE, state).witness.names == ("operand_1",)
    assert certified(layer, SEQUENCE, state, dynamic={id(SEQUENCE)}).witness.kind is WitnessKind.NOTHING
    assert certified(layer, SEQUENCE[:, 0].clone(), state[:, 0].clone()).label is Label.S


def test_fewer_features_erase_the_difference(certified):
    assert certified(nn.RNN(3, 2), SEQUENCE.float()).erasure.elements == 6 * 2 * 1
    # The last state of the lower layer is a result, too.
    assert certified(nn.RNN(3, 2, num_layers=2), SEQUENCE.float()).erasure.elements == 6 * 2 - 2 * 2


def test_relu_and_dropout_erase(certified):
    assert certified(nn.RNN(3, 4, nonlinearity="relu").double(), SEQUENCE).label is Label.K
    layer = nn.RNN(3, 4, num_layers=2, dropout=0.5).double()
    assert certified(layer, SEQUENCE).label is Label.K
    assert certified(layer.eval(), SEQUENCE).label is Label.S


def test_single_steps(certified):
    x, state = SEQUENCE[0].clone(), torch.randn(2, 4).double()
    assert certified(nn.RNNCell(3, 4).double(), x).label is Label.S
    assert certified(nn.RNNCell(3, 4).double(), x, state).witness.names == ("operand_1",)
    assert certified(nn.RNNCell(3, 2).double(), x).erasure.elements == 2
    assert certified(nn.RNNCell(3, 4, nonlinearity="relu").double(), x).label is Label.K


def test_the_functions_underneath(certified):
    layer = nn.RNN(3, 4).double()
    parameters = [parameter.detach() for parameter in layer.parameters()]
    state = torch.zeros(1, 2, 4).double()
    only = {"dynamic": {id(SEQUENCE)}}
    options = (True, 1, 0.0, False, False, False)
    assert certified(torch.rnn_tanh, SEQUENCE, state, parameters, *options, **only).label is Label.S
    assert certified(torch.ops.aten.rnn_tanh.input, SEQUENCE, state, parameters, *options, **only).label is Label.S
    assert certified(torch.rnn_relu, SEQUENCE, state, parameters, *options, **only).label is Label.K
    x, first = SEQUENCE[0].clone(), state[0]
    assert certified(torch.rnn_tanh_cell, x, first, *parameters, dynamic={id(x)}).label is Label.S


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell])
def test_gates_are_counted_or_unproven(certified, kind):
    operand = SEQUENCE.float() if kind in (nn.LSTM, nn.GRU) else SEQUENCE[0].float()
    assert certified(kind(3, 4), operand).label is Label.GRAY
    verdict = certified(kind(3, 1), operand)
    states = {nn.LSTM: 2, nn.GRU: 1, nn.LSTMCell: 1, nn.GRUCell: 0}[kind] * 2
    assert verdict.erasure.elements == operand.numel() * 2 / 3 - states
