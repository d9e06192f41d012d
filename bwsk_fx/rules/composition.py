"""Typing by composition: the verdict of a call from the verdicts of the ATen operators that it is made of.

An operand is rebuilt by closing what is at hand: the outputs, static values, the other operands. A step whose result
and witness are at hand gives its operand back, and one whose operands are at hand can be run forward. A call is S
where this reaches the operand, K where every way from the operand to the outputs passes one and the same K step, and
GRAY otherwise.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from bwsk_fx import _torch_private as private
from bwsk_fx.rules import sizes
from bwsk_fx.rules.decomposition import (
    Decomposition,
    Template,
    UndecomposableError,
    argument_key,
    decompose,
    module_key,
)
from bwsk_fx.rules.factories import is_made
from bwsk_fx.rules.random import is_random
from bwsk_fx.rules.registry import Call, by_products, erases, judge, other_operand, preserves, unknown, unproven
from bwsk_fx.rules.statistics import statistics
from bwsk_fx.rules.undo import Run, Undo, as_it_is
from bwsk_fx.verdict import NOTHING, REFINED, Erasure, Label, Verdict, Witness, WitnessKind

_NAME = "composition"


@dataclass(frozen=True)
class Move:
    """One step of rebuilding: run `step` forward, or undo it.

    Attributes:
        step: The operator.
        verdict: Its S verdict where it is undone; None where it runs forward.
    """

    step: fx.Node
    verdict: Verdict | None


def compose(call: Call) -> Verdict:
    """Return the verdict of a call without a rule from its decomposition; GRAY where there is none."""
    try:
        parts = _decomposed(call)
    except UndecomposableError as error:
        return unknown(call, str(error))
    verdict = _composed(call, parts)
    return replace(verdict, rule=_NAME, rationale=f"{_NAME}: {verdict.rationale}")


def _decomposed(call: Call) -> Decomposition:
    """Decompose a call, or take the decomposition of an equal module that was typed before."""
    if private.is_custom_operator(call.target):
        raise UndecomposableError(f"{call.target} is opaque: an operator that is not PyTorch's own")
    args, kwargs = pytree.tree_map_only(fx.Node, lambda node: node.meta["val"], (call.args, dict(call.kwargs)))
    operands = [operand.meta["val"] for operand in call.operands]
    if call.module is None:
        return decompose(call.target, args, kwargs, operands)  # type: ignore[arg-type]
    key = (module_key(call.module), argument_key((args, kwargs)), argument_key(operands))
    if key not in call.memory:
        call.memory[key] = _template(call.module, args, kwargs, operands)
    if isinstance(call.memory[key], UndecomposableError):
        raise call.memory[key]
    return call.memory[key].of_module(call.module)


def _template(module: nn.Module, args: Any, kwargs: Any, operands: list[Tensor]) -> Template | UndecomposableError:
    try:
        return Template.of(decompose(module, args, kwargs, operands), module)
    except UndecomposableError as error:
        return error


def _composed(call: Call, parts: Decomposition) -> Verdict:
    verdicts = {step: _verdict_of(parts, step) for step in parts.steps() if step in parts.dynamic}
    words = _in_words(parts)
    for number in range(len(parts.operands)):
        found = _way_back(parts, number, verdicts)
        if found is not None:
            undo = Undo(partial(_rebuild, number), (number,), partial(_by_products, number))
            return preserves(f"each step of {words} is undone", _witness(call, number, *found), REFINED, undo=undo)
    return _not_preserved(parts, verdicts, words)


def _way_back(
    parts: Decomposition, number: int, verdicts: Mapping[fx.Node, Verdict]
) -> tuple[list[Move], tuple[fx.Node, ...]] | None:
    """Return moves that rebuild an operand, and the statistics of a normalisation where they need them."""
    operand = parts.operands[number]
    moves = moves_to(parts, operand, verdicts)
    if moves is not None:
        return moves, ()
    given = statistics(parts, _affected(parts, operand))
    moves = moves_to(parts, operand, verdicts, given) if given else None
    return None if moves is None else (moves, given)


def moves_to(
    parts: Decomposition, operand: fx.Node, verdicts: Mapping[fx.Node, Verdict], given: Collection[fx.Node] = ()
) -> list[Move] | None:
    """Return the moves that rebuild `operand` from the outputs, what is given, and what does not depend on it.

    None where it cannot be reached.
    """
    affected = _affected(parts, operand)
    known = {node for node in parts.graph.nodes if node not in affected} | set(parts.outputs) | set(given)
    moves: list[Move] = []
    found = True
    while found and operand not in known:
        found = False
        for step in reversed([step for step in parts.steps() if step in affected]):
            move = _move(parts, step, verdicts[step], known)
            if move is not None:
                moves.append(move)
                found = True
    return moves if operand in known else None


def _move(parts: Decomposition, step: fx.Node, verdict: Verdict, known: set[fx.Node]) -> Move | None:
    """Return a move at `step` that makes something known, and note what it makes known."""
    if step.target is operator.getitem and not isinstance(step.args[0].meta["val"], Tensor):  # type: ignore[union-attr]
        return None
    operands = parts.call(step).operands
    rebuilt = [operands[index] for index in verdict.undo.operands] if verdict.undo is not None else []
    if any(node not in known for node in rebuilt) and _at_hand(step, verdict, known):
        known.update(rebuilt)
        return Move(step, verdict)
    results = _results(step)
    runs = all(node in known for node in operands) and not is_random(parts.call(step))
    if runs and any(node not in known for node in results):
        known.update(results)
        return Move(step, None)
    return None


def _at_hand(step: fx.Node, verdict: Verdict, known: set[fx.Node]) -> bool:
    """Whether a step's result and witness are known; by-products belong to the witness, not to the result."""
    results = _results(step)
    witness = verdict.witness or NOTHING
    if witness.kind is WitnessKind.OTHER_OPERAND and any(
        node.name in witness.names and node not in known for node in step.all_input_nodes
    ):
        return False
    needed = results[:1] if witness.kind is WitnessKind.BY_PRODUCTS else results
    return bool(needed) and all(node in known for node in needed)


