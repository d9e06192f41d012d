"""Rules and overrides of users: registered in code, through entry points, or for one graph; tried before they count."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from bwsk_fx.errors import RuleError
from bwsk_fx.rules.claims import Claim, claim_of
from bwsk_fx.rules.registry import USER_RULES, Call, TypingRule, preserves, target_name
from bwsk_fx.rules.round_trip import Executed, execute
from bwsk_fx.rules.samples import ADVERSARIAL, random_values
from bwsk_fx.rules.single import Target
from bwsk_fx.rules.targets import rule_name
from bwsk_fx.rules.undo import Undo
from bwsk_fx.verdict import OVERRIDE, Label, Verdict

ENTRY_POINTS = "bwsk_fx.rules"
OVERRIDE_RULE = "override"


@dataclass(frozen=True)
class Example:
    """A call on which a rule is tried when it is registered.

    Attributes:
        target: A module, a function, or the name of a `Tensor` method.
        args: Positional arguments; the tensors among them are the dynamic operands.
        kwargs: Keyword arguments.
    """

    target: Target
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Matching:
    """Selects the nodes of an override by a predicate.

    Attributes:
        predicate: Takes a node of the graph and returns whether the override is meant for it.
    """

    predicate: Callable[[fx.Node], bool]


Key = type[nn.Module] | Callable[..., Any] | str | Matching
Value = Label | str | Undo | Verdict | TypingRule
Overrides = Mapping[Key, Value]


def rule(*targets: Any, examples: Sequence[Example]) -> Callable[[TypingRule], TypingRule]:
    """Register the decorated function as the typing rule of operators, ahead of the library's own rules.

    The rule is tried on the examples, in their dtype and in float64, and on operands that inverses tend to fail on;
    it is registered only if every S verdict's inverse holds.

        @bwsk_fx.rule(Scale, examples=[Example(Scale(4), (torch.randn(2, 4),))])
        def scale(call: Call) -> Verdict:
            return preserves("dividing by the scale undoes it", undo=Undo(divide))

    Args:
        *targets: Module classes, functions, full names of module classes (`"package.module.Class"`), or
            `"Tensor.name"` for methods.
        examples: Calls of each target.

    Raises:
        RuleError: There is no example, a target has a user rule already, or a verdict does not hold.
    """
    if not targets or not examples:
        raise RuleError("a rule needs a target, and an example on which its claim can be tried")

    def add(user_rule: TypingRule) -> TypingRule:
        for example in examples:
            _try_example(user_rule, example)
        return USER_RULES.register(*targets)(user_rule)

    return add


@cache
def load_entry_points() -> tuple[str, ...]:
    """Import what installed packages offer under the entry-point group `bwsk_fx.rules`, once per process.

    Importing an entry point registers its rules with `bwsk_fx.rule`.

    Returns:
        The names of the entry points.

    Raises:
        RuleError: An entry point cannot be loaded; the message names it and its package.
    """
    return tuple(_load(point) for point in entry_points(group=ENTRY_POINTS))


def overridden(graph_module: fx.GraphModule, overrides: Overrides, dynamic: set[fx.Node]) -> dict[fx.Node, Verdict]:
    """Return the verdicts that overrides give, after trying each claim on random operands of the node's shapes.

    A module path or a `Matching` outweighs a class or function; of equals, the later one counts.

    Args:
        graph_module: A captured graph.
        overrides: What is meant (a module class, a function, the path of a module or the name of a node, or a
            `Matching`) to what holds there: K or GRAY, an `Undo` or a rule for S, or a whole verdict.
        dynamic: The graph's dynamic nodes.

    Raises:
        RuleError: A key matches no node, S is claimed without an inverse, or an inverse does not hold.
    """
    found: dict[fx.Node, Verdict] = {}
    for key, value in sorted(overrides.items(), key=lambda item: isinstance(item[0], (str, Matching))):
        nodes = [node for node in graph_module.graph.nodes if node in dynamic and _matches(graph_module, node, key)]
        if not nodes:
            raise RuleError(
                f"the override of {_key_name(key)} matches no operator of the graph{_near(graph_module, key)}"
            )
        for node in nodes:
            found[node] = _override(graph_module, node, value, dynamic)
    return found


def _load(point: EntryPoint) -> str:
    try:
        point.load()
    except Exception as error:
        package = point.dist.name if point.dist is not None else "an installed package"
        raise RuleError(
            f"the entry point '{point.name}' of {package} in group '{ENTRY_POINTS}' cannot be loaded: "
            f"{type(error).__name__}: {error}"
        ) from error
    return point.name


def _try_example(user_rule: TypingRule, example: Example) -> None:
    executed = execute(example.target, example.args, example.kwargs)
    name = f"rule '{rule_name(user_rule)}' on {target_name(executed.call)}"
    verdict = _checked(user_rule(executed.call), name)
    if verdict.label is Label.S:
        _require_inverse(verdict, name)
        leaves = pytree.tree_leaves((example.args, dict(example.kwargs)))
        names = {
            id(value): node.name for node, value in zip(executed.call.operands, executed.run.operands, strict=True)
        }
        dynamic = {id(leaf): names[id(leaf)] for leaf in leaves if id(leaf) in names}
        _try(Claim(example.target, tuple(example.args), example.kwargs, dynamic, verdict, fixed=True), name)
    else:
        _require_amount(verdict, executed, name)


def _override(graph_module: fx.GraphModule, node: fx.Node, value: Value, dynamic: set[fx.Node]) -> Verdict:
    module = graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None
    call = Call(node, module, dynamic)
    name = f"the override of node '{node.name}'"
    verdict = replace(_as_verdict(call, value, name), confidence=OVERRIDE, rule=OVERRIDE_RULE)
    if verdict.label is Label.S:
        _require_inverse(verdict, name)
        values = _values_for(call, name)
        claim = claim_of(node, node.target if module is None else module, *values, dynamic, verdict)  # type: ignore[arg-type]
        _try(replace(claim, fixed=True), name)
    return verdict


def _as_verdict(call: Call, value: Value, name: str) -> Verdict:
    if isinstance(value, Undo):
        return preserves("override: the user states its inverse", undo=value)
    if isinstance(value, str):
        if value not in (Label.K, Label.GRAY):
            raise RuleError(f"{name} is '{value}'; say 'K' or 'GRAY', and for S give the inverse, an Undo")
        return Verdict(Label(value), None, None, OVERRIDE, f"override: the user calls it {value}", OVERRIDE_RULE)
    return _checked(value if isinstance(value, Verdict) else value(call), name)


def _checked(verdict: Any, name: str) -> Verdict:
    if not isinstance(verdict, Verdict):
        raise RuleError(f"{name} gave a {type(verdict).__name__} instead of a Verdict")
    return verdict


def _require_inverse(verdict: Verdict, name: str) -> None:
    if verdict.undo is None:
        raise RuleError(f"{name} claims S without an inverse; pass `undo=Undo(...)` to `preserves`")


def _require_amount(verdict: Verdict, executed: Executed, name: str) -> None:
    erased = verdict.erasure.elements if verdict.erasure is not None else None
    there = sum(operand.numel() for operand in executed.run.operands)
    if erased is not None and erased > there:
        raise RuleError(f"{name} erases {erased:,} elements of operands that have {there:,}")


def _try(claim: Claim, name: str) -> None:
    kinds = tuple(ADVERSARIAL)
    for trial in (claim.try_own(kinds), claim.try_in(torch.float64, kinds)):
        if not trial.holds:
            raise RuleError(f"{name} claims S, but its inverse fails in {trial.dtype}: {trial.failure}")
        if trial.real is not None and trial.real.elements and trial.real.lost == trial.real.elements:
            raise RuleError(f"{name} claims S, but its output determines no element of the operand in {trial.dtype}")


def _values_for(call: Call, name: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return random values for the operands of a captured node, and the static ones as they are."""

    def value_of(node: fx.Node) -> Any:
        static = call.static(node)
        return static if static is not None else pytree.tree_map(random_values, node.meta["val"])

    if call.module is not None and any(parameter.is_meta for parameter in call.module.parameters()):
        raise RuleError(f"{name} cannot be tried: the parameters of '{call.node.target}' are on the meta device")
    values = {node: value_of(node) for node in call.node.all_input_nodes}
    args, kwargs = fx.node.map_arg((call.args, dict(call.kwargs)), values.__getitem__)
    return tuple(args), dict(kwargs)


def _matches(graph_module: fx.GraphModule, node: fx.Node, key: Key) -> bool:
    if isinstance(key, Matching):
        return bool(key.predicate(node))
    if isinstance(key, str):
        return key in (node.name, node.target if node.op == "call_module" else None)
    if isinstance(key, type):
        return node.op == "call_module" and isinstance(graph_module.get_submodule(str(node.target)), key)
    return node.target is key


def _near(graph_module: fx.GraphModule, key: Key) -> str:
    if not isinstance(key, str):
        return ""
    names = {name for node in graph_module.graph.nodes for name in (node.name, str(node.target))}
    close = difflib.get_close_matches(key, names, n=3)
    return f"; did you mean {', '.join(close)}?" if close else ""


def _key_name(key: Key) -> str:
    return f"'{key}'" if isinstance(key, str) else getattr(key, "__qualname__", str(key))
