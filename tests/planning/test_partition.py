"""The code of a plan's two halves, and that running them gives eager's bits."""

from textwrap import dedent

import pytest
import torch

from bwsk_fx.planning.options import PlanOptions
from bwsk_fx.planning.prospect import build_program

NAMES = ["mlp", "residual", "attention", "dropout", "chain", "views"]


def _text(module: torch.fx.GraphModule) -> str:
    return dedent(module.code).strip() + "\n"


def test_forward_and_backward_of_an_mlp(plan, functions):
    program = plan(functions.mlp)
    assert _text(program.forward) == dedent(
        """\
        def forward(self, primals_1, primals_2, primals_3):
            mm = torch.ops.aten.mm.default(primals_1, primals_2);  primals_2 = None
            gelu = torch.ops.aten.gelu.default(mm)
            mm_1 = torch.ops.aten.mm.default(gelu, primals_3);  gelu = primals_3 = None
            return ((mm_1,), (primals_1, mm))
        """
    )
    assert _text(program.backward) == dedent(
        """\
        def forward(self, residuals):
            primals_1 = residuals.pop(0)
            mm = residuals.pop(0)
            primals_2 = residuals.pop(0)
            primals_3 = residuals.pop(0)
            tangents_1 = residuals.pop(0);  residuals = None
            gelu = torch.ops.aten.gelu.default(mm)
            t = torch.ops.aten.t.default(gelu);  gelu = None
            mm_2 = torch.ops.aten.mm.default(t, tangents_1);  t = None
            t_1 = torch.ops.aten.t.default(primals_3);  primals_3 = None
            mm_3 = torch.ops.aten.mm.default(tangents_1, t_1);  tangents_1 = t_1 = None
            gelu_backward = torch.ops.aten.gelu_backward.default(mm_3, mm);  mm_3 = mm = None
            t_2 = torch.ops.aten.t.default(primals_1);  primals_1 = None
            mm_4 = torch.ops.aten.mm.default(t_2, gelu_backward);  t_2 = None
            t_3 = torch.ops.aten.t.default(primals_2);  primals_2 = None
            mm_5 = torch.ops.aten.mm.default(gelu_backward, t_3);  gelu_backward = t_3 = None
            return (mm_5, mm_4, mm_2)
        """
    )


def test_layer_norm_keeps_x_hat_under_autocast(plan, functions):
    program = plan(functions.residual, 0.0, "rounded", torch.bfloat16)
    assert _text(program.forward) == dedent(
        """\
        def forward(self, primals_1, primals_2, primals_3, primals_4):
            native_layer_norm = torch.ops.aten.native_layer_norm.default(primals_1, [8], primals_2, primals_3, 1e-05);  primals_2 = primals_3 = None
            native_layer_norm_default = torch.ops.aten.native_layer_norm.default(primals_1, [8], None, None, 1e-05)
            getitem_6 = native_layer_norm_default[0];  native_layer_norm_default = None
            _to_copy_default = torch.ops.aten._to_copy.default(getitem_6, dtype = torch.bfloat16);  getitem_6 = None
            getitem = native_layer_norm[0]
            getitem_1 = native_layer_norm[1]
            getitem_2 = native_layer_norm[2];  native_layer_norm = None
            _to_copy = torch.ops.aten._to_copy.default(primals_4, dtype = torch.bfloat16);  primals_4 = None
            _to_copy_1 = torch.ops.aten._to_copy.default(getitem, dtype = torch.bfloat16);  getitem = None
            mm = torch.ops.aten.mm.default(_to_copy_1, _to_copy);  _to_copy_1 = _to_copy = None
            add = torch.ops.aten.add.Tensor(primals_1, mm);  primals_1 = mm = None
            return ((add,), (_to_copy_default, getitem_1, getitem_2))
        """  # noqa: E501
    )
    backward = _text(program.backward)
    assert "denormalise(_to_copy_default, getitem_1, getitem_2, torch.float32)" in backward
    assert "native_layer_norm.default(denormalise, [8], primals_2, primals_3, 1e-05)" in backward


