"""Each peer computes eager's loss and keeps, per block, the tensors that its description names."""

import copy
from collections import Counter
from dataclasses import replace

import peers
import pytest
import torch
from memory_sharing import share_memory
from pareto import backward, gradients, loss_of
from peers import Variant, compiled, variants
from torch.utils._python_dispatch import TorchDispatchMode

from bwsk_fx.measure import saved_for_backward

VARIANTS = {variant.name: variant for variant in variants([0.0], fuse=False)}
RUNNING = [name for name, variant in VARIANTS.items() if not variant.is_compiled]
HALF, FLOAT = 2, 4


def test_the_variants_and_their_methods():
    assert list(VARIANTS) == [
        "eager",
        "bwsk-fx, 0",
        "bwsk-fx without inverses, 0",
        "bwsk-fx by Inductor, 0",
        "bwsk-fx backend, 0",
        "checkpoint per block",
        "selective checkpoint",
        "torch.compile, 1",
        "torch.compile, 0.5",
        "torch.compile, 0.25",
        "torch.compile, 0",
        "memory sharing, MS-LN",
        "memory sharing, MS-LN + ReGELU2",
    ]
    assert peers.methods() == tuple(dict.fromkeys(variant.method for variant in VARIANTS.values()))


@pytest.mark.parametrize("name", RUNNING)
def test_the_loss_is_eagers(shape, name):
    base, inputs = shape.model("cpu"), shape.inputs("cpu")
    expected, found = (loss_of(model, inputs, None) for model in (base, VARIANTS[name].applied_to(base)))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("name", ["checkpoint per block", "selective checkpoint"])
def test_checkpoints_have_eagers_gradients(shape, name):
    base, inputs = shape.model("cpu"), shape.inputs("cpu")
    expected = gradients(base, inputs, shape.dtype)
    found = gradients(VARIANTS[name].applied_to(base), inputs, shape.dtype)
    assert expected.keys() == found.keys()
    assert all(torch.equal(gradient, expected[key]) for key, gradient in found.items())


def _kept_by_a_block(variant: Variant, shape) -> int:
    """Bytes of the second of two blocks."""
    sizes = []
    for layers in (1, 2):
        deep = replace(shape, layers=layers)
        model = variant.applied_to(deep.model("cpu"))
        sizes.append(variant.saved_bytes(model, deep.inputs("cpu"), shape.dtype))
    return sizes[1] - sizes[0]


@pytest.mark.parametrize(
    ("name", "units", "row_figures", "logsumexp", "copies"),
    [
        # x 2, its casts for q, k and v 3, q, k, v 3, attention out 1; x 2, its cast 1, fc1 out 4, GELU out 4.
        ("eager", 20, 4, True, True),
        # The block's input in fp32.
        ("checkpoint per block", 2, 0, False, False),
        # The same, q, k, v 3, attention out 1, output projection 1, fc1 out 4, fc2 out 1.
        ("selective checkpoint", 12, 0, True, False),
        # x̂ 1, q, k, v 3, attention out 1, x̂ 1, fc1 out 4, GELU out 4.
        ("memory sharing, MS-LN", 14, 2, True, True),
        # 2 bits instead of 16 for fc1 out.
        ("memory sharing, MS-LN + ReGELU2", 10.5, 2, True, True),
    ],
)
def test_bytes_that_a_block_keeps(shape, name, units, row_figures, logsumexp, copies):
    rows = shape.batch * 5  # four patches and the class token
    heads = shape.hidden // 64
    expected = units * rows * shape.hidden * HALF
    expected += row_figures * rows * FLOAT  # mean and 1/σ per norm, or 1/σ alone
    expected += logsumexp * rows * heads * FLOAT
    expected += copies * 12 * shape.hidden**2 * HALF  # autocast's copies of the weights
    assert _kept_by_a_block(VARIANTS[name], shape) == expected


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def _forward_operators_in_backward(variant: Variant, shape) -> tuple[int, int]:
    model, inputs = variant.applied_to(shape.model("cpu")), shape.inputs("cpu")
    loss = loss_of(model, inputs, shape.dtype)
    with _Counter() as counter:
        loss.backward()
    attention = sum(count for name, count in counter.calls.items() if name in peers._ATTENTION)
    return counter.calls["addmm"], attention


@pytest.mark.parametrize(
    ("name", "linears", "attentions"),
    [("eager", 0, 0), ("selective checkpoint", 0, 0), ("checkpoint per block", 5, 1)],
)
def test_what_runs_again(shape, name, linears, attentions):
    # A checkpoint stops before fc2, whose output nothing needs.
    assert _forward_operators_in_backward(VARIANTS[name], shape) == (linears, attentions)


def test_budgets_of_torch_compile_take_effect_side_by_side(shape):
    # With few tokens the copies of weights are all that is kept.
    larger = replace(shape, image=128, batch=4)
    base, inputs = larger.model("cpu"), larger.inputs("cpu")
    # The partitioner without Inductor, which takes long.
    models = [compiled(copy.deepcopy(base), budget, backend="aot_eager_decomp_partition") for budget in (1.0, 0.3, 0.0)]
    expected = loss_of(base, inputs, shape.dtype).item()
    assert [loss_of(model, inputs, shape.dtype).item() for model in models] == pytest.approx([expected] * 3, rel=1e-2)
    eager, most, less, least = (saved_for_backward(model, inputs, shape.dtype) for model in (base, *models))
    assert eager > most > less
    assert least == sum(tensor.nbytes for tensor in inputs.values())
    assert gradients(models[0], inputs, shape.dtype).keys() == gradients(base, inputs, shape.dtype).keys()


def test_inductor_that_cannot_compile_is_named(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: fail)
    assert peers.inductor_problem("cpu") == "Inductor cannot compile for cpu: no compiler"


def test_memory_sharing_leaves_no_layernorm(shape):
    shared = share_memory(shape.model("cpu"), approximate=True)
    backward(shared, shape.inputs("cpu"), shape.dtype)
    kinds = Counter(type(module).__name__ for module in shared.modules())
    assert (kinds["LayerNorm"], kinds["MemorySharingLayerNorm"], kinds["ReGELU2"]) == (0, 3, 1)
