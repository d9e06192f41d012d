"""Every operator of PyTorch's own database is typed, and no S label is false.

By default each operator has five samples per dtype; `pytest -m opinfo` takes all samples in float32 and float64.
"""

from collections import Counter

import opinfo
import pytest
import torch

from bwsk_fx.verdict import Label

CAPPED = pytest.param(((torch.float32, torch.float64), 5), id="capped")
ALL = pytest.param(
    ((torch.float32, torch.float64), None), id="all", marks=[pytest.mark.opinfo, pytest.mark.timeout(3600)]
)


@pytest.fixture(scope="module", params=[CAPPED, ALL])
def surveys(request):
    dtypes, limit = request.param
    with torch.random.fork_rng():
        return [opinfo.survey(op, dtypes, limit) for op in opinfo.operators()]


def test_every_operator_is_typed_without_a_crash(surveys):
    assert len(surveys) > 600
    assert {found.name: found.failed for found in surveys if found.failed} == {}


def test_no_s_label_is_false(surveys):
    assert {found.name: found.wrong[:3] for found in surveys if found.wrong} == {}


def test_at_most_one_operator_in_ten_is_gray(surveys, capsys):
    typed = [found for found in surveys if found.labels]
    gray = [found.name for found in typed if found.labels[Label.GRAY]]
    with capsys.disabled():
        print("\n" + _table(typed))
    assert len(gray) <= len(typed) / 10


def _table(surveys) -> str:
    """Count operators by the labels that their samples got, and verdicts by label."""
    kinds = Counter(" and ".join(sorted(found.labels)) for found in surveys)
    verdicts = sum((found.labels for found in surveys), Counter())
    limits = sum(bool(found.incomplete) for found in surveys)
    rows = [f"{count:4d} operators: {labels} on all samples" for labels, count in kinds.most_common()]
    total = ", ".join(f"{count} {label}" for label, count in sorted(verdicts.items()))
    unsampled = f"{limits} operators have S samples that reach the precision limit of their dtype"
    return "\n".join([*rows, f"{sum(verdicts.values())} verdicts: {total}", unsampled])