def _results(step: fx.Node) -> list[fx.Node]:
    """Return the nodes of a step's tensors: itself, or its parts in order."""
    if isinstance(step.meta["val"], Tensor):
        return [step]
    return sorted((user for user in step.users if user.target is operator.getitem), key=lambda user: user.args[1])  # type: ignore[arg-type, return-value]


def _affected(parts: Decomposition, operand: fx.Node) -> set[fx.Node]:
    affected = {operand}
    for node in parts.graph.nodes:
        if any(source in affected for source in node.all_input_nodes) or (
            node.op == "call_function" and _draws(parts, node)
        ):
            affected.add(node)
    return affected


def _draws(parts: Decomposition, node: fx.Node) -> bool:
    return node in parts.dynamic and is_random(parts.call(node))


def _verdict_of(parts: Decomposition, step: fx.Node) -> Verdict:
    call = parts.call(step)
    if _is_part(step) and not isinstance(step.args[0].meta["val"], Tensor):  # type: ignore[union-attr]
        return unproven("one of the results of the step before")
    if not call.operands:
        return unproven("it draws random values")
    verdict = judge(call)
    if verdict is not None and _only_rounds(parts, step, verdict):
        return preserves("it rounds to the dtype of the operands, as any operator does", undo=Undo(as_it_is))
    return unknown(call, "an operator of the decomposition") if verdict is None else verdict


def _only_rounds(parts: Decomposition, step: fx.Node, verdict: Verdict) -> bool:
    """Whether a step casts what was computed in a wider dtype back to one that holds the operands."""
    if verdict.label is not Label.K or step.target is not torch.ops.aten._to_copy.default:
        return False
    before, after = step.all_input_nodes[0].meta["val"].dtype, step.meta["val"].dtype
    given = [operand.meta["val"].dtype for operand in parts.operands]
    floats = all(dtype.is_floating_point for dtype in (before, after, *given))
    return floats and all(sizes.widens(dtype, after) for dtype in given)


