"""Hooks run as often as in eager execution, or are refused; none is dropped, and none sees a run that is no step."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

import bwsk_fx
from bwsk_fx.errors import CaptureError
from bwsk_fx.modes import applied


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down, self.norm = nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.down(self.act(self.up(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.head = nn.Sequential(Block(), Block()), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x))


X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
CHANGES = {
    "forward": lambda m, log: m.register_forward_hook(lambda _, args, out: log.append(out.sum().item())),
    "forward that changes": lambda m, log: m.register_forward_hook(lambda _, args, out: log.append(0) or 2 * out),
    "pre": lambda m, log: m.register_forward_pre_hook(lambda _, args, kwargs: log.append(len(args)), with_kwargs=True),
    "backward": lambda m, log: m.register_full_backward_hook(lambda _, gi, go: log.append(go[0].sum().item())),
    "backward pre": lambda m, log: m.register_full_backward_pre_hook(lambda _, go: log.append(go[0].sum().item())),
}


def _log(mode: str, before: bool, hook: Callable[[nn.Module, list], Any], path: str) -> tuple[list, dict]:
    model, log = Net(), []
    if before:
        hook(model.get_submodule(path), log)
    bwsk_fx.apply(model, mode, **({"faith": "exact", "budget": 0.1} if mode == "reversible" else {}))
    model(X).sin().sum().backward()
    if not before:
        hook(model.get_submodule(path), log)
    for _ in range(2):
        model.zero_grad()
        model(X).sin().sum().backward()
    return log, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("path", ["blocks.1.act", ""])
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_hooks_on_leaves_and_on_the_model_run_once_a_step(kind, before, path):
    found, gradients = _log("reversible", before, CHANGES[kind], path)
    expected, eager = _log("conventional", before, CHANGES[kind], path)
    assert found == expected and len(found) >= 2
    assert all(torch.equal(gradients[name], eager[name]) for name in eager)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("kind", CHANGES)
def test_hooks_on_modules_whose_code_is_recorded_are_refused(kind, before):
    with pytest.raises(CaptureError, match=r"module 'blocks.1' \(Block\) carries the hook .*test_hooks.*remove it"):
        _log("reversible", before, CHANGES[kind], "blocks.1")


def test_a_graph_refuses_hooks_that_come_after_its_capture():
    model = Net()
    graph = bwsk_fx.fuse_regions(bwsk_fx.capture(model, X))
    handle = model.blocks[0].register_forward_hook(lambda *_: None)
    with pytest.raises(CaptureError, match=r"module 'blocks.0' \(Block\) carries the hook"):
        graph(X)
    handle.remove()
    graph(X).sum().backward()


def test_hooks_on_all_modules_are_refused():
    model = bwsk_fx.apply(Net())
    model(X)
    handle = register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(CaptureError, match="a hook on all modules of this process is registered"):
            model(X)
    finally:
        handle.remove()
    model(X).sum().backward()


def test_parameter_hooks_see_the_gradients_of_eager_once():
    def hook(model: nn.Module, log: list) -> None:
        for name, parameter in model.named_parameters():
            parameter.register_hook(
                lambda gradient, name=name: log.append((name, gradient.sum().item())) or 2 * gradient
            )
            parameter.register_post_accumulate_grad_hook(lambda p, name=name: log.append((name, p.grad.sum().item())))

    found, gradients = _log("reversible", True, hook, "")
    expected, eager = _log("conventional", True, hook, "")
    # Those of a region's parameters arrive together.
    assert sorted(found) == sorted(expected)
    assert all(torch.equal(gradients[name], eager[name]) for name in eager)


@pytest.mark.parametrize("name", ["register_hook", "retain_grad"])
def test_hooks_on_activations_are_refused_where_the_code_is_recorded(name):
    class Hooked(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = self.blocks(x)
            getattr(y, name)(*([lambda gradient: None] if name == "register_hook" else []))
            return self.head(y)

    with pytest.raises(CaptureError, match=rf"(?s)test_hooks.*{name} is called on a tensor outside a leaf module"):
        bwsk_fx.apply(Hooked())(X)


class Watching(nn.Module):
    """A leaf that hooks its input, counts its calls and replaces a buffer."""

    def __init__(self, log: list) -> None:
        super().__init__()
        self.calls, self.log = 0, log
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        x.register_hook(lambda gradient: self.log.append(gradient.sum().item()))
        self.calls += 1
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean()
        return x * (1 + self.mean)


def test_a_leaf_that_hooks_tensors_and_changes_itself_runs_once_a_step():
    runs = []
    for mode in ("conventional", "reversible"):
        log: list = []
        model = Net()
        model.blocks.insert(1, Watching(log))
        bwsk_fx.apply(model, mode, **({"faith": "exact", "budget": 0.1} if mode == "reversible" else {}))
        for _ in range(2):
            model(X).sin().sum().backward()
        runs.append((log, model.blocks[1].calls, model.blocks[1].mean.item(), model.head.weight.grad.sum().item()))
    assert runs[0] == runs[1] and runs[0][1] == 2 and len(runs[0][0]) == 2
    assert "stays_outside" in next(n for n in applied(model).graph.graph.nodes if n.target == "blocks.1").meta


def test_hooks_that_transformers_installs_for_hidden_states_come_once(make_vit, make_images):
    model, twin = bwsk_fx.apply(make_vit(), faith="exact"), make_vit()
    for _ in range(2):
        found = model(**make_images(), output_hidden_states=True).hidden_states
        expected = twin(**make_images(), output_hidden_states=True).hidden_states
        assert len(found) == len(expected) == 3
        assert all(map(torch.equal, found, expected))
    bwsk_fx.restore(model)
    assert len(model(**make_images(), output_hidden_states=True).hidden_states) == 3
    # The hooks are there now, and do nothing.
    bwsk_fx.apply(model, faith="exact")
    assert torch.equal(model(**make_images()).loss, twin(**make_images()).loss)
