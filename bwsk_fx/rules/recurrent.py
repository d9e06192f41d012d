"""Recurrent layers: where tanh is the only bend, each step is undone from the states around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bwsk_fx.rules.arguments import Arguments
from bwsk_fx.rules.contraction import FULL_RANK, value_of
from bwsk_fx.rules.registry import Call, erases, labels, preserves, unproven, witness_of
from bwsk_fx.rules.sizes import elements
from bwsk_fx.rules.undo import Factors, Run, Undo
from bwsk_fx.verdict import REFINED, Verdict

_DOMAIN = f"{FULL_RANK} and tanh is not saturated"


@dataclass(frozen=True)
class Recurrence:
    """A stack of recurrent layers, or a single step of one.

    Attributes:
        operand: The sequence.
        state: The first state, else None for zeros.
        weights: Per layer and direction: the weights of input and state, and their biases where there are any.
        layers: How many layers are stacked.
        directions: One, or two where they run both ways.
        batch_first: Whether the batch comes before time.
        dropout: The rate of dropout between layers; zero where it is not active.
        cell: Whether it is a single step.
    """

    operand: Any
    state: Any
    weights: tuple[tuple[Any, ...], ...]
    layers: int
    directions: int
    batch_first: bool
    dropout: float
    cell: bool

    @property
    def widths(self) -> tuple[Any, Any]:
        """Features of the operand, and of a step's result."""
        return value_of(self.weights[0][0]).shape[1], self.directions * value_of(self.weights[0][1]).shape[1]


def sequence(arguments: Arguments) -> Recurrence:
    """Read an `nn.RNN`, or `rnn_tanh(input, hx, params, has_biases, num_layers, dropout, train, bidirectional, …)`."""
    module = arguments.module
    if module is not None:
        weights = tuple(tuple(group) for group in module.all_weights)
        directions, active = 1 + module.bidirectional, module.dropout if module.training else 0.0
        operand, state = arguments.argument(0, "input"), arguments.argument(1, "hx")
        return Recurrence(
            operand, state, weights, module.num_layers, directions, module.batch_first, active, cell=False
        )
    operand, state, params, biases, layers, rate, train, both, batch_first = arguments.args
    size = 4 if biases else 2
    groups = tuple(tuple(params[start : start + size]) for start in range(0, len(params), size))
    return Recurrence(operand, state, groups, layers, 1 + both, batch_first, rate if train else 0.0, cell=False)


def cell(arguments: Arguments) -> Recurrence:
    """Read an `nn.RNNCell`, or `rnn_tanh_cell(input, hx, w_ih, w_hh, b_ih, b_hh)`."""
    module = arguments.module
    operand, state = arguments.argument(0, "input"), arguments.argument(1, "hx")
    if module is None:
        weights = (*arguments.args[2:], *arguments.kwargs.values())
    else:
        weights = (module.weight_ih, module.weight_hh, module.bias_ih, module.bias_hh)
    present = tuple(weight for weight in weights if weight is not None)
    return Recurrence(operand, state, (present,), 1, 1, batch_first=False, dropout=0.0, cell=True)


@labels(nn.RNN)
def recurrent_layers(call: Call) -> Verdict:
    """An `nn.RNN`, whose nonlinearity decides."""
    return tanh_layers(call) if call.module.nonlinearity == "tanh" else relu_layers(call)


@labels(torch.rnn_tanh, atens="rnn_tanh")
def tanh_layers(call: Call) -> Verdict:
    """S where no step has fewer features than its operand."""
    if call.module is None and len(call.args) != 9:
        return unproven("packed sequences are covered by no rule")
    return _undone(call, sequence(call), _undo_layers)


@labels(torch.rnn_relu, atens="rnn_relu")
@labels(torch.rnn_relu_cell, atens="rnn_relu_cell")
def relu_layers(_: Call) -> Verdict:
    """ReLU erases what is negative."""
    return erases("its ReLU erases negative values", confidence=REFINED)


@labels(nn.RNNCell)
def recurrent_cell(call: Call) -> Verdict:
    """An `nn.RNNCell`, whose nonlinearity decides."""
    return tanh_cell(call) if call.module.nonlinearity == "tanh" else relu_layers(call)


@labels(torch.rnn_tanh_cell, atens="rnn_tanh_cell")
def tanh_cell(call: Call) -> Verdict:
    """S where the state has no fewer features than the operand."""
    return _undone(call, cell(call), _undo_cell)