def _not_preserved(parts: Decomposition, verdicts: Mapping[fx.Node, Verdict], words: str) -> Verdict:
    on_the_way = _on_the_way(parts)
    if not on_the_way and parts.operands[0] not in parts.outputs:
        lost = sizes.elements(parts.operands[0].meta["val"])
        return erases(f"what {words} computes does not depend on the values of its operand", lost, confidence=REFINED)
    gray = [step for step in on_the_way if verdicts[step].label is Label.GRAY]
    if gray:
        return unproven(f"{verdicts[gray[0]].rationale} (in {words})")
    cuts = [step for step in on_the_way if verdicts[step].label is Label.K and _is_cut(parts, step)]
    if not cuts:
        return unproven(f"no way of undoing {words} leads back to an operand, and no single step erases it")
    names = ", ".join(dict.fromkeys(_name(step) for step in cuts))
    only = _of_operand(parts, cuts[0], verdicts[cuts[0]].erasure) if len(cuts) == 1 else None
    return replace(erases(f"{names} erases, in {words}", confidence=REFINED), erasure=only)


def _of_operand(parts: Decomposition, cut: fx.Node, erasure: Erasure | None) -> Erasure | None:
    """Return what a single cut erases of the first operand, whose elements the steps before may have copied.

    None where nothing is certain to be erased once the copies are taken off, or where the cut also reads other
    operands, of which its rule may speak.
    """
    given = parts.call(cut).operands
    reached = [step for step in given if step in _reached(parts)]
    counts = [sizes.elements(step.meta["val"]) for step in (parts.operands[0], *reached)]
    others = {step for operand in parts.operands[1:] for step in _reached(parts, operand=operand)}
    if erasure is None or None in counts or others.intersection(given):
        return None
    total, *held = [count for count in counts if count is not None]
    copies = sum(held) - total
    elements = None if erasure.elements is None else erasure.elements - copies
    left = elements if elements is not None and elements > 0 else None
    bits = erasure.bits if copies == 0 else None
    return None if left is None and bits is None else replace(erasure, elements=left, bits=bits)


