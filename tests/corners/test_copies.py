"""A model in a mode is copied, pickled and transformed, or says why not."""

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

import bwsk_fx
from bwsk_fx.errors import RegionError
from bwsk_fx.modes import applied


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.head = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(nn.functional.gelu(self.a(x))))


X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> Net:
    model = bwsk_fx.apply(Net(), budget=0.1, faith="exact")
    model(X).sum().backward()
    model.zero_grad()
    return model


def _saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), _saved])
def test_a_copy_is_in_the_mode_and_captures_itself(model, copied):
    twin = copied(model)
    assert type(twin) is type(model) and applied(twin).plan == applied(model).plan and applied(twin).graph is None
    twin(X).sum().backward()
    model(X).sum().backward()
    assert applied(twin).graph is not None
    assert all(
        torch.equal(p.grad, q.grad) and p is not q for p, q in zip(twin.parameters(), model.parameters(), strict=True)
    )
    assert type(bwsk_fx.restore(twin)) is Net


def test_second_derivatives_and_transforms_are_refused(model):
    with pytest.raises(RegionError, match="no second derivative"):
        torch.autograd.grad(model(X).sum(), list(model.parameters()), create_graph=True)
    with pytest.raises(RegionError, match=r"inside a torch.func transform"):
        torch.func.vmap(lambda row: model(row[None]))(X)


def test_functional_call_reads_the_weights_that_it_is_given(model):
    given = {name: (2 * value).detach().requires_grad_() for name, value in model.named_parameters()}
    found = torch.func.functional_call(model, given, (X,))
    found.sum().backward()
    assert torch.equal(found, torch.func.functional_call(Net(), given, (X,)))
    assert all(value.grad is not None for value in given.values())


def test_inference_mode_runs_the_model_itself(model):
    with torch.inference_mode():
        assert torch.equal(model(X), Net()(X))
