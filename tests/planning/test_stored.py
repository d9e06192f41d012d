"""Plans in files: what is followed without solving, and what is refused."""

import json
from unittest.mock import patch

import pytest
import torch

import bwsk_fx
from bwsk_fx.errors import PlanError
from bwsk_fx.reversible import ReversibleRegion

BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def graph(make_vit, make_images):
    return bwsk_fx.capture(make_vit(), make_images())


def _regions(fused) -> list[ReversibleRegion]:
    return [module for module in fused.modules() if isinstance(module, ReversibleRegion)]


def _code(fused) -> list[tuple[str, str]]:
    return [(region.program.forward.code, region.program.backward.code) for region in _regions(fused)]


@pytest.fixture(scope="module")
def stored(graph, make_images, tmp_path_factory):
    fused = bwsk_fx.fuse_regions(graph, 0.1)
    for batch in (3, 2):
        fused(**make_images(batch))
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    bwsk_fx.save_plan(fused, path)
    return fused, path


def test_a_stored_plan_is_followed_without_solving(graph, stored, make_images, train_step, assert_same_bits):
    original, path = stored
    with patch("bwsk_fx.planning.prospect.solve", side_effect=AssertionError("solved")):
        followed = bwsk_fx.fuse_regions(graph, plan=str(path))
        for batch in (3, 2):
            original(**make_images(batch))
            followed(**make_images(batch))
            assert _code(followed) == _code(original)
    assert {region.program.plan.solver for region in _regions(followed)} == {"file"}
    assert_same_bits(train_step(followed, make_images(3)), train_step(original, make_images(3)))


def test_the_figures_come_back(graph, stored, make_images):
    original, path = stored
    followed = bwsk_fx.fuse_regions(graph, plan=str(path))
    original(**make_images())
    followed(**make_images())
    assert bwsk_fx.explain_saved(followed).totals == bwsk_fx.explain_saved(original).totals


def test_the_file_has_each_region_for_each_kind_of_input(stored):
    original, path = stored
    content = json.loads(path.read_text())
    names = [entry["region"] for entry in content["regions"]]
    assert names == [region.name for region in _regions(original) for _ in range(2)]
    assert len({(entry["region"], entry["plan"]["fingerprint"]) for entry in content["regions"]}) == len(names)
    assert [entry.name for entry in path.parent.iterdir()] == ["plan.json"]


def test_another_kind_of_input_is_refused(graph, stored, make_images):
    followed = bwsk_fx.fuse_regions(graph, plan=str(stored[1]))
    with pytest.raises(
        PlanError, match=r"^region segment_0: .*plan.json plans it for other inputs, options or versions"
    ):
        followed(**make_images(5))
    with torch.autocast("cpu", BF16), pytest.raises(PlanError, match="for other inputs, options or versions"):
        followed(**make_images(3))


def test_other_options_are_refused(graph, stored, make_images):
    followed = bwsk_fx.fuse_regions(graph, plan=str(stored[1]), faith="exact")
    with pytest.raises(PlanError, match="for other inputs, options or versions"):
        followed(**make_images(3))


def test_a_region_without_a_plan_is_named(graph, stored, make_images):
    followed = bwsk_fx.fuse_regions(graph, plan=str(stored[1]), granularity="whole")
    with pytest.raises(PlanError, match=r"^region whole: .* has plans for \['segment_0',"):
        followed(**make_images(3))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no file of plans \\(JSONDecodeError: "),
        ("[]", "is no file of plans \\(TypeError: "),
        ('{"format": 1}', "is no file of plans \\(KeyError: 'regions'\\); write it with save_plan"),
        ('{"format": 7, "regions": []}', "has format 7, and this version reads 1; write it anew"),
    ],
)
def test_files_of_another_kind(graph, make_images, tmp_path, content, message):
    path = tmp_path / "plan.json"
    path.write_text(content)
    with pytest.raises(PlanError, match=message):
        bwsk_fx.fuse_regions(graph, plan=str(path))(**make_images())


def test_a_missing_file(graph, make_images, tmp_path):
    with pytest.raises(PlanError, match=r"^the plan .*none.json cannot be read: No such file or directory$"):
        bwsk_fx.fuse_regions(graph, plan=str(tmp_path / "none.json"))(**make_images())


def test_a_failed_write_leaves_the_old_file(stored, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text("old")
    with (
        patch("bwsk_fx.planning.stored.json.dumps", side_effect=ValueError("no")),
        pytest.raises(ValueError, match="no"),
    ):
        bwsk_fx.save_plan(stored[0], path)
    assert path.read_text() == "old"
