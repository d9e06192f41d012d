"""Stages of one process, run one after the other."""

import pytest
import torch
from torch import nn

import bwsk_fx
from bwsk_fx.errors import CaptureError, PlanError
from bwsk_fx.parallel import pipeline_stages


def _run(stages, inputs, graphs=None):
    values = ()
    for index, stage in enumerate(stages):
        assert all(value.is_contiguous() for value in values), "processes cannot send it"
        graph = graphs[index] if graphs else stage.graph
        values = graph(*values, **stages.inputs_of(index, inputs))
    return values


def _gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9])
def test_stages_in_a_row_are_the_model(make_vit, make_images, assert_same_bits, count):
    model, inputs = make_vit(), make_images()
    stages = pipeline_stages(model, count, inputs)
    wanted = _gradients(model, model(**inputs).loss)
    found = _gradients(model, _run(stages, inputs))
    assert_same_bits(found, wanted)


def test_what_processes_send_each_other_is_contiguous(make_vit, make_images):
    inputs = make_images()
    first, second = pipeline_stages(make_vit(), 9, inputs)[:2]
    sent = [value.detach().requires_grad_() for value in first.graph(inputs["pixel_values"])]
    assert len(sent) > 1, "a cut inside attention was meant"
    received = second.graph(*sent)
    gradients = torch.autograd.grad([value.sin().sum() for value in received], sent)
    assert all(value.is_contiguous() for value in (*received, *gradients))


def test_every_parameter_is_in_one_stage_under_its_name(make_vit, make_images):
    model = make_vit()
    stages = pipeline_stages(model, 3, make_images())
    names = [name for stage in stages for name, _ in stage.graph.named_parameters()]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    parameters = dict(model.named_parameters())
    assert all(one is parameters[name] for stage in stages for name, one in stage.graph.named_parameters())


def test_fused_stages_train_alike(make_vit, make_images):
    model, inputs = make_vit().double(), make_images()
    inputs["pixel_values"] = inputs["pixel_values"].double()
    stages = pipeline_stages(model, 2, inputs)
    graphs = [bwsk_fx.fuse_regions(stage.graph, tier="smallest") for stage in stages]
    wanted = _gradients(model, model(**inputs).loss)
    found = _gradients(model, _run(stages, inputs, graphs))
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-12)


def test_cuts_lie_where_one_value_crosses(make_vit, make_images):
    stages = pipeline_stages(make_vit(num_hidden_layers=4), 2, make_images())
    # One token x hidden tensor in float32: 17 tokens, 32 wide.
    assert [stage.sent_bytes for stage in stages] == [17 * 32 * 4, 0]
    assert abs(stages[0].load - stages[1].load) < 0.1
    assert sum(stage.load for stage in stages) == pytest.approx(1.0)


def test_stages_read_only_the_inputs_that_they_need(make_vit, make_images):
    assert [stage.inputs for stage in pipeline_stages(make_vit(), 2, make_images())] == [("pixel_values",), ("labels",)]


def test_without_labels_the_last_stage_returns_the_logits(make_vit, make_images):
    model, inputs = make_vit(), {"pixel_values": make_images()["pixel_values"]}
    assert torch.equal(_run(pipeline_stages(model, 2, inputs), inputs), model(**inputs).logits)


def test_stages_take_other_batch_sizes(make_vit, make_images):
    model = make_vit()
    stages = pipeline_stages(bwsk_fx.capture(model, make_images(3)), 3)
    assert torch.equal(_run(stages, make_images(6)), model(**make_images(6)).loss)


class _Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.last.weight = self.first.weight

    def forward(self, x):
        return self.last(self.first(x).relu().tanh())


def test_what_reads_one_parameter_stays_together():
    with pytest.raises(PlanError, match=r"can be cut in 0 places.*tied weights"):
        pipeline_stages(_Tied(), 2, torch.randn(2, 4))


def test_a_stage_keeps_the_mode_that_its_graph_holds_for(make_vit, make_images):
    inputs = {"pixel_values": make_images()["pixel_values"]}
    model = make_vit("eager", attention_probs_dropout_prob=0.1)
    stage = pipeline_stages(model, 2, inputs)[0].graph
    with pytest.raises(CaptureError, match="captured in train mode"):
        stage.eval()(**inputs)


def test_refusals_say_what_to_do(make_vit, make_images):
    graph = bwsk_fx.capture(make_vit(), make_images())
    with pytest.raises(PlanError, match="fuse_regions on each stage"):
        pipeline_stages(bwsk_fx.fuse_regions(graph), 2)
    with pytest.raises(PlanError, match="needs example inputs"):
        pipeline_stages(make_vit(), 2)
    with pytest.raises(PlanError, match="0 stages"):
        pipeline_stages(graph, 0)