def _undone(call: Call, form: Recurrence, undo: Any) -> Verdict:
    if not call.is_dynamic(form.operand) or form.operand is form.state:
        return unproven("its operand is static, or the first state, too")
    if form.dropout > 0 and form.layers > 1:
        return erases("dropout between its layers zeroes features at random", confidence=REFINED)
    if any(call.is_dynamic(weight) for group in form.weights for weight in group):
        return unproven("its weights are dynamic")
    width, made = form.widths
    if made < width:
        return _counted(call, form.layers, f"{width} → {made} features contract")
    number = call.operands.index(form.operand)
    witness = witness_of(call, form.state)
    why = f"{width} → {made} features expand, and each step is undone by artanh and the pseudo-inverse"
    return preserves(why, witness, REFINED, undo=Undo(undo, (number,)), domain=_DOMAIN)


def _counted(call: Call, layers: int, why: str) -> Verdict:
    """Return K where all results have fewer elements than the operand."""
    value = call.node.meta["val"]
    results: Sequence[Any] = [value] if isinstance(value, Tensor) else value
    total, made = elements(call.before), elements(results[0])
    # The last states of the last layer are part of the first result.
    states = 0 if layers == 1 else elements(results[1])
    if total is None or made is None or states is None or made + states * (layers - 1) // layers >= total:
        return unproven(f"{why}, but the last states have more results")
    return erases(why, total - made - states * (layers - 1) // layers, confidence=REFINED)


def _undo_cell(run: Run) -> Tensor:
    form = cell(run)
    made = run.output.double()
    state = torch.zeros_like(made) if form.state is None else form.state.double()
    bent = _opened(made, state, form.weights[0])
    factors = run.once("weights", partial(Factors.of, form.weights[0][0]))
    return factors.solve(bent.unsqueeze(-1)).squeeze(-1).reshape(form.operand.shape)


def _undo_layers(run: Run) -> Tensor:
    form = sequence(run)
    made = run.output[0].double()
    single = made.dim() == 2
    made = made.unsqueeze(1) if single else made.transpose(0, 1) if form.batch_first else made
    for layer in reversed(range(form.layers)):
        groups = form.weights[layer * form.directions : (layer + 1) * form.directions]
        states = [_first_state(form, layer * form.directions + way, made, single) for way in range(form.directions)]
        made = _layer(run, layer, made, groups, states)
    made = made.squeeze(1) if single else made.transpose(0, 1) if form.batch_first else made
    return made.reshape(form.operand.shape)


def _first_state(form: Recurrence, place: int, made: Tensor, single: bool) -> Tensor:
    size = made.shape[-1] // form.directions
    if form.state is None:
        return made.new_zeros(1, made.shape[1], size)
    state = form.state[place].double()
    return state.reshape(1, 1, size) if single else state.unsqueeze(0)


def _layer(run: Run, layer: int, made: Tensor, groups: Sequence[Any], states: Sequence[Tensor]) -> Tensor:
    """Return what a layer was given, from its results (time, batch, features of each direction)."""
    opened = []
    for way, (part, state) in enumerate(zip(made.chunk(len(groups), -1), states, strict=True)):
        before = torch.cat([state, part[:-1]]) if way == 0 else torch.cat([part[1:], state])
        opened.append(_opened(part, before, groups[way]))
    weight = torch.cat([group[0] for group in groups])
    factors = run.once(f"layer {layer}", partial(Factors.of, weight))
    return factors.solve(torch.cat(opened, -1).unsqueeze(-1)).squeeze(-1)


def _opened(made: Tensor, before: Tensor, group: Sequence[Any]) -> Tensor:
    """Return the input's product with its weight: artanh of the state, less the part of the state before."""
    largest = 1 - torch.finfo(torch.float64).eps
    bent = made.clamp(-largest, largest).atanh() - before @ group[1].double().mT
    return bent - sum(bias.double() for bias in group[2:])


@labels(nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell, torch.lstm, torch.gru, torch.lstm_cell, torch.gru_cell)
@labels(atens="lstm gru lstm_cell gru_cell")
def gated(call: Call) -> Verdict:
    """K where it has fewer results than operands; products of gates are beyond these rules otherwise."""
    counts, total = [elements(leaf) for leaf in _leaves(call.node.meta["val"])], elements(call.before)
    # The last state of the last layer is part of the first result; it is counted twice here, which is safe.
    made = None if None in counts else sum(count for count in counts if count is not None)
    if made is not None and total is not None and made < total:
        return erases("it has fewer results than operands", total - made, confidence=REFINED)
    return unproven("whether products of gates can be undone depends on the weights")


def _leaves(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [leaf for part in value for leaf in _leaves(part)]
