"""Products that sum over shared dimensions, as systems of linear equations for either factor.

Each operator of the family has one *form*: a function that reads its arguments as `Terms`. It serves typing, where the
arguments are nodes, and the inverse, where they are tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from bwsk_fx.rules.arguments import Arguments
from bwsk_fx.rules.registry import Call, erases, others, preserves, unproven
from bwsk_fx.rules.sizes import as_int, elements
from bwsk_fx.rules.undo import Factors, Run, Undo, unbroadcast, wide
from bwsk_fx.verdict import REFINED, Verdict

FULL_RANK = "the factor at hand has full rank"


@dataclass(frozen=True)
class Terms:
    """A call as beta · summand + alpha · Σ left · right.

    Attributes:
        left: The first factor: a node, a tensor or a parameter.
        right: The second one.
        labels: A letter per dimension of left, right and result, as einsum has them. Letters that the result lacks are
            summed over; a dimension of size one stretches to the size of its namesakes.
        summand: What is added, else None.
        beta: Its factor.
        alpha: The product's factor.
        sizes: The result's shape with a dimension per letter, where the operator merges some (kron).
        conjugated: Whether the first factor enters conjugated.
    """

    left: Any
    right: Any
    labels: tuple[str, str, str]
    summand: Any = None
    beta: Any = 1
    alpha: Any = 1
    sizes: tuple[int, ...] | None = None
    conjugated: bool = False

    @property
    def factors(self) -> tuple[Any, Any]:
        """Both factors."""
        return self.left, self.right


Form = Callable[[Arguments], Terms]


@dataclass(frozen=True)
class System:
    """The equations for one factor: `unknowns` per vector, `equations` for each of them.

    Attributes:
        side: Which factor is unknown: 0 or 1.
        unknowns: The product of the sizes that are summed over; None where it varies with the batch.
        equations: The product of the sizes that only the factor at hand has; None where it varies with the batch.
        shared: Letters that both factors and the result have.
        inner: Letters that are summed over.
        outer: Letters that the result has from the factor at hand alone.
        own: Letters that the result has from the unknown factor alone.
        gone: Whether a dimension of the unknown factor is summed over, or repeats a letter, on its own.
    """

    side: int
    unknowns: int | None
    equations: int | None
    shared: str
    inner: str
    outer: str
    own: str
    gone: bool

    @property
    def determined(self) -> bool:
        """Whether the unknowns are determined if the factor at hand has full rank."""
        known = self.unknowns is not None and self.equations is not None
        return known and not self.gone and self.equations >= self.unknowns  # type: ignore[operator]

    @property
    def matrices(self) -> tuple[str, ...]:
        """The letters of each dimension of the matrices (shared…, equations, unknowns) to solve with."""
        return (*self.shared, self.outer, self.inner)

    @property
    def square(self) -> bool:
        """Whether there are just as many equations as unknowns."""
        return self.unknowns == self.equations


def value_of(argument: Any) -> Tensor:
    """Return the (fake) tensor of a node, or the tensor itself."""
    return argument.meta["val"] if isinstance(argument, fx.Node) else argument


def system(terms: Terms, side: int) -> System:
    """Return the equations that a call is for one of its factors."""
    mine, theirs = (_stretched(terms, which) for which in (side, 1 - side))
    out = terms.labels[2]
    shared = "".join(letter for letter in mine if letter in theirs and letter in out)
    inner = "".join(letter for letter in mine if letter in theirs and letter not in out)
    outer = "".join(letter for letter in theirs if letter not in mine and letter in out)
    own = "".join(letter for letter in mine if letter not in theirs and letter in out)
    gone = any(letter not in theirs and letter not in out for letter in mine)
    repeated = len(set(terms.labels[side])) < len(terms.labels[side])
    known = _sizes(terms)
    return System(side, _total(known, inner), _total(known, outer), shared, inner, outer, own, gone or repeated)


def _stretched(terms: Terms, side: int) -> str:
    """Return a factor's letters without dimensions of size one, which hold no element that the result tells apart."""
    shape = value_of(terms.factors[side]).shape
    return "".join(letter for letter, size in zip(terms.labels[side], shape, strict=True) if as_int(size) != 1)


def _sizes(terms: Terms) -> dict[str, Any]:
    sizes: dict[str, Any] = {}
    for factor, letters in zip(terms.factors, terms.labels, strict=False):
        for letter, size in zip(letters, value_of(factor).shape, strict=True):
            sizes[letter] = size if sizes.get(letter, 1) == 1 or as_int(size) != 1 else sizes[letter]
    return sizes