def _on_the_way(parts: Decomposition) -> list[fx.Node]:
    """Return the steps between the first operand and the outputs."""
    reached = _reached(parts)
    needed: set[fx.Node] = set(parts.outputs)
    for node in reversed(parts.graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    return [step for step in parts.steps() if step in reached and step in needed and not _is_part(step)]


def _is_cut(parts: Decomposition, step: fx.Node) -> bool:
    """Whether every way from the first operand to the outputs passes `step`."""
    return not _reached(parts, step).intersection(parts.outputs)


def _reached(parts: Decomposition, closed: fx.Node | None = None, operand: fx.Node | None = None) -> set[fx.Node]:
    """Return what the values of an operand, the first one, reach, apart from `closed` and what only takes its shape."""
    reached = {parts.operands[0] if operand is None else operand}
    for node in parts.graph.nodes:
        if node is not closed and not is_made(node) and any(source in reached for source in node.all_input_nodes):
            reached.add(node)
    return reached


def _is_part(step: fx.Node) -> bool:
    return step.target is operator.getitem


def _in_words(parts: Decomposition) -> str:
    names = list(dict.fromkeys(_name(step) for step in parts.steps() if step in parts.dynamic and not _is_part(step)))
    return " → ".join(names[:6]) + (" → …" if len(names) > 6 else "") or "nothing"


def _name(step: fx.Node) -> str:
    target: Any = step.target
    return f"aten.{target.overloadpacket.__name__}" if isinstance(target, torch._ops.OpOverload) else target.__name__


def _witness(call: Call, number: int, moves: list[Move], given: Sequence[fx.Node]) -> Witness:
    """Return what the moves use beyond the outputs: the other operands, or by-products of the steps."""
    statistic = tuple(node.name for node in given)
    others = [operand for index, operand in enumerate(call.operands) if index != number]
    if others:
        witness = other_operand(*others)
        return replace(witness, names=(*witness.names, *statistic))
    kinds = [(move.step, move.verdict.witness) for move in moves if move.verdict is not None and move.verdict.witness]
    made = [(step, witness) for step, witness in kinds if witness.kind is WitnessKind.BY_PRODUCTS]
    names = [f"{step.name}.{name}" for step, witness in made for name in witness.names]
    if not names and not given:
        return NOTHING
    counts = [witness.elements for _, witness in made] + [sizes.elements(node.meta["val"]) for node in given]
    known = [count for count in counts if count is not None]
    return by_products(*names, *statistic, elements=sum(known) if len(known) == len(counts) else None)


# -- running it -----------------------------------------------------------------------------------------------------


def _by_products(number: int, run: Run) -> Mapping[str, Tensor]:
    """Return the by-products of the steps that are undone, as `step.name`."""
    parts, moves, given = _replay(number, run)
    found: dict[str, Tensor] = {statistic.name: statistic.meta["val"] for statistic in given}
    for move in moves:
        if move.verdict is not None and move.verdict.undo is not None and move.verdict.undo.by_products is not None:
            made = move.verdict.undo.by_products(_step_run(parts, move.step, _values(parts)))
            found |= {f"{move.step.name}.{name}": value for name, value in made.items()}
    return found


def _rebuild(number: int, run: Run) -> Tensor:
    """Undo the steps one by one; what depends on the operand is taken from the outputs alone."""
    parts, moves, given = _replay(number, run)
    hidden = _affected(parts, parts.operands[number])
    values = {node: _hidden(value) if node in hidden else value for node, value in _values(parts).items()}
    outputs = [leaf for leaf in pytree.tree_leaves(run.output) if isinstance(leaf, Tensor)]
    values |= dict(zip(parts.outputs, outputs, strict=False))
    values |= {statistic: run.by_products[statistic.name] for statistic in given}
    for move in moves:
        step_run = _step_run(parts, move.step, values)
        if move.verdict is None:
            _store(move.step, move.step.target(*step_run.args, **step_run.kwargs), values)  # type: ignore[operator]
        else:
            _undo(parts, move.step, move.verdict, replace(step_run, by_products=_own(move.step, run)), values)
    return values[parts.operands[number]]


def _hidden(value: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda leaf: leaf.to("meta"), value)


def _undo(parts: Decomposition, step: fx.Node, verdict: Verdict, run: Run, values: dict[fx.Node, Tensor]) -> None:
    undo = verdict.undo
    assert undo is not None
    rebuilt = undo.rebuild(run)
    tensors = [rebuilt] if isinstance(rebuilt, Tensor) else rebuilt
    operands = parts.call(step).operands
    for index, tensor in zip(undo.operands, tensors, strict=True):
        values[operands[index]] = tensor.to(operands[index].meta["val"].dtype)


def _own(step: fx.Node, run: Run) -> dict[str, Tensor]:
    prefix = f"{step.name}."
    return {name.removeprefix(prefix): value for name, value in run.by_products.items() if name.startswith(prefix)}


def _replay(number: int, run: Run) -> tuple[Decomposition, list[Move], tuple[fx.Node, ...]]:
    """Decompose an executed call again, with stand-ins for what its inverse may not see."""
    stand_ins: dict[int, Tensor] = {}

    def stand_in(leaf: Tensor) -> Tensor:
        return stand_ins.setdefault(id(leaf), _stand_in(leaf) if leaf.is_meta else leaf.detach().clone())

    args, kwargs, operands = pytree.tree_map_only(Tensor, stand_in, (run.args, dict(run.kwargs), run.operands))
    parts = decompose(run.target, args, kwargs, operands)
    verdicts = {step: _verdict_of(parts, step) for step in parts.steps() if step in parts.dynamic}
    found = _way_back(parts, number, verdicts)
    if found is None:
        raise UndecomposableError("on these values the decomposition has steps that cannot be undone")
    return parts, *found


def _stand_in(hidden: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if hidden.is_floating_point() or hidden.is_complex():
        return torch.randn(hidden.shape, generator=generator, dtype=torch.float32).to(hidden.dtype)
    return torch.zeros(hidden.shape, dtype=hidden.dtype)


def _values(parts: Decomposition) -> dict[fx.Node, Any]:
    return {node: node.meta["val"] for node in parts.graph.nodes}


def _step_run(parts: Decomposition, step: fx.Node, values: Mapping[fx.Node, Any]) -> Run:
    args, kwargs = fx.node.map_arg((step.args, dict(step.kwargs)), lambda node: values[node])
    operands = tuple(values[operand] for operand in parts.call(step).operands)
    results = [values[node] for node in _results(step)]
    output = results[0] if isinstance(step.meta["val"], Tensor) else tuple(results)
    return Run(step.target, None, tuple(args), kwargs, operands, output)


def _store(step: fx.Node, result: Any, values: dict[fx.Node, Any]) -> None:
    for node, value in zip(_results(step), [result] if isinstance(result, Tensor) else result, strict=True):
        values[node] = value
