"""The report of kept values: it adds up to what autograd holds, and says where each value comes from."""

import json
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

import bwsk_fx
from bwsk_fx.errors import RegionError
from bwsk_fx.measure import saved_for_backward

BF16 = torch.bfloat16


def _storages(model: nn.Module, inputs: dict[str, Tensor], dtype: torch.dtype | None) -> dict[int, tuple[int, bool]]:
    """Storage to bytes, and whether it belongs to an input of the model."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    given = {tensor.untyped_storage().data_ptr() for tensor in inputs.values()}
    found, held = {}, []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held.append(storage)
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = (storage.nbytes(), storage.data_ptr() in given)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", dtype=dtype or BF16, enabled=dtype is not None),
    ):
        loss = model(**inputs)["loss"]
    loss.backward()
    return found


@pytest.fixture(scope="module")
def graph(make_vit, make_images):
    model = make_vit(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    return bwsk_fx.capture(model, make_images())


@pytest.mark.parametrize(
    ("granularity", "faith", "dtype", "budget"),
    [
        ("block", "exact", None, 0.0),
        ("block", "rounded", None, 0.25),
        ("block", "exact", BF16, 0.25),
        ("block", "rounded", BF16, 0.0),
        ("whole", "exact", BF16, 0.0),
        ("whole", "rounded", None, 0.0),
        ("whole", "rounded", BF16, 0.25),
    ],
)
def test_rows_add_up_to_what_autograd_holds(graph, make_images, granularity, faith, dtype, budget):
    inputs = make_images()
    fused = bwsk_fx.fuse_regions(graph, budget, faith=faith, granularity=granularity)
    measured = saved_for_backward(fused, inputs, dtype)
    report = bwsk_fx.explain_saved(fused)
    storages = _storages(fused, inputs, dtype)
    assert measured == sum(size for size, _ in storages.values()) == report.kept_bytes
    assert report.kept_bytes == sum(value.bytes for _, value in report.rows())


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0](x) * self.blocks[1](x)


def test_a_value_that_two_regions_keep_is_two_rows_and_one_storage():
    x = torch.randn(4, 8)
    fused = bwsk_fx.fuse_regions(bwsk_fx.capture(Branches(), x))
    outside = 2 * x.nbytes  # The product of the blocks' outputs, which tanh keeps too.
    measured = saved_for_backward(fused, x)
    report = bwsk_fx.explain_saved(fused)
    assert [(region, value.operator) for region, value in report.rows()] == [
        ("blocks_0", "input"),
        ("blocks_0", "tanh"),
        ("blocks_1", "input"),
        ("blocks_1", "tanh"),
    ]
    assert report.kept_bytes == 4 * x.nbytes
    assert measured == x.nbytes + outside


@pytest.fixture(scope="module")
def report(make_vit, make_images):
    model = bwsk_fx.apply(make_vit())
    with torch.autocast("cpu", dtype=BF16):
        model(**make_images()).loss.backward()
    return bwsk_fx.explain_saved(model)


def test_each_row_has_a_node_and_a_source_line(report):
    for region, value in report.rows():
        assert value.node, (region, value)
        assert value.bytes > 0 and value.rule
        if value.operator != "input":
            file, _, line = value.source.rpartition(":")
            assert file.endswith(".py") and line.isdecimal(), value
    lines = {value.source.rpartition("/")[2].partition(":")[0] for _, value in report.rows()} - {""}
    assert lines <= {"modeling_vit.py", "loss_utils.py", "sdpa_attention.py"}


def test_equal_blocks_report_equal_rows(report):
    rows = {entry.region: entry.plan for entry in report.regions}
    assert list(rows) == ["segment_0", "vit_layers_0", "vit_layers_1", "segment_1"]
    assert rows["vit_layers_0"] is rows["vit_layers_1"]
    operators = Counter(value.operator for value in rows["vit_layers_0"].kept)
    assert operators["scaled_dot_product_flash_attention_for_cpu[0]"] == 1
    assert {value.dtype for value in rows["vit_layers_0"].kept} == {"bfloat16", "float32"}


def test_text_and_json(report):
    contents = json.loads(json.dumps(report.to_json()))
    assert contents["kept_bytes"] == report.kept_bytes
    assert [entry["region"] for entry in contents["regions"]] == [entry.region for entry in report.regions]
    text = str(report)
    assert text.strip().startswith("kept for the backward pass: ")
    assert "vit_layers_0" in text and "vit_layers_1" not in text
    assert "modeling_vit.py:" in text


def test_errors(make_vit, make_images):
    model = make_vit()
    with pytest.raises(
        RegionError, match=r"^this model has no reversible regions: rewrite it with fuse_regions or apply"
    ):
        bwsk_fx.explain_saved(model)
    fused = bwsk_fx.fuse_regions(bwsk_fx.capture(model, make_images()))
    early = r"^no region has run yet: plans are made in the first training step; run one, then ask again$"
    for waiting in (fused, bwsk_fx.apply(make_vit())):
        with pytest.raises(RegionError, match=early):
            bwsk_fx.explain_saved(waiting)
    with torch.no_grad():
        fused(**make_images())
    with pytest.raises(RegionError, match=early):
        bwsk_fx.explain_saved(fused)
    analyzed = bwsk_fx.apply(make_vit(), "analyzed")
    analyzed(**make_images()).loss.backward()
    with pytest.raises(RegionError, match="no reversible regions"):
        bwsk_fx.explain_saved(analyzed)