def _total(sizes: Mapping[str, Any], letters: Iterable[str]) -> int | None:
    return as_int(math.prod(sizes[letter] for letter in letters))


# -- labels ---------------------------------------------------------------------------------------------------------


def product(call: Call, form: Form) -> Verdict:
    """Return the verdict of a product: S where a factor, or the summand, can be solved for."""
    terms = form(call)
    if call.is_dynamic(terms.summand) and terms.beta != 0:
        return _summand(call, form, terms)
    sides = [side for side in (0, 1) if call.is_dynamic(terms.factors[side])]
    if terms.alpha == 0 or not sides:
        return erases("a factor of zero leaves nothing of it", call.elements(), confidence=REFINED)
    if terms.left is terms.right:
        return _with_itself(call)
    systems = [system(terms, side) for side in sides]
    solvable = [each for each in systems if each.determined and not _near_singular(terms, each)]
    if solvable:
        return _solved(call, form, terms, min(solvable, key=lambda each: each.square))
    unsolvable = [each for each in systems if not each.determined]
    return _contracting(call, terms, sorted(unsolvable, key=lambda each: call.operands.index(terms.factors[each.side])))


def _summand(call: Call, form: Form, terms: Terms) -> Verdict:
    if any(factor is terms.summand for factor in terms.factors):
        return unproven("the summand is a factor, too")
    number = call.operands.index(terms.summand)
    undo = Undo(partial(rebuild_summand, form), (number,))
    return preserves("taking the product off again rebuilds the summand", others(call, number), REFINED, undo=undo)


def _with_itself(call: Call) -> Verdict:
    why, missing = "an operand and its negative have the same product with themselves", call.erased()
    if missing is not None and missing > 0:
        return erases(why, missing, confidence=REFINED)
    return erases(why, bits=1, confidence=REFINED)


def _solved(call: Call, form: Form, terms: Terms, equations: System) -> Verdict:
    unknown = terms.factors[equations.side]
    if not (value_of(unknown).is_floating_point() or value_of(unknown).is_complex()):
        return unproven("whole numbers wrap around, and whether the map can be undone then depends on its factor")
    number = call.operands.index(unknown)
    witness = others(call, number)
    how = "is square" if equations.square else "expands"
    by = f"solving with {', '.join(witness.names)}" if witness.names else "the pseudo-inverse"
    sizes = f"{equations.unknowns} → {equations.equations}"
    why = f"{sizes} {how}, so {by} rebuilds the operand if the factor has full rank"
    undo = Undo(partial(rebuild_factor, form, equations.side), (number,), condition=partial(condition, form, equations))
    return preserves(f"{why}; shapes cannot show that, certify does", witness, REFINED, undo=undo, domain=FULL_RANK)


def _contracting(call: Call, terms: Terms, systems: Sequence[System]) -> Verdict:
    if not systems:
        return unproven("attention probabilities are near singular in practice")
    width, out = systems[0].unknowns, systems[0].equations
    if systems[0].gone:
        return by_counting(call, "it sums over a dimension of one factor, or picks a diagonal")
    if width is None or out is None:
        return unproven("its width varies with the batch")
    total = elements(value_of(terms.factors[systems[0].side]))
    lost = None if total is None or width == 0 else total // width * (width - out)
    return erases(f"{width} → {out} contracts and erases {width - out} of {width} dimensions", lost, confidence=REFINED)


def by_counting(call: Call, why: str) -> Verdict:
    """Return K with the number of missing elements, and GRAY where none are missing."""
    missing = call.erased()
    if missing is None or missing <= 0:
        return unproven(f"{why}, and the result is no smaller")
    return erases(why, missing, confidence=REFINED)


def _near_singular(terms: Terms, equations: System) -> bool:
    """Whether solving would need a square matrix of attention probabilities, whose rows are much alike in practice."""
    return equations.square and equations.unknowns != 1 and _is_softmax(terms.factors[1 - equations.side])


def _is_softmax(factor: Any) -> bool:
    for _ in range(4):
        name = _operator_name(factor)
        if "softmax" in name:
            return True
        if name not in ("dropout", "to", "type", "type_as", "float", "half", "bfloat16") or not factor.all_input_nodes:
            return False
        factor = factor.all_input_nodes[0]
    return False


def _operator_name(factor: Any) -> str:
    if not isinstance(factor, fx.Node):
        return ""
    if factor.op == "call_module" and factor.graph.owning_module is not None:
        return type(factor.graph.owning_module.get_submodule(str(factor.target))).__name__.lower()
    return str(getattr(factor.target, "__name__", factor.target)).lower()


# -- inverses -------------------------------------------------------------------------------------------------------


