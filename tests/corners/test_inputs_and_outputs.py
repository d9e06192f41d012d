"""Inputs that come and go, sizes that change from step to step, complex numbers, outputs in any nesting."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import bwsk_fx
from bwsk_fx.errors import CaptureError


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(4), nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.Sequential(Block()), nn.Linear(4, 4)


def _normal(*sizes: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*sizes, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def _leaves(value: Any) -> list[Any]:
    value = list(value.items()) if hasattr(value, "items") else value
    return [leaf for item in value for leaf in _leaves(item)] if isinstance(value, (tuple, list)) else [value]


def _train(model: nn.Module, steps: Sequence[dict[str, Any]], picked: str | None = None) -> list[Any]:
    """Train with SGD, on one output or on all; return what is in the outputs, and all gradients."""
    optimizer, found = torch.optim.SGD(model.parameters(), lr=0.05), []
    for inputs in steps:
        optimizer.zero_grad()
        given = pytree.tree_map_only(Tensor, lambda x: x.clone().requires_grad_(), inputs)
        outputs = _leaves(model(**given))
        tensors = [leaf for leaf in outputs if isinstance(leaf, Tensor) and leaf.requires_grad]
        chosen = [outputs[outputs.index(picked) + 1]] if picked else tensors
        sum((x.real.sin() + x.imag.cos() if x.is_complex() else x.sin()).sum() for x in chosen).backward()
        found += [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in outputs]
        gradients = [x.grad for x in (*given.values(), *model.parameters()) if isinstance(x, Tensor)]
        found += [None if gradient is None else gradient.clone() for gradient in gradients]
        optimizer.step()
    return found


def _assert_as_eager(
    model: nn.Module, *steps: dict[str, Any], picked: str | None = None, exact: bool = True, faiths=("exact",)
) -> None:
    torch.manual_seed(0)
    expected = _train(copy.deepcopy(model), steps, picked)
    for faith in faiths:
        found = _train(bwsk_fx.apply(copy.deepcopy(model), faith=faith, budget=math.inf), steps, picked)
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert type(one) is type(other)
            if not isinstance(other, Tensor):
                assert one == other
            elif exact and faith == "exact":
                assert torch.equal(one, other)
            else:
                torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def _made(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().double()


# -- sizes ------------------------------------------------------------------------------------------------------------


class TwoSizes(Blocks):
    def forward(self, x: Tensor, y: Tensor) -> tuple[Any, ...]:
        return self.blocks(x) / x.shape[0], self.head(y) * y.shape[0], (x.shape[0], y.shape[0])


@pytest.mark.parametrize("sizes", [[(4, 1), (4, 3)], [(4, 3), (1, 4)], [(1, 1), (3, 1)]], ids=str)
def test_first_sizes_change_each_by_itself(sizes):
    steps = [{"x": _normal(n, 2, 4), "y": _normal(m, 2, 4, seed=1)} for n, m in sizes]
    _assert_as_eager(_made(TwoSizes), *steps)


class Squeezing(Blocks):
    def forward(self, x: Tensor) -> Tensor:
        y = self.blocks(x).squeeze()
        return 2 * y + self.head(x) if y.dim() == 3 else 3 * y


@pytest.mark.parametrize("batches", [(1, 3), (3, 1)])
def test_a_batch_of_one_that_is_squeezed_away(batches):
    # x has three uses in several regions, whose gradients are summed in another order.
    _assert_as_eager(_made(Squeezing), *({"x": _normal(batch, 2, 4)} for batch in batches), exact=False)


def test_graphs_refuse_sizes_for_which_the_code_would_do_something_else():
    several = bwsk_fx.capture(_made(Squeezing), _normal(3, 2, 4))
    with pytest.raises(CaptureError, match=r"requires Ne\(.*, 1\).*squeeze"):
        several(_normal(1, 2, 4))
    single = bwsk_fx.capture(_made(Squeezing), _normal(1, 2, 4))
    assert single(_normal(1, 2, 4)).shape == (2, 4)
    with pytest.raises(CaptureError, match="requires the first size of 'x' to be 1, where it is now 3"):
        single(_normal(3, 2, 4))


class OverTime(Blocks):
    """The first dimension is the time, over which a Python loop goes."""

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        for row in range(x.shape[0]):
            state = self.head(self.blocks(x)[row] + state).tanh()
        return state, x


def test_a_loop_over_the_first_dimension_is_captured_for_each_length():
    steps = [{"x": _normal(n, 2, 4), "state": _normal(2, 4)} for n in (1, 2, 3)]
    _assert_as_eager(_made(OverTime), *steps, exact=False)


# -- inputs -----------------------------------------------------------------------------------------------------------


class Optional(Blocks):
    def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: float = 1.0, kind: str = "a", **more) -> Tensor:
        x = self.blocks(x) * scale
        x = x if mask is None else x * mask
        for name in sorted(more):
            x = x + more[name] * len(name)
        return self.head(x.tanh() if kind == "b" else x)


def test_inputs_come_and_go_and_numbers_change():
    x, y = _normal(3, 2, 4), _normal(3, 2, 4, seed=1)
    steps = [{"x": y, "mask": x}, {"x": x, "mask": None, "scale": 2.0}, {"x": x, "scale": 3.0, "kind": "b"}]
    _assert_as_eager(_made(Optional), *steps, {"x": x, "three": y, "one": x})


# -- outputs ----------------------------------------------------------------------------------------------------------


def _nested() -> type[nn.Module]:
    from transformers.utils import ModelOutput

    @dataclass
    class Output(ModelOutput):
        absent: Tensor | None = None
        parts: Any = None
        objective: Tensor | None = None

    class Nested(Blocks):
        def forward(self, x: Tensor) -> Output:
            y = self.blocks(x)
            z = self.head(y).tanh()
            parts = ({"y": y, "none": None, "deep": [z[0], (z.mean(1), 3, "s")]}, None)
            return Output(parts=parts, objective=self.head(z).square().mean())

    return Nested


@pytest.mark.parametrize("picked", [None, "objective"])
def test_nested_outputs(picked):
    # All at once, y has three uses in several regions, whose gradients are summed in another order.
    _assert_as_eager(_made(_nested()), {"x": _normal(3, 2, 4)}, {"x": _normal(2, 2, 4)}, picked=picked, exact=False)


class Given(Blocks):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor, y: Tensor | None = None) -> tuple[Any, ...]:
        z = self.blocks(x)
        return x, z, z, self.scale, y, x.view(-1, 8), z[0], z.detach(), self.scale.exp()


def test_outputs_that_are_inputs_parameters_and_views():
    x = _normal(3, 2, 4)
    _assert_as_eager(_made(Given), {"x": x}, {"x": x, "y": _normal(3, 2, 4, seed=1)}, exact=False)


# -- complex numbers --------------------------------------------------------------------------------------------------


class Complex(Blocks):
    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(2, 4, dtype=torch.complex64))
        self.mix = nn.Parameter(torch.randn(4, 4, dtype=torch.complex64) / 4)

    def forward(self, x: Tensor) -> dict[str, Any]:
        z = torch.fft.fft(self.blocks(x), dim=-1, norm="ortho") * self.filter
        z = (z + (z.conj() @ self.mix).tanh()).conj()
        y = torch.fft.irfft(z, n=4, norm="ortho")
        parts = torch.view_as_real(z.resolve_conj()).flatten(-2)
        return {"y": self.head(y), "z": z, "adjoint": torch.complex(y, y.sin()).mH, "parts": (parts, z.imag)}


class TakesComplex(Blocks):
    def forward(self, z: Tensor) -> Tensor:
        return torch.view_as_complex(
            self.blocks(torch.view_as_real(z.resolve_conj()).flatten(-2)).unflatten(-1, (2, 2))
        )


def _made_complex() -> nn.Module:
    torch.manual_seed(0)
    model = Complex()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.complex128 if parameter.is_complex() else torch.float64)
    return model


def test_complex_numbers_inside_and_out():
    _assert_as_eager(
        _made_complex(), {"x": _normal(3, 2, 4)}, {"x": _normal(2, 2, 4)}, exact=False, faiths=("exact", "rounded")
    )


def test_complex_inputs_conjugated_or_not():
    z = _normal(3, 2, 2, dtype=torch.complex128)
    _assert_as_eager(_made(TakesComplex), {"z": z}, {"z": z.conj()})
