"""The registry of typing rules: what each torch-level operator preserves or erases.

A rule names its targets in a decorator and is a function of a few lines from a `Call` to a `Verdict`:

    @labels(nn.GELU, F.gelu)
    def gelu(call: Call) -> Verdict:
        return erases("each output has two inputs", bits=call.elements())

The registry is filled while the family files are imported, and never after.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from bwsk_fx.rules import sizes
from bwsk_fx.rules.arguments import Arguments
from bwsk_fx.rules.targets import Registry, method, rule_name
from bwsk_fx.rules.undo import Run, Undo
from bwsk_fx.verdict import NOTHING, OPERATOR, REFINED, UNKNOWN, Erasure, Label, Verdict, Witness, WitnessKind


@dataclass(frozen=True)
class Call(Arguments):
    """What a rule sees of one node.

    Attributes:
        node: The node; its values are fake tensors.
        module: The leaf module of a `call_module` node, else None.
        dynamic: All nodes of the graph whose values are dynamic.
        memory: What typing has found out about equal modules; shared by the calls of one graph.
    """

    node: fx.Node
    module: Any
    dynamic: Collection[fx.Node]
    memory: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def args(self) -> tuple[Any, ...]:  # type: ignore[override]
        """The node's positional arguments."""
        return self.node.args

    @property
    def kwargs(self) -> Mapping[str, Any]:  # type: ignore[override]
        """The node's keyword arguments."""
        return self.node.kwargs

    @property
    def target(self) -> Any:
        """The function, the method's name, or the module itself."""
        return self.node.target if self.module is None else self.module

    @property
    def operands(self) -> tuple[fx.Node, ...]:
        """The distinct dynamic operands that are tensors, in order; static ones are not among them."""
        return tuple(operand for operand in self.node.all_input_nodes if operand in self.dynamic)

    @property
    def value(self) -> torch.Tensor:
        """The fake result; the first one where there are several."""
        value = self.node.meta["val"]
        return value[0] if isinstance(value, (tuple, list)) else value

    @property
    def before(self) -> torch.Tensor:
        """The fake value of the first dynamic operand."""
        return self.operands[0].meta["val"]

    def is_dynamic(self, operand: Any) -> bool:
        """Whether an argument is a dynamic node."""
        return isinstance(operand, fx.Node) and operand in self.dynamic

    def static(self, operand: Any) -> torch.Tensor | None:
        """Return the values of a static tensor argument, or of a module's parameter.

        None where they are not at hand: dynamic operands, fake tensors, tensors on the meta device, no tensor at all.
        """
        if isinstance(operand, fx.Node):
            operand = None if operand in self.dynamic else _value_of(operand)
        known = isinstance(operand, torch.Tensor) and not operand.is_meta and not hasattr(operand, "fake_mode")
        return operand.detach() if known else None

    def elements(self) -> int | None:
        """Return the elements per sample of the first dynamic operand."""
        return sizes.elements(self.before)

    def erased(self) -> int | None:
        """Return how many elements per sample the result has less than the first dynamic operand."""
        return sizes.erased(self.before, self.value)


def _value_of(node: fx.Node) -> Any:
    owner = node.graph.owning_module
    if node.op != "get_attr" or owner is None:
        return node.meta.get("val")
    path, _, name = str(node.target).rpartition(".")
    return getattr(owner.get_submodule(path), name)


TypingRule = Callable[[Call], Verdict]
_RULES: Registry[TypingRule] = Registry("typing rule")
labels = _RULES.register
USER_RULES: Registry[TypingRule] = Registry("user rule")


def registered_rules() -> Mapping[Any, TypingRule]:
    """Return the registry, target to rule, for reports and tests."""
    return dict(_RULES)


def judge(call: Call) -> Verdict | None:
    """Apply the rule of a node, and hold its verdict against sizes and dtypes; None where there is no rule."""
    rule = rule_of(call)
    if rule is None:
        return None
    if call.operands and isinstance(call.before, torch.Tensor) and call.elements() == 0:
        verdict = preserves("there is no element to erase", undo=Undo(no_elements))
    else:
        verdict = _without_narrowing(call, rule(call))
    name = rule_name(rule)
    return replace(verdict, rule=name, rationale=f"{name}: {verdict.rationale}")