def rebuild_factor(form: Form, side: int, run: Run) -> Tensor:
    """Return the unknown factor of an executed call."""
    terms = form(run)
    result = _scaled_back(terms, run.output)
    known = terms.factors[1 - side]
    if terms.conjugated and side == 1:
        terms = replace(terms, left=terms.left.conj())
    found = solve(terms, side, result, _factors(run, known, partial(factored, terms, system(terms, side))))
    return found.conj().resolve_conj() if terms.conjugated and side == 0 else found


def _scaled_back(terms: Terms, output: Tensor) -> Tensor:
    """Return the bare product: the output less its summand, over alpha."""
    result = output.to(wide(output.dtype))
    if terms.summand is not None and terms.beta != 0:
        result = result - terms.beta * terms.summand.to(result.dtype)
    return result / terms.alpha


def _factors(run: Run, known: Tensor, compute: Callable[[], Factors]) -> Factors:
    """Return the factors of the factor at hand; those of a static one are computed once."""
    dynamic = any(known is operand for operand in run.operands)
    return compute() if dynamic else run.once("factor", compute)


def solve(terms: Terms, side: int, result: Tensor, factors: Factors | None = None) -> Tensor:
    """Return a factor in float64, given the bare product and the other factor.

    Args:
        terms: The call; the unknown factor only needs a shape.
        side: Which factor is unknown.
        result: The product.
        factors: What `factored` makes of the factor at hand, where it is known already.
    """
    equations = system(terms, side)
    shape = value_of(terms.factors[side]).shape
    factors = factored(terms, equations) if factors is None else factors
    solution = factors.solve(_arranged(result, terms, equations))
    present = (*equations.shared, *equations.inner, *equations.own)
    sizes = dict(zip(terms.labels[side], shape, strict=True))
    solution = solution.reshape([sizes[letter] for letter in present])
    return solution.permute([present.index(letter) for letter in _stretched(terms, side)]).reshape(shape)


def factored(terms: Terms, equations: System) -> Factors:
    """Return the factors of the matrices (shared…, equations, unknowns) that the factor at hand makes."""
    known, letters = terms.factors[1 - equations.side], terms.labels[1 - equations.side]
    sizes = _sizes(terms)
    wanted = (*equations.shared, *equations.outer, *equations.inner)
    matrix = _to_letters(known.detach().to(wide(known.dtype)), letters, wanted)
    shape = [math.prod(sizes[letter] for letter in letters) for letters in equations.matrices]
    return Factors.of(matrix.reshape(shape))


def condition(form: Form, equations: System, run: Run) -> float:
    """Return the worst condition number of the factor at hand."""
    terms = form(run)
    return _factors(run, terms.factors[1 - equations.side], partial(factored, terms, equations)).condition()


def _arranged(result: Tensor, terms: Terms, equations: System) -> Tensor:
    """Return the product as (shared…, equations, own)."""
    result = result if terms.sizes is None else result.reshape(terms.sizes)
    wanted = (*equations.shared, *equations.outer, *equations.own)
    arranged = _to_letters(result, terms.labels[2], wanted)
    sizes = dict(zip(wanted, arranged.shape, strict=True))
    shape = [math.prod(sizes[letter] for letter in letters) for letters in (*equations.matrices[:-1], equations.own)]
    return arranged.reshape(shape)


def _to_letters(value: Tensor, letters: str, wanted: Sequence[str]) -> Tensor:
    """Permute dimensions to `wanted`, take diagonals of letters that occur twice, and sum over all others."""
    places = {letter: number for number, letter in enumerate(dict.fromkeys((*wanted, *letters)))}
    return torch.einsum(value, [places[letter] for letter in letters], [places[letter] for letter in wanted])


def rebuild_summand(form: Form, run: Run) -> Tensor:
    """Return the summand of an executed call: the output less the product, over beta."""
    terms = form(run)
    result = run.output.to(wide(run.output.dtype))
    if terms.alpha != 0:
        result = result - terms.alpha * multiplied(terms, result.dtype)
    return unbroadcast(result / terms.beta, terms.summand.shape)


def multiplied(terms: Terms, dtype: torch.dtype) -> Tensor:
    """Return the bare product of two factors at hand."""
    left = terms.left.conj() if terms.conjugated else terms.left
    places = {letter: number for number, letter in enumerate(dict.fromkeys("".join(terms.labels)))}
    left_at, right_at, out_at = ([places[letter] for letter in letters] for letters in terms.labels)
    return torch.einsum(left.to(dtype), left_at, terms.right.to(dtype), right_at, out_at)
