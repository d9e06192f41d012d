"""Verdicts: what an operator preserves, what it erases, and how sure a rule is of that."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from bwsk_fx.errors import RuleError

if TYPE_CHECKING:
    from bwsk_fx.rules.undo import Undo

OVERRIDE, REFINED, OPERATOR, UNKNOWN = 1.0, 0.8, 0.5, 0.3
CONFIDENCES = (OVERRIDE, REFINED, OPERATOR, UNKNOWN)


class Label(StrEnum):
    """S: an inverse rebuilds the operand. K: information is erased. GRAY: no rule proves either."""

    S = "S"
    K = "K"
    GRAY = "GRAY"


class WitnessKind(StrEnum):
    """What an inverse needs besides the output; `UNSTATED` is for tables that name no inverse."""

    NOTHING = "nothing"
    BY_PRODUCTS = "by-products"
    OTHER_OPERAND = "other operand"
    UNSTATED = "unstated"


@dataclass(frozen=True)
class Witness:
    """What rebuilds an operand together with the node's output.

    Attributes:
        kind: Nothing, by-products that the operator yields anyway, or the node's other operand.
        names: Names of the by-products (`"mean"`, `"rstd"`) or of the operand nodes.
        elements: Elements per sample, where known.
        bytes: Bytes per sample, where known.
    """

    kind: WitnessKind
    names: tuple[str, ...] = ()
    elements: int | None = None
    bytes: int | None = None

    def __post_init__(self) -> None:
        named = self.kind in (WitnessKind.BY_PRODUCTS, WitnessKind.OTHER_OPERAND)
        if named != bool(self.names):
            raise RuleError(f"a witness of kind '{self.kind}' {'needs' if named else 'cannot have'} names: {self}")


NOTHING = Witness(WitnessKind.NOTHING)


@dataclass(frozen=True)
class Erasure:
    """How much is erased, per sample of the batch: of one operand when the others are known, or of all together.

    Attributes:
        elements: Elements that leave no trace: outputs vary in at most that many dimensions less than the operands.
            Half an element is one part of a complex number.
        bits: Bits of elements that survive otherwise.
        expected: Whether it is an expectation, over random draws (dropout) or over operands of which half are
            negative (ReLU), and not what every call erases.
    """

    elements: float | None = None
    bits: float | None = None
    expected: bool = False

    def __post_init__(self) -> None:
        known = [amount for amount in (self.elements, self.bits) if amount is not None]
        if not known or min(known) < 0:
            raise RuleError(f"an erasure is a number of elements or bits, at least 0; got {self}")


@dataclass(frozen=True)
class Verdict:
    """A label with its reasons, as `node.meta["bwsk"]` carries it.

    Attributes:
        label: S, K or GRAY, relative to the node's dynamic operands.
        witness: What the inverse of an S node needs; None for K and GRAY.
        erasure: What a K node erases, where its rule knows; None for S and GRAY.
        confidence: 1.0 user override or certified by running, 0.8 refined by attributes or shapes, 0.5 operator
            rule, 0.3 unknown.
        rationale: One sentence that names the rule.
        rule: The rule's name.
        counted: Whether summaries count the node; see the ruleset for which nodes it counts.
        ruleset: The ruleset that gave the verdict.
        domain: The condition under which the inverse of an S node holds (`"x > 0"`); None where it always does.
        undo: The inverse of an S node as code, for `certify`.
    """

    label: Label
    witness: Witness | None
    erasure: Erasure | None
    confidence: float
    rationale: str
    rule: str
    counted: bool = True
    ruleset: str = "sound"
    domain: str | None = None
    undo: Undo | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        complaint = self._complaint()
        if complaint:
            raise RuleError(f"rule '{self.rule}' gave an invalid verdict: {complaint}")

    def _complaint(self) -> str | None:
        if not isinstance(self.label, Label):
            return f"label {self.label!r} is none of {', '.join(Label)}"
        if (self.label is Label.S) != (self.witness is not None):
            return f"label {self.label} with witness {self.witness}; S, and only S, has a witness"
        if self.erasure is not None and self.label is not Label.K:
            return f"label {self.label} with an erasure; only K erases"
        if self.confidence not in CONFIDENCES:
            return f"confidence {self.confidence} is none of {', '.join(map(str, CONFIDENCES))}"
        return None if self.rationale else "it has no rationale"

    def to_json(self) -> dict[str, Any]:
        """Return the verdict as JSON-ready dictionaries, without what is absent."""
        values = asdict(replace(self, undo=None))
        if self.erasure is not None and not self.erasure.expected:
            del values["erasure"]["expected"]
        return _without_none(values)


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return list(value) if isinstance(value, tuple) else str(value) if isinstance(value, StrEnum) else value
