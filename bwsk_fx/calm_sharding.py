"""Which axis to shard where, so that a training step on several devices communicates least.

Each node runs on shards of one axis of its own, or on all of it on every device (replicated). A tensor is therefore
replicated, sharded along an axis, or partial (each device has a summand); between a node that leaves it in one form
and a node that needs another lies a collective, and another one for the gradient on its way back. What each device
sends, for a tensor of V bytes on n devices:

    all-reduce      2 (n-1)/n V     partial -> replicated
    reduce-scatter    (n-1)/n V     partial -> sharded
    all-gather        (n-1)/n V     sharded -> replicated
    all-to-all       (n-1)/n² V     sharded -> sharded along another axis

The first three are the ring algorithms (Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters
of workstations", J. Parallel Distrib. Comput. 69; Thakur, Rabenseifner and Gropp 2005, "Optimization of collective
communication operations in MPICH", Int. J. High Perform. Comput. Appl. 19), which no algorithm undercuts; in an
all-to-all each device has V/n and sends all but its own n-th of it.

Assignments are compared by dynamic programming over the nodes in order. A state is the form of every tensor that is
still needed, and which collectives it has been through already, so that consumers of one tensor share them (q, k and v
gather their operand once). That is exact for any DAG, branches included; its time grows with the number of tensors
alive at once, not with depth. Only where more than `LIMIT` states are alive at once are the dearest ones dropped, and
`Sharding.exact` says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from math import inf, prod

from bwsk_fx.calm_choices import PARTIAL, REPLICATED, Choice, Need, Problem
from bwsk_fx.calm_cost import size_at
from bwsk_fx.errors import RuleError
from bwsk_fx.report.calm_sharding import AxisSize, Collective, Placement, Sharding
from bwsk_fx.rules.axis_table import Extent

LIMIT = 512
_PLAIN, _HURRIED = 3, 16  # how many axes are tried alone, and with how many states
_COMPARED = 64  # states that a dearer one is held against before it is kept

# The form of a tensor that is still needed, the forms that it was brought into, and those that its gradient comes in.
_Held = tuple[int, frozenset[int], frozenset[int]]
_State = tuple[_Held, ...]
_NONE: frozenset[int] = frozenset()

UNITS: Mapping[str, Callable[[int], int]] = {
    "all-reduce": lambda n: 2 * (n - 1) * n,
    "reduce-scatter": lambda n: (n - 1) * n,
    "all-gather": lambda n: (n - 1) * n,
    "all-to-all": lambda n: n - 1,
}
"""What each of n devices sends per byte of the whole tensor, times n²."""


def solve(problem: Problem, devices: int, batch: int | None = None) -> Sharding:
    """Return the assignment of axes with which a training step sends the fewest bytes.

    Every node with products is sharded along one of its axes, if any has a size that `devices` divides; other nodes
    may be replicated. Of assignments that send equally many bytes, one that replicates the fewest bytes of
    elementwise work is taken.

    Args:
        problem: What choosing axes takes, from `bwsk_fx.calm_choices.sharding_problem`.
        devices: How many devices, at least 2.
        batch: Samples per step on all devices together; one per device if None.

    Raises:
        RuleError: Fewer than two devices, or no sample.
    """
    batch = devices if batch is None else batch
    if devices < 2 or batch < 1:
        raise RuleError(f"sharding takes at least 2 devices and 1 sample, not {devices} and {batch}")
    return _Search(problem, devices, batch).best()


@dataclass(frozen=True)
class _Path:
    """The cheapest way into a state: units sent, replicated work (bytes, and nodes), the choices from the last one."""

    sent: int
    replicated: int
    choice: Choice | None = None
    before: _Path | None = None


class _Search:
    """Dynamic programming over the nodes of a problem; costs are in units of a byte over n², to be exact."""

    def __init__(self, problem: Problem, devices: int, batch: int) -> None:
        self._problem, self._devices, self._batch = problem, devices, batch
        self._tasks = problem.tasks
        self._bytes = [
            sum(itemsize * prod(size_at(size, batch) for size in shape) for shape, itemsize in task.tensors)
            for task in self._tasks
        ]
        self._rates = {kind: rate(devices) for kind, rate in UNITS.items()}
        # What comes before all learning and all products.
        self._is_data: list[bool] = []
        for task in self._tasks:
            before = all(self._is_data[need.task] for need in task.choices[0].needs)
            self._is_data.append(before and not task.learns and not task.cost.flops.at(batch))
        self._exact = True
        self._turns_known: dict[tuple[int, int, _Held, _Held], int] = {}

    def best(self) -> Sharding:
        """Return the sharding that sends least.

        Plans that keep to one axis wherever they can are found quickly; what sends more than the best of them by
        halfway is not followed any further.
        """
        plain = [path for name in self._common_axes() if (path := self._run(name, inf, _HURRIED)) is not None]
        self._exact = True
        found = self._run("", min((path.sent for path in plain), default=inf), LIMIT)
        return self._report(min([*plain, *([found] if found else [])], key=_cost))

    def _common_axes(self) -> list[str]:
        offered = ({choice.axis for choice in self._allowed(index)} for index in range(len(self._tasks)))
        names = Counter(name for several in offered for name in several if name)
        return [name for name, _ in names.most_common(_PLAIN)]

    def _run(self, axis: str, most: float, limit: int) -> _Path | None:
        """Return the path that sends least, of those that keep to an axis where they can and send at most `most`."""
        paths: dict[_State, _Path] = {(): _Path(0, 0)}
        live: list[int] = []
        for index, task in enumerate(self._tasks):
            after = [held for held in live if self._tasks[held].users[-1] != index] + [index] * bool(task.users)
            allowed = self._allowed(index)
            kept = [choice for choice in allowed if not axis or choice.axis in (axis, "")] or allowed
            choices = [(choice, *self._alone(index, choice)) for choice in kept]
            found: dict[_State, _Path] = {}
            for state, path in paths.items():
                held = dict(zip(live, state, strict=True))
                for choice, sent, replicated in choices:
                    reached = {**held, index: (choice.result, _NONE, _NONE)}
                    total = path.sent + sent + self._meet_all(choice, reached)
                    if total <= most:
                        self._enter(found, reached, after, _Path(total, path.replicated + replicated, choice, path))
            paths, live = self._kept(found, after, index, limit), after
        return min(paths.values(), key=_cost, default=None)

    def _allowed(self, index: int) -> list[Choice]:
        """Return the choices that are to be tried.

        Those whose sizes can be divided; sharded ones only, if there is one and there are products. What no gradient
        reaches is replicated for now: each device takes its shard of that, whichever axis, without sending anything.
        """
        task = self._tasks[index]
        if self._is_data[index]:
            return [task.choices[0]]
        divided = [choice for choice in task.choices[1:] if all(map(self._divides, choice.sizes))]
        return divided if divided and task.cost.flops.at(self._batch) else [task.choices[0], *divided]

    def _divides(self, size: Extent) -> bool:
        return size_at(size, self._batch) % self._devices == 0

    def _alone(self, index: int, choice: Choice) -> tuple[int, int]:
        """Return what a choice sends whatever the forms of its operands, and the work that it replicates."""
        task = self._tasks[index]
        sent = sum(size for _, size in choice.gradients) * self._rates["all-reduce"]
        sent += 2 * choice.gathered * self._batch * self._rates["all-gather"]
        if choice.result == PARTIAL and not task.users:
            sent += self._rates["all-reduce"] * self._bytes[index]
        return sent, 0 if choice.axis else task.cost.bytes.at(self._batch) + 1

    def _meet_all(self, choice: Choice, held: dict[int, _Held]) -> int:
        """Bring operands into the forms that a choice needs, and return what that sends."""
        sent = 0
        for need in choice.needs:
            kinds = self._kinds(need, held[need.task])
            sent += sum(self._rates[kind] for kind in kinds if kind) * self._bytes[need.task]
            held[need.task] = _met(need, held[need.task], kinds)
        return sent

    def _kinds(self, need: Need, held: _Held) -> tuple[str, str]:
        """Return the collectives that an operand and its gradient go through for a need; empty ones where none."""
        form, forms, gradients = held
        forward = change(form, need.form) if need.form not in forms else ""
        flows = self._tasks[need.task].learns and need.gradient not in gradients
        return forward, change(need.gradient, returned(form)) if flows else ""

    def _enter(self, found: dict[_State, _Path], held: Mapping[int, _Held], after: Sequence[int], path: _Path) -> None:
        state = tuple(held[place] for place in after)
        known = found.get(state)
        if known is None or _cost(path) < _cost(known):
            found[state] = path

    def _kept(self, found: dict[_State, _Path], live: Sequence[int], index: int, limit: int) -> dict[_State, _Path]:
        """Return the states that may lead to the least.

        A state is left out if a cheaper one can be turned into it at no more than the difference: whatever follows, the
        cheaper one can do the same.
        """
        uses = [sum(user > index for user in self._tasks[task].users) for task in live]
        tensors = list(zip(live, uses, strict=True))
        kept: dict[_State, _Path] = {}
        for state, path in sorted(found.items(), key=lambda item: _cost(item[1])):
            cheaper = islice(kept.items(), _COMPARED)
            if any(self._turns(other, before, state, path, tensors) for other, before in cheaper):
                continue
            if len(kept) == limit:
                self._exact = False
                break
            kept[state] = path
        return kept

    def _turns(self, one: _State, cheap: _Path, other: _State, dear: _Path, tensors: Sequence[tuple[int, int]]) -> bool:
        gap = dear.sent - cheap.sent
        for tensor, mine, theirs in zip(tensors, one, other, strict=True):
            if mine != theirs:
                gap -= self._turned(*tensor, mine, theirs)
                if gap < 0:
                    return False
        return gap > 0 or cheap.replicated <= dear.replicated

    def _turned(self, task: int, uses: int, mine: _Held, theirs: _Held) -> int:
        """Return how much more a tensor can cost in one form than in another, at every use to come and back."""
        key = task, uses, mine, theirs
        if key not in self._turns_known:
            (form, forms, gradients), (wanted, met, returns) = mine, theirs
            units = uses * self._rate(form, wanted)
            units += sum(self._rate(form, each) for each in met - forms)
            if self._tasks[task].learns:
                units += uses * self._rate(returned(wanted), returned(form))
                units += sum(self._rate(each, returned(form)) for each in returns - gradients)
            self._turns_known[key] = units * self._bytes[task]
        return self._turns_known[key]

    def _rate(self, form: int, wanted: int) -> int:
        kind = change(form, wanted)
        return self._rates[kind] if kind else 0

    # -- what was found -----------------------------------------------------------------------------------------------

    def _report(self, path: _Path) -> Sharding:
        choices: list[Choice] = []
        step: _Path | None = path
        while step is not None and step.choice is not None:
            choices.append(step.choice)
            step = step.before
        choices = self._spread(choices[::-1])
        costs = [(task.cost.flops.at(self._batch), task.cost.bytes.at(self._batch)) for task in self._tasks]
        placements = tuple(
            Placement(task.name, task.block, choice.axis, *cost)
            for task, choice, cost in zip(self._tasks, choices, costs, strict=True)
        )
        return Sharding(
            self._devices,
            self._batch,
            placements,
            tuple(self._collectives(choices)),
            tuple(self._axis_sizes()),
            self._exact,
        )

    def _spread(self, choices: list[Choice]) -> list[Choice]:
        """Shard what no gradient reaches, too, where all that use it need the same shards."""
        needed: dict[int, set[int]] = {}
        for index in reversed(range(len(choices))):
            task, forms = self._tasks[index], needed.get(index, set())
            if self._is_data[index] and len(forms) == 1:
                free = [choice for choice in task.choices[1:] if not (choice.gradients or choice.gathered)]
                fitting = [
                    choice for choice in free if choice.result in forms and all(map(self._divides, choice.sizes))
                ]
                choices[index] = fitting[0] if fitting else choices[index]
            for need in choices[index].needs:
                needed.setdefault(need.task, set()).add(need.form)
        return choices

    def _axis_sizes(self) -> Iterator[AxisSize]:
        for name, extents in self._problem.extents:
            sizes = tuple(sorted({size_at(size, self._batch) for size in extents}))
            yield AxisSize(name, sizes, all(size % self._devices == 0 for size in sizes))

    def _collectives(self, choices: Sequence[Choice]) -> Iterator[Collective]:
        """Yield what has to be sent, forward and backward, in the order of the nodes."""
        held: dict[int, _Held] = {}
        for index, choice in enumerate(choices):
            name = self._tasks[index].name
            for need in choice.needs:
                kinds = self._kinds(need, held[need.task])
                for kind, direction in zip(kinds, ("forward", "backward"), strict=True):
                    if kind:
                        yield self._collective(
                            kind, self._tasks[need.task].name, name, direction, self._bytes[need.task]
                        )
                held[need.task] = _met(need, held[need.task], kinds)
            held[index] = (choice.result, _NONE, _NONE)
            yield from self._inside(index, choice)

    def _inside(self, index: int, choice: Choice) -> Iterator[Collective]:
        task = self._tasks[index]
        if choice.gathered:
            gathered = choice.gathered * self._batch
            yield self._collective("all-gather", task.name, task.name, "forward", gathered)
            yield self._collective("reduce-scatter", task.name, task.name, "backward", gathered)
        for parameter, size in choice.gradients:
            yield replace(self._collective("all-reduce", parameter, task.name, "backward", size), parameter=True)
        if choice.result == PARTIAL and not task.users:
            yield self._collective("all-reduce", task.name, task.name, "forward", self._bytes[index])

    def _collective(self, kind: str, tensor: str, user: str, direction: str, size: int) -> Collective:
        return Collective(kind, tensor, user, direction, size, self._rates[kind] * size / self._devices**2)


def change(form: int, wanted: int) -> str:
    """Return the collective that brings a tensor from one form into another; empty where nothing is missing."""
    if form in (wanted, REPLICATED):
        return ""
    if form == PARTIAL:
        return "all-reduce" if wanted == REPLICATED else "reduce-scatter"
    return "all-gather" if wanted == REPLICATED else "all-to-all"


def returned(form: int) -> int:
    """Return the form in which a node needs the gradient of its result: a summand takes all of it."""
    return REPLICATED if form == PARTIAL else form


def _met(need: Need, held: _Held, kinds: tuple[str, str]) -> _Held:
    """Return a tensor after a need was met: collectives that it went through are there for other consumers, too."""
    form, forms, gradients = held
    forward, backward = kinds
    return form, forms | {need.form} if forward else forms, gradients | {need.gradient} if backward else gradients


def _cost(path: _Path) -> tuple[int, int]:
    return path.sent, path.replicated
