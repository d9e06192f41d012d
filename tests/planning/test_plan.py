"""The plan in words and figures."""

import json

import torch


def test_rows_say_what_and_why(plan, functions):
    kept, product, recomputed = plan(functions.mlp).plan.values
    assert (kept.name, kept.node, kept.action, kept.operator, kept.rule) == ("primals_1", "in0", "keep", "input", "mm")
    assert (product.operator, product.shape, product.dtype, product.bytes) == ("mm", (4, 16), "float32", 256)
    assert set(product.rule.split(", ")) == {"gelu_backward", "gelu"}
    assert (recomputed.action, recomputed.rule, recomputed.sources) == ("recompute", "gelu", ("mm",))


def test_inverses_are_named(plan, functions):
    values = plan(functions.residual, 0.0, "rounded", torch.bfloat16).plan.values
    assert {(value.name, value.rule) for value in values if value.action == "invert"} == {
        ("primals_1", "LayerNorm input from x̂"),
    }


def test_a_plan_is_json(plan, functions):
    found = plan(functions.mlp).plan
    contents = json.loads(json.dumps(found.to_json()))
    assert contents["kept_bytes"] == found.kept_bytes == sum(value.bytes for value in found.kept)
    assert len(contents["values"]) == len(found.values)
    assert 0 < found.extra_seconds < found.conventional_seconds
