"""What the integer program keeps, by name and byte, and that nothing smaller exists."""

import math
from itertools import combinations
from unittest.mock import patch

import networkx as nx
import pytest
import torch

from bwsk_fx.errors import PlanError
from bwsk_fx.planning import integer_program
from bwsk_fx.planning import solve as solver
from bwsk_fx.planning.derivations import Hypergraph, keepable
from bwsk_fx.planning.integer_program import Limits, Problem
from bwsk_fx.planning.joint import nbytes
from bwsk_fx.planning.solve import solve

BF16 = torch.bfloat16
UNBOUNDED = math.inf
NO_PRODUCT = Limits(products=0.0)
NAMES = ["mlp", "residual", "attention", "dropout", "chain", "views"]


@pytest.mark.parametrize(
    ("name", "faith", "dtype", "budget", "kept"),
    [
        ("mlp", "exact", None, 0.0, {"primals_1": 128, "mm": 256}),
        ("mlp", "exact", None, UNBOUNDED, {"primals_1": 128}),
        ("mlp", "rounded", BF16, 0.0, {"_to_copy_1": 64, "mm": 128}),
        # Statistics are recomputed from the input: cheaper than keeping them beside it.
        ("residual", "exact", None, 0.0, {"primals_1": 128}),
        ("residual", "exact", BF16, 0.0, {"primals_1": 128}),
        # x̂ in half precision beside mean and rstd.
        ("residual", "rounded", BF16, 0.0, {"_to_copy_default": 64, "getitem_1": 16, "getitem_2": 16}),
        (
            "attention",
            "exact",
            BF16,
            0.0,
            {"_to_copy_1": 64, "mm": 64, "mm_1": 64, "mm_2": 64, "getitem": 64, "getitem_1": 32},
        ),
        ("attention", "exact", BF16, UNBOUNDED, {"_to_copy_1": 64}),
        ("dropout", "exact", None, 0.0, {"primals_1": 128, "pack_bits": 4, "cos": 128}),
        ("dropout", "exact", None, UNBOUNDED, {"primals_1": 128, "pack_bits": 4}),
        ("views", "rounded", None, 0.0, {"primals_1": 128, "exp": 128}),
    ],
)
def test_what_is_kept(plan, functions, name, faith, dtype, budget, kept):
    found = plan(getattr(functions, name), budget, faith, dtype).plan
    assert {value.name: value.bytes for value in found.kept} == kept
    assert found.kept_bytes == sum(kept.values())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("faith", "dtype"), [("exact", None), ("rounded", BF16)])
def test_kept_bytes_fall_with_the_budget(plan, functions, name, faith, dtype):
    plans = [plan(getattr(functions, name), budget, faith, dtype).plan for budget in (0.0, 0.1, 0.3, UNBOUNDED)]
    sizes = [found.kept_bytes for found in plans]
    assert sizes == sorted(sizes, reverse=True)
    assert plans[0].intensive_seconds == 0.0
    assert all(
        found.intensive_seconds <= budget * found.conventional_seconds * 1.0001
        for found, budget in zip(plans, (0.0, 0.1, 0.3), strict=False)
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_weights_and_their_casts_are_never_kept(plan, functions, name, dtype):
    program = plan(getattr(functions, name), 0.0, "rounded", dtype)
    forward = {node.name: node for node in program.forward.graph.nodes}
    weights = {node for node in forward.values() if node.op == "placeholder"} - {forward["primals_1"]}
    for value in program.plan.kept:
        assert not _ancestors(forward[value.name]) <= weights


def _ancestors(node: torch.fx.Node) -> set[torch.fx.Node]:
    if node.op == "placeholder":
        return {node}
    return set().union(*map(_ancestors, node.all_input_nodes))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("limits", [NO_PRODUCT, Limits()])
def test_no_value_derives_itself_and_nothing_is_kept_in_vain(planning, functions, name, limits):
    parts = planning(getattr(functions, name), exact=False, dtype=BF16)
    solution = solve(parts.problem, limits, "small")
    class_of = parts.hypergraph.class_of
    edges = nx.DiGraph((class_of[tail], class_of[one.head]) for one in solution.used for tail in one.tails)
    assert nx.is_directed_acyclic_graph(edges)
    read = {class_of[tail] for one in solution.used for tail in one.tails}
    assert set(solution.kept) <= read | {class_of[node] for node in parts.joint.needed()}


def _least_bytes(joint, hypergraph: Hypergraph, intensive: bool) -> int:
    """The fewest bytes from which everything needed follows, by trying every set."""
    class_of = hypergraph.class_of
    given = {class_of[primal] for primal in joint.static_primals}
    ways = [
        (class_of[one.head], {class_of[tail] for tail in one.tails})
        for one in hypergraph.derivations
        if intensive or not one.intensive
    ]
    needed = {class_of[node] for node in joint.needed()}
    candidates = [cls for cls in dict.fromkeys(class_of.values()) if keepable(cls) and cls not in given]
    sets = (kept for size in range(len(candidates) + 1) for kept in combinations(candidates, size))
    return min(sum(map(nbytes, kept)) for kept in sets if needed <= _closure(given | set(kept), ways))


def _closure(known: set, ways: list) -> set:
    while new := {head for head, tails in ways if head not in known and tails <= known}:
        known = known | new
    return known


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("name", ["mlp", "residual", "dropout", "chain", "views"])
@pytest.mark.parametrize("limits", [NO_PRODUCT, Limits()])
def test_no_smaller_set_exists(planning, functions, name, exact, limits):
    parts = planning(getattr(functions, name), exact=exact)
    # Time is free here, so that bytes alone decide.
    with patch.object(integer_program, "BYTES_PER_TENTH_OF_STEP", 0.0), patch.object(solver, "_RELATIVE_GAP", 0.0):
        solution = solve(parts.problem, limits, "small")
    assert solution.kept_bytes == _least_bytes(parts.joint, parts.hypergraph, intensive=limits.products > 0)
    assert solution.gap == pytest.approx(0.0, abs=1e-9) and solution.solver == "highs"


def test_a_circle_of_inverses_supports_nothing(planning, functions):
    """y = x + f(x) gives x, and x gives y; one of them has to come from somewhere."""
    parts = planning(functions.residual, exact=False)
    (summed,) = (value for value in parts.hypergraph.values if value.name == "add")
    both = [one for one in parts.hypergraph.derivations if {one.head.name, *(t.name for t in one.tails)} >= {"add"}]
    assert {one.kind.value for one in both} == {"recompute", "invert"}
    only = Hypergraph(parts.hypergraph.values, tuple(both), parts.hypergraph.views, parts.hypergraph.class_of)
    with patch.object(type(parts.joint), "needed", lambda self: [summed]):
        assert solve(Problem.of(parts.joint, only, 1.0), Limits(), "small").kept == (summed,)


def test_a_value_that_nothing_gives_is_named(planning, functions):
    parts = planning(functions.attention, exact=True)
    (fused,) = (node for node in parts.joint.forward_nodes() if "scaled_dot_product" in str(node.target))
    with (
        patch.object(type(parts.joint), "needed", lambda self: [fused]),
        pytest.raises(
            PlanError, match=rf"^region small: no plan within .* 0 of a step: .*; the backward pass needs {fused.name}$"
        ),
    ):
        solve(Problem.of(parts.joint, parts.hypergraph, 1.0), NO_PRODUCT, "small")
