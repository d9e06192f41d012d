"""Checkpointing that is on already: said aloud, and nothing is recomputed twice; masks are eager's."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import bwsk_fx
from bwsk_fx.errors import CaptureError
from bwsk_fx.modes import apply

PLANS = [("exact", float("inf"))]
WARNED = r"uses torch.utils.checkpoint or other hooks on saved tensors, which the captured(.|\n)*checkpoint\("


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Dropout(0.5)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + checkpoint(layer, x, use_reentrant=self.reentrant)
        return x


def test_a_checkpoint_gives_way_to_the_plan_with_a_warning(x, assert_as_eager):
    with pytest.warns(UserWarning, match=WARNED):
        assert_as_eager(lambda: Checkpointed(False), x, plans=PLANS)


def test_a_reentrant_checkpoint_is_refused(x):
    with pytest.raises(
        CaptureError, match=r"x = x \+ checkpoint(.|\n)*use_reentrant=True is called(.|\n)*switch checkpointing off"
    ):
        apply(Checkpointed(True))(x)


class Hidden(nn.Module):
    """A checkpoint inside a leaf draws its mask anew in the backward pass, from the same random state."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant, self.weight = reentrant, nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.run, x, use_reentrant=self.reentrant)

    def run(self, x: Tensor) -> Tensor:
        return functional.dropout(x * self.weight, 0.5, self.training).sin()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_inside_a_leaf_runs_outside_of_regions(x, assert_as_eager, sandwich, reentrant):
    assert_as_eager(lambda: sandwich(Hidden(reentrant)), x, plans=PLANS)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_of_transformers(make_vit, make_images, reentrant):
    model = make_vit(num_hidden_layers=1, hidden_dropout_prob=0.2)
    model._set_gradient_checkpointing(
        True, lambda function, *args: checkpoint(function, *args, use_reentrant=reentrant)
    )
    if reentrant:
        with pytest.raises(CaptureError, match=r"use_reentrant=True is called.*gradient_checkpointing_disable\(\)"):
            bwsk_fx.capture(model, make_images())
    else:
        with pytest.warns(UserWarning, match=r"ViTForImageClassification uses.*gradient_checkpointing_disable\(\)"):
            bwsk_fx.capture(model, make_images())
