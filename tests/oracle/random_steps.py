"""Steps of random modules: what they are, how they are interpreted, and the kinds that hold other steps.

What works on tensors of sizes (batch, tokens, width) is a `Step`; most keep these sizes, some change the width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import strategies as st
from torch import Tensor, nn


class Step:
    """One step: its kind, what it does to its inner steps if it has any, and numbers or names that say more."""

    def __init__(self, kind: str, body: tuple[Step, ...], options: dict[str, Any]) -> None:
        self.kind, self.body, self.options = kind, body, options

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["options"][name]
        except KeyError:
            raise AttributeError(name) from None

    def __repr__(self) -> str:
        parts = [repr(self.kind), *map(repr, self.body), *(f"{key}={value!r}" for key, value in self.options.items())]
        return f"step({', '.join(parts)})"

    def kinds(self) -> Iterator[str]:
        """Yield its kind and those of its inner steps."""
        yield self.kind
        for inner in self.body:
            yield from inner.kinds()


def step(kind: str, *body: Step, **options: Any) -> Step:
    return Step(kind, body, options)


class Parts(nn.Module):
    """What one step owns; `chain` makes its inner steps."""


Draw = Callable[[st.SearchStrategy], Any]


class Kind:
    """A kind of step, as static methods; a subclass registers itself under its name."""

    nests = False

    def __init_subclass__(cls, name: str) -> None:
        KINDS[name] = cls

    @staticmethod
    def options(draw: Draw, width: int) -> dict[str, Any]:
        return {}

    @staticmethod
    def build(own: Parts, step: Step, width: int, tokens: int) -> None: ...

    @staticmethod
    def run(own: Parts, step: Step, x: Tensor, y: Tensor) -> Tensor:
        raise NotImplementedError


KINDS: dict[str, type[Kind]] = {}


class Chain(nn.Module):
    """Interprets steps. Its children are named, not numbered: only those of `blocks` are blocks."""

    def __init__(self, steps: tuple[Step, ...], width: int, tokens: int, extra: int) -> None:
        super().__init__()
        self.steps, self.parts = steps, nn.ModuleDict()
        self.widths = [width]
        for place, each in enumerate(steps):
            own = Parts()
            own.extra = extra
            KINDS[each.kind].build(own, each, self.widths[-1], tokens)
            self.parts[f"{each.kind}_{place}"] = own
            self.widths.append(each.options.get("out", self.widths[-1]))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.results(x, y)[-1]

    def results(self, x: Tensor, y: Tensor) -> list[Tensor]:
        found = [x]
        for each, own in zip(self.steps, self.parts.values(), strict=True):
            found.append(KINDS[each.kind].run(own, each, found[-1], y))
        return found


def _chain(own: Parts, step: Step, width: int, tokens: int) -> Chain:
    return Chain(step.body, width, tokens, own.extra)


class _Twice(Kind, name="twice"):
    """The same modules one after the other, twice."""

    nests = True

    @staticmethod
    def build(own, step, width, tokens):
        own.body = _chain(own, step, width, tokens)

    @staticmethod
    def run(own, step, x, y):
        return own.body(own.body(x, y), y)


class _Residual(Kind, name="residual"):
    nests = True

    @staticmethod
    def options(draw, width):
        return {"minus": draw(st.booleans())}

    @staticmethod
    def build(own, step, width, tokens):
        own.body = _chain(own, step, width, tokens)

    @staticmethod
    def run(own, step, x, y):
        return x - own.body(x, y) if step.minus else x + own.body(x, y)


class _Blocks(Kind, name="blocks"):
    """Equal chains with weights of their own, in a `ModuleList`."""

    nests = True

    @staticmethod
    def options(draw, width):
        return {"count": draw(st.integers(2, 3))}

    @staticmethod
    def build(own, step, width, tokens):
        own.blocks = nn.ModuleList([_chain(own, step, width, tokens) for _ in range(step.count)])

    @staticmethod
    def run(own, step, x, y):
        for block in own.blocks:
            x = block(x, y)
        return x
