"""The registry of typing rules: what each torch-level operator preserves or erases.

A rule names its targets in a decorator and is a function of a few lines from a `Call` to a `Verdict`:

    @labels(nn.GELU, F.gelu)
    def gelu(call: Call) -> Verdict:
        return erases("each output has two inputs", bits=call.elements())

The registry is filled while the family files are imported, and never after.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from bwsk_fx.rules import sizes
from bwsk_fx.rules.targets import Registry, method, rule_name
from bwsk_fx.verdict import NOTHING, OPERATOR, UNKNOWN, Erasure, Label, Verdict, Witness, WitnessKind


@dataclass(frozen=True)
class Call:
    """What a rule sees of one node.

    Attributes:
        node: The node; its values are fake tensors.
        module: The leaf module of a `call_module` node, else None.
        dynamic: All nodes of the graph whose values are dynamic.
    """

    node: fx.Node
    module: Any
    dynamic: Collection[fx.Node]

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

    def argument(self, index: int, name: str, default: Any = None) -> Any:
        """Return a function's argument, given by position or by name."""
        args = self.node.args
        return args[index] if index < len(args) else self.node.kwargs.get(name, default)

    def option(self, index: int, name: str, default: Any = None) -> Any:
        """Return a module's attribute, or a function's argument."""
        return self.argument(index, name, default) if self.module is None else getattr(self.module, name, default)

    def is_dynamic(self, operand: Any) -> bool:
        """Whether an argument is a dynamic node."""
        return isinstance(operand, fx.Node) and operand in self.dynamic

    def elements(self) -> int | None:
        """Return the elements per sample of the first dynamic operand."""
        return sizes.elements(self.before)

    def erased(self) -> int | None:
        """Return how many elements per sample the result has less than the first dynamic operand."""
        return sizes.erased(self.before, self.value)


TypingRule = Callable[[Call], Verdict]
_RULES: Registry[TypingRule] = Registry("typing rule")
labels = _RULES.register


def registered_rules() -> Mapping[Any, TypingRule]:
    """Return the registry, target to rule, for reports and tests."""
    return dict(_RULES)


def judge(call: Call) -> Verdict:
    """Apply the rule of a node; without a rule the verdict is GRAY at confidence 0.3."""
    rule = rule_of(call)
    if rule is None:
        name = target_name(call)
        return Verdict(Label.GRAY, None, None, UNKNOWN, f"unknown: no rule for {name}", "unknown")
    name = rule_name(rule)
    verdict = rule(call)
    return replace(verdict, rule=name, rationale=f"{name}: {verdict.rationale}")


def rule_of(call: Call) -> TypingRule | None:
    """Return the rule of a node, or None."""
    return _RULES.of(call.node.target if call.module is None else call.module)


def target_name(call: Call) -> str:
    """Return what people call the operator of a node."""
    if call.module is not None:
        return type(call.module).__qualname__
    target = call.node.target
    return method(target) if isinstance(target, str) else getattr(target, "__name__", str(target))


def preserves(why: str, witness: Witness = NOTHING, confidence: float = OPERATOR) -> Verdict:
    """Return an S verdict."""
    return Verdict(Label.S, witness, None, confidence, why, "")


def erases(why: str, elements: float | None = None, bits: float | None = None, confidence: float = OPERATOR) -> Verdict:
    """Return a K verdict; the amounts are per sample, and None where the rule does not know them."""
    known = elements is not None or bits is not None
    return Verdict(Label.K, None, Erasure(elements, bits) if known else None, confidence, why, "")


def unproven(why: str) -> Verdict:
    """Return a GRAY verdict."""
    return Verdict(Label.GRAY, None, None, UNKNOWN, why, "")


def by_products(*names: str, elements: int | None = None, itemsize: int = 4) -> Witness:
    """Return a witness of values that the operator yields anyway."""
    size = None if elements is None else elements * itemsize
    return Witness(WitnessKind.BY_PRODUCTS, names, elements, size)


def other_operand(*operands: fx.Node) -> Witness:
    """Return a witness of other operands of the same node."""
    values = [operand.meta["val"] for operand in operands]
    counts = [sizes.elements(value) for value in values]
    names = tuple(operand.name for operand in operands)
    if None in counts:
        return Witness(WitnessKind.OTHER_OPERAND, names)
    known = [count for count in counts if count is not None]
    size = sum(count * value.itemsize for count, value in zip(known, values, strict=True))
    return Witness(WitnessKind.OTHER_OPERAND, names, sum(known), size)


def fewer_elements(call: Call, why: str) -> Verdict:
    """Return the verdict of counting: K with the missing elements, and no amount where none are missing."""
    missing = call.erased()
    return erases(why, elements=missing) if missing is not None and missing > 0 else erases(why)
