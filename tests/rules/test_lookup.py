"""Rows of a table tell their number; numbers that are written out are read back."""

import torch
from torch import nn
from torch.nn import functional as F

from bwsk_fx.verdict import Label

TABLE, IDS = torch.randn(7, 3), torch.tensor([[0, 3, 6], [2, 2, 5]])


def test_embedding_rows_tell_their_number(verdict_of, certified):
    assert verdict_of(nn.Embedding(7, 3), IDS).label is Label.S
    verdict = certified(F.embedding, IDS, TABLE, dynamic={id(IDS)})
    assert (verdict.label, verdict.domain) == (Label.S, "rows differ, and indices count from row 0")
    assert certified(nn.Embedding(7, 3, padding_idx=0), IDS).label is Label.S
    assert certified(nn.Embedding(7, 3, max_norm=0.5), IDS).label is Label.S
    assert certified(torch.ops.aten.embedding.default, TABLE, IDS, dynamic={id(IDS)}).label is Label.S


def test_equal_rows_tell_nothing(certified):
    table = torch.zeros(7, 3)
    assert certified(F.embedding, IDS, table, dynamic={id(IDS)}).label is Label.K


def test_a_dynamic_table_loses_the_rows_that_no_index_names(certified):
    verdict = certified(torch.ops.aten.embedding.default, TABLE, IDS, dynamic={id(TABLE)})
    assert (verdict.label, verdict.erasure.elements) == (Label.K, 2 * 3)
    every = torch.arange(7)
    assert certified(torch.ops.aten.embedding.default, TABLE, every, dynamic={id(TABLE)}).label is Label.S
    assert certified(F.embedding, IDS, TABLE).label is Label.K


def test_bags_merge_rows(certified):
    assert certified(nn.EmbeddingBag(7, 3), IDS).label is Label.K
    # A bag of one row tells its number, and as many bags as rows may tell the rows.
    assert certified(nn.EmbeddingBag(7, 3), IDS[:, :1]).label is Label.GRAY
    assert certified(F.embedding_bag, IDS, TABLE, dynamic={id(TABLE)}).label is Label.K
    two = TABLE[:2]
    assert certified(F.embedding_bag, IDS % 2, two, dynamic={id(two)}).label is Label.GRAY


def test_numbers_are_read_back(certified):
    assert certified(F.one_hot, IDS, 7).label is Label.S
    assert certified(torch.unravel_index, IDS, (2, 4)).label is Label.S
