"""What operators do, one family a file; and what rules of your own are written with.

A rule of your own:

    import bwsk_fx
    from bwsk_fx.rules import Call, Example, Run, Undo, preserves

    def divide(run: Run):
        return run.output / run.module.factor

    @bwsk_fx.rule(Scale, examples=[Example(Scale(4), (torch.randn(2, 4),))])
    def scale(call: Call):
        return preserves("dividing by the factor undoes it", undo=Undo(divide))
"""

from bwsk_fx.rules.registry import Call, by_products, erases, other_operand, preserves, unproven
from bwsk_fx.rules.undo import Run, Undo
from bwsk_fx.rules.user import Example, Matching, rule

__all__ = [
    "Call",
    "Example",
    "Matching",
    "Run",
    "Undo",
    "by_products",
    "erases",
    "other_operand",
    "preserves",
    "rule",
    "unproven",
]
