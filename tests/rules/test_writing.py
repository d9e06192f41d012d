"""What is written over goes; what is added is subtracted; a source is read back where each element has a place."""

import pytest
import torch

from bwsk_fx.verdict import Label, WitnessKind

X = torch.randn(3, 4)
ROWS, TWICE = torch.tensor([2, 0]), torch.tensor([1, 1])
INDEX = ROWS[:, None].expand(2, 4)
SOURCE = torch.randn(2, 4)

WRITES = {
    "scatter": (torch.scatter, (0, INDEX, SOURCE), 8),
    "scatter a number": (torch.scatter, (0, INDEX, 1.0), 8),
    "index_copy": (torch.index_copy, (0, ROWS, SOURCE), 8),
    "index_copy twice": (torch.index_copy, (0, TWICE, SOURCE), 4),
    "index_fill": (torch.index_fill, (1, ROWS, 0.0), 6),
    "index_put": (torch.index_put, ((ROWS,), SOURCE), 8),
    "masked_scatter": (torch.masked_scatter, (torch.arange(4) > 1, SOURCE), 6),
    "put": ("put", (ROWS, SOURCE[0, :2]), 2),
    "select_scatter": (torch.select_scatter, (SOURCE[0], 0, 1), 4),
    "slice_scatter": (torch.slice_scatter, (SOURCE, 0, 1), 8),
    "diagonal_scatter": (torch.diagonal_scatter, (SOURCE[0, :3],), 3),
    "as_strided_scatter": (torch.as_strided_scatter, (SOURCE[:, :2], (2, 2), (2, 1)), 4),
    "copy_": ("copy_", (SOURCE[0],), 12),
    "fill_": ("fill_", (0.0,), 12),
    "zero_": ("zero_", (), 12),
    "without self": (torch.index_reduce, (0, ROWS, SOURCE, "amax"), 8),
}


@pytest.mark.parametrize("name", WRITES)
def test_what_is_written_over_goes(certified, name):
    target, rest, missing = WRITES[name]
    operand = X.clone()
    options = {"include_self": False} if name == "without self" else {}
    verdict = certified(target, operand, *rest, dynamic={id(operand)}, **options)
    assert (verdict.label, verdict.erasure.elements) == (Label.K, missing)


SOURCES = ["scatter", "index_copy", "index_put", "put", "select_scatter", "slice_scatter", "diagonal_scatter", "copy_"]


@pytest.mark.parametrize("name", [*SOURCES, "as_strided_scatter"])
def test_a_source_is_read_back(certified, name):
    target, rest, _ = WRITES[name]
    sources = [value for value in rest if isinstance(value, torch.Tensor) and value.is_floating_point()]
    verdict = certified(target, torch.zeros(3, 4), *rest, dynamic={id(sources[0])})
    assert (verdict.label, verdict.witness.kind) == (Label.S, WitnessKind.NOTHING)


def test_a_source_that_is_written_over_itself(certified):
    verdict = certified(torch.index_copy, torch.zeros(3, 4), 0, TWICE, SOURCE, dynamic={id(SOURCE)})
    assert (verdict.label, verdict.erasure.elements) == (Label.K, 4)
    half = SOURCE.half()
    assert certified("copy_", torch.zeros(2, 4, dtype=torch.half), SOURCE, dynamic={id(SOURCE)}).label is Label.K
    assert certified("copy_", torch.zeros(2, 4), half, dynamic={id(half)}).label is Label.S
    assert certified(torch.index_copy, torch.zeros(3, 4), 0, ROWS, SOURCE, dynamic={id(SOURCE), id(ROWS)}).label is (
        Label.GRAY
    )


SUMS = {
    "scatter_add": (torch.scatter_add, (0, INDEX, SOURCE), {}),
    "scatter by name": (torch.scatter, (0, INDEX, SOURCE), {"reduce": "add"}),
    "scatter_reduce": (torch.scatter_reduce, (0, INDEX, SOURCE, "sum"), {}),
    "index_add": (torch.index_add, (0, TWICE, SOURCE), {"alpha": 2}),
    "index_put": (torch.index_put, ((TWICE,), SOURCE), {"accumulate": True}),
    "put": ("put", (TWICE, SOURCE[0, :2]), {"accumulate": True}),
    "mean": (torch.index_reduce, (0, TWICE, SOURCE, "mean"), {}),
    "product": (torch.scatter_reduce, (0, INDEX, SOURCE, "prod"), {}),
}


@pytest.mark.parametrize("name", SUMS)
def test_what_is_added_is_subtracted(certified, name):
    target, rest, options = SUMS[name]
    operand = X.clone()
    assert certified(target, operand, *rest, dynamic={id(operand)}, **options).witness.kind is WitnessKind.NOTHING
    assert certified(target, operand, *rest, **options).witness.kind is WitnessKind.OTHER_OPERAND


def test_sums_onto_static_tensors(certified):
    base = torch.ones(3, 4)
    assert certified(torch.index_add, base, 0, ROWS, SOURCE, alpha=2, dynamic={id(SOURCE)}).label is Label.S
    assert certified(torch.index_add, base, 0, TWICE, SOURCE, dynamic={id(SOURCE)}).label is Label.K
    assert certified(torch.index_add, base, 0, ROWS, SOURCE, dynamic={id(SOURCE), id(ROWS)}).label is Label.GRAY


def test_merges_that_lose(certified):
    assert certified(torch.scatter_reduce, X, 0, INDEX, SOURCE, "amax").label is Label.K
    zeros = torch.zeros(2, 4)
    assert certified(torch.scatter_reduce, X, 0, INDEX, zeros, "prod", dynamic={id(X)}).label is Label.K
    assert certified(torch.index_add, X > 0, 0, ROWS, SOURCE > 0).label is Label.K
    assert certified(torch.index_reduce, X.long(), 0, ROWS, SOURCE.long(), "mean").label is Label.K


def test_writing_nothing_keeps_everything(certified):
    none = torch.zeros(0, dtype=torch.int64)
    operand = X.clone()
    verdict = certified(torch.index_copy, operand, 0, none, SOURCE[:0], dynamic={id(operand)})
    assert verdict.label is Label.S


def test_setitem(verdict_of):
    def write(x):
        y = x.clone()
        y[:, 0] = 0
        return y

    verdict = verdict_of(write, torch.randn(2, 5, 4))
    assert (verdict.label, verdict.rule, verdict.erasure.elements) == (Label.K, "writing.setitem", 4)


def test_a_tensor_made_to_be_written_to_has_nothing_to_lose(verdict_of):
    verdict = verdict_of(lambda x: torch.zeros_like(x).slice_scatter(x[:, :3], 1, 0, 3), torch.randn(2, 5, 4))
    assert (verdict.label, verdict.rule) == (Label.S, "writing.part")
