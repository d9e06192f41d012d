"""Recurrent networks, cells in Python loops, hidden states as inputs and outputs."""

import pytest
import torch
from torch import Tensor, nn

import bwsk_fx
from bwsk_fx.errors import CaptureError


class Recurrent(nn.Module):
    def __init__(self, kind, **options) -> None:
        super().__init__()
        self.embed, self.rnn = nn.Linear(4, 4), kind(4, 3, batch_first=True, **options)
        self.head = nn.Linear(6 if options.get("bidirectional") else 3, 2)

    def forward(self, x: Tensor, hidden: Tensor | None = None, cell: Tensor | None = None):
        state = hidden if cell is None else (hidden, cell)
        y, state = self.rnn(self.embed(x).tanh(), state)
        return self.head(y.sin()), state


@pytest.fixture
def sequences() -> Tensor:
    return torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))


EXACT = [("exact", 0.0)]


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_layers_in_both_directions_with_dropout(kind, sequences, assert_as_eager):
    """Masks between layers are eager's, which a trace would draw in another order."""
    assert_as_eager(lambda: Recurrent(kind, num_layers=2, bidirectional=True, dropout=0.5), sequences, plans=EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_hidden_states_go_in_and_out(kind, sequences, assert_as_eager):
    states = [torch.randn(1, 2, 3) for _ in range(2 if kind is nn.LSTM else 1)]
    assert_as_eager(lambda: Recurrent(kind), sequences, *states, plans=[("exact", float("inf"))])


class Loop(nn.Module):
    def __init__(self, kind) -> None:
        super().__init__()
        self.cell, self.head = kind(4, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        state, outputs = None, []
        for step in range(x.shape[1]):
            state = self.cell(x[:, step], state)
            outputs.append(self.head(state[0] if isinstance(state, tuple) else state))
        return torch.stack(outputs, 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [nn.RNNCell, nn.LSTMCell, nn.GRUCell])
def test_cells_in_a_python_loop(kind, sequences, assert_as_eager):
    assert_as_eager(lambda: Loop(kind), sequences, plans=[("exact", float("inf"))])


class Packed(Recurrent):
    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(self.embed(x), lengths, batch_first=True)
        return nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0]


def test_packed_sequences_are_refused(sequences):
    with pytest.raises(
        CaptureError, match=r"in forward\n +packed = .*: the sizes of packed sequences depend on data; give"
    ):
        bwsk_fx.capture(Packed(nn.LSTM), [sequences, torch.tensor([3, 2])])