def test_a_dropout_mask_travels_as_bits(plan, functions):
    program = plan(functions.dropout)
    assert "((sin,), (primals_1, pack_bits, cos))" in _text(program.forward)
    assert "unpack_bits(pack_bits, (4, 8), torch.float32)" in _text(program.backward)
    assert "bernoulli" not in _text(program.backward)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("budget", [0.0, 100.0])
def test_exact_plans_give_the_bits_of_eager_execution(plan, functions, inputs_of, name, dtype, budget):
    function = getattr(functions, name)
    program, tensors = plan(function, budget, "exact", dtype), [*inputs_of(function).values()]
    # Not a leaf: autocast's cache would hold one cast of a leaf and add its gradients in half precision.
    tensors[0] = tensors[0].clone()
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        (expected,) = function(*tensors)
    tangent = torch.randn_like(expected)
    expected_gradients = torch.autograd.grad(expected, tensors, tangent)
    torch.manual_seed(0)
    with torch.no_grad():
        (output,), kept = program.forward(*tensors)
        residuals = [*kept, *(tensors[index] for index in program.static), tangent.clone()]
        gradients = program.backward(residuals)
    assert residuals == []
    assert torch.equal(output, expected)
    assert all(map(torch.equal, gradients, expected_gradients))


def test_each_gradient_has_the_layout_of_eager_execution(plan, functions, inputs_of):
    tensors = [*inputs_of(functions.mlp).values()]
    program = plan(functions.mlp)
    with torch.no_grad():
        (output,), kept = program.forward(*tensors)
        found = program.backward([*kept, *tensors[1:], torch.ones_like(output)])
    expected = torch.autograd.grad(functions.mlp(*tensors)[0].sum(), tensors)
    assert [gradient.shape for gradient in found] == [gradient.shape for gradient in expected]


def _build(function, static=(), **inputs):
    return build_program(function, inputs, static, PlanOptions(0.0, "exact"), "small")


def test_outputs_are_tensors_of_their_own():
    program = _build(lambda x: [y := x.sin(), y, y.t()], x=torch.randn(3, 4, requires_grad=True))
    (one, two, three), _ = program.forward(torch.randn(3, 4))
    assert len({id(one), id(two), id(three)}) == 3
    assert one.data_ptr() == two.data_ptr() == three.data_ptr()


def test_a_frozen_input_gets_no_gradient():
    program = _build(lambda x, y: [x.sin() * y], x=torch.randn(3, 4, requires_grad=True), y=torch.randn(3, 4))
    _, kept = program.forward(torch.randn(3, 4), torch.randn(3, 4))
    gradient, none = program.backward([*kept, torch.ones(3, 4)])
    assert gradient.shape == (3, 4) and none is None


@pytest.mark.parametrize(
    ("part", "elements"),
    [
        (lambda y: y.chunk(2, dim=-1)[0].square(), 8),
        (lambda y: y[:, :2].square(), 8),
        (lambda y: y.t()[1:].square(), 12),
        (lambda y: y.chunk(2, dim=-1)[0] * y.chunk(2, dim=-1)[1], 16),
    ],
    ids=["one of a split", "slice", "slice of a view", "all of a split"],
)
def test_a_kept_part_does_not_hold_the_rest(part, elements):
    inputs = {name: torch.randn(4, 4, requires_grad=True) for name in "xw"}
    program = _build(lambda x, w: [part(x @ w)], static=[1], **inputs)
    _, kept = program.forward(*(tensor.detach() for tensor in inputs.values()))
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    assert sum(storages.values()) == program.plan.kept_bytes == (16 + elements) * 4


def test_backward_frees_each_value_after_its_last_use(plan, functions):
    code = _text(plan(functions.attention).backward)
    names = [line.split(" = ")[0].strip() for line in code.splitlines() if "residuals.pop" in line]
    assert len(names) == 10
    assert all(f"{name} = None" in code or f"{name} = " in code.split(";  ", 1)[1] for name in names)
