"""Elements per sample of a symbolic batch."""

import pytest
import torch

from bwsk_fx import _torch_private as private
from bwsk_fx.rules.sizes import as_int, elements, erased, is_batched


@pytest.fixture
def batched() -> torch.Tensor:
    return private.fake_tensor(private.fake_mode(), torch.empty(6, 3, 4), dynamic_dims=(0,))


def test_elements_per_sample(batched):
    assert elements(batched) == 12
    assert elements(batched.reshape(-1)) == 12
    assert elements(batched.reshape(-1, 3, 2, 2)[:, :2]) == 8
    # Windows of a picture: the batch is part of a longer dimension.
    assert elements(batched.reshape(-1, 4)) == 12


def test_what_is_not_proportional_to_the_batch_is_none(batched):
    rows = batched.reshape(-1, 12)
    assert elements(rows @ rows.T) is None
    assert elements(batched.reshape(-1)[1:]) is None
    assert erased(rows @ rows.T, rows) is None


def test_a_fixed_size_counts_whole(batched):
    assert elements(torch.empty(5, 2)) == 10
    assert elements(torch.empty(())) == 1
    assert erased(torch.empty(5, 2), torch.empty(5)) == 5


def test_erased(batched):
    assert erased(batched, batched[:, 0]) == 8
    assert erased(batched, batched.sum()) == 12
    assert erased(batched[:, 0], batched) == -8


def test_symbols_are_no_numbers(batched):
    assert is_batched(batched)
    assert not is_batched(batched.sum(0))
    assert as_int(batched.shape[0]) is None
    assert as_int(batched.shape[1]) == 3