def unknown(call: Call, why: str) -> Verdict:
    """Return the GRAY verdict, at confidence 0.3, of a node that no rule covers."""
    return Verdict(Label.GRAY, None, None, UNKNOWN, f"unknown: no rule for {target_name(call)}, {why}", "unknown")


def every(call: Call) -> tuple[int, ...]:
    """Return the numbers of all dynamic operands, for an `Undo` that rebuilds each of them."""
    return tuple(range(len(call.operands)))


def no_elements(run: Run) -> torch.Tensor:
    """Rebuild an operand without elements from its shape."""
    return torch.empty_like(run.before, device="cpu")


_REINTERPRETS = ("Tensor.view", "view.dtype")  # the same bits in another dtype


def _without_narrowing(call: Call, verdict: Verdict) -> Verdict:
    """Return a K verdict where a call labelled S also rounds its result to a smaller dtype."""
    result, operand = call.node.meta["val"], call.before
    if verdict.label is not Label.S or not isinstance(result, torch.Tensor) or not isinstance(operand, torch.Tensor):
        return verdict
    if isinstance(call.argument(1, "dtype"), torch.dtype) and target_name(call) in _REINTERPRETS:
        return verdict
    if not (operand.is_floating_point() and result.is_floating_point()) or sizes.widens(operand.dtype, result.dtype):
        return verdict
    why = f"it also narrows {sizes.short(operand.dtype)} to {sizes.short(result.dtype)}"
    return erases(why, bits=sizes.narrowed_bits(operand, result.dtype), confidence=REFINED)


def rule_of(call: Call) -> TypingRule | None:
    """Return the rule of a node, a user's before the library's; None where there is none."""
    return USER_RULES.of(call.target) or _RULES.of(call.target)


def target_name(call: Call) -> str:
    """Return what people call the operator of a node."""
    if call.module is not None:
        return type(call.module).__qualname__
    target = call.node.target
    return method(target) if isinstance(target, str) else getattr(target, "__name__", str(target))


def preserves(
    why: str,
    witness: Witness = NOTHING,
    confidence: float = OPERATOR,
    *,
    undo: Undo,
    domain: str | None = None,
) -> Verdict:
    """Return an S verdict; `undo` rebuilds the operand, and `domain` is the condition under which it does."""
    return Verdict(Label.S, witness, None, confidence, why, "", domain=domain, undo=undo)


def erases(
    why: str,
    elements: float | None = None,
    bits: float | None = None,
    confidence: float = OPERATOR,
    *,
    expected: bool = False,
) -> Verdict:
    """Return a K verdict; amounts are per sample, None where the rule does not know them, or `expected` ones."""
    known = elements is not None or bits is not None
    return Verdict(Label.K, None, Erasure(elements, bits, expected) if known else None, confidence, why, "")


def unproven(why: str) -> Verdict:
    """Return a GRAY verdict."""
    return Verdict(Label.GRAY, None, None, UNKNOWN, why, "")


def by_products(*names: str, elements: int | None = None, itemsize: int = 4) -> Witness:
    """Return a witness of values that the operator yields anyway."""
    size = None if elements is None else elements * itemsize
    return Witness(WitnessKind.BY_PRODUCTS, names, elements, size)


def other_operand(*operands: fx.Node) -> Witness:
    """Return a witness of other operands of the same node; nothing where there are none."""
    if not operands:
        return NOTHING
    values = [operand.meta["val"] for operand in operands]
    counts = [sizes.elements(value) for value in values]
    names = tuple(operand.name for operand in operands)
    if None in counts:
        return Witness(WitnessKind.OTHER_OPERAND, names)
    known = [count for count in counts if count is not None]
    size = sum(count * value.itemsize for count, value in zip(known, values, strict=True))
    return Witness(WitnessKind.OTHER_OPERAND, names, sum(known), size)


def others(call: Call, number: int = 0) -> Witness:
    """Return the witness of all dynamic operands but one."""
    return other_operand(*(operand for index, operand in enumerate(call.operands) if index != number))


def witness_of(call: Call, *arguments: Any) -> Witness:
    """Return the witness of those of a call's arguments that are dynamic."""
    return other_operand(*(argument for argument in arguments if call.is_dynamic(argument)))


def fewer_elements(call: Call, why: str) -> Verdict:
    """Return the verdict of counting: K with the missing elements, and no amount where none are missing."""
    missing = call.erased()
    return erases(why, elements=missing) if missing is not None and missing > 0 else erases(why)
