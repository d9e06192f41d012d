"""The processes that a launcher started for one run: which of them this is, and how they agree.

Whatever depends on files or on time is decided by the main process and told to the others, and only it writes. An error
of the main process, or of any one where all work on the same thing, is raised in every process. Of what cannot be told,
such as a process that is killed, the launcher (torchrun, which accelerate starts as well) takes care: it ends all of
them when one fails.
"""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from bwsk_fx.errors import TrainingError, first_line

# Everything else is imported where it is needed: the command line asks `heard` before it imports anything heavy.
if TYPE_CHECKING:
    import torch
    from accelerate import PartialState

Result = TypeVar("Result")

# The main process may download a data set while the others wait.
WAITING_LIMIT = timedelta(hours=12)
# A launcher looks for failed processes several times a second.
HEARING_S = 15.0

# What accelerate's launcher asks for by the environment, and Trainer would do without being told.
_UNSUPPORTED = {
    "ACCELERATE_USE_FSDP": (
        "FSDP (its checkpoints and best weights are whole, and on a CPU accelerate shards nothing; in a script of your "
        "own, call bwsk_fx.parallel.apply_to_blocks before Accelerator.prepare)"
    ),
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
}


def heard() -> bool:
    """Whether what this process prints is for the user: so it is for one of all, the main one."""
    return int(os.environ.get("RANK", "0")) == 0


def count() -> int:
    """How many processes train together; 1 without a launcher."""
    return _state().num_processes


def rank() -> int:
    """Which of them this is, counted from 0."""
    return _state().process_index


def is_main() -> bool:
    """Whether this is the process that decides and writes."""
    return rank() == 0


def device() -> torch.device:
    """The device that this process trains on: its own GPU, or the CPU."""
    return _state().device


def wait() -> None:
    """Returns when all processes have come here."""
    _state().wait_for_everyone()


def leave() -> None:
    """Ends the exchange with the others; a process that ends without it is reported by NCCL."""
    _state().destroy_process_group()


def mean(value: torch.Tensor) -> torch.Tensor:
    """The mean of a tensor over the processes; without others the tensor itself."""
    from accelerate.utils import reduce

    return value if count() == 1 else reduce(value, "mean")


def decided(decide: Callable[[], Result]) -> Result:
    """Runs a function in the main process only; its result, or its exception, is everybody's.

    The result must be picklable.
    """
    if count() == 1:
        return decide()
    from accelerate.utils import broadcast_object_list

    outcome: list[Any] = list(_attempt(decide)) if is_main() else [None, None]
    sent = [outcome[0], _portable(outcome[1])]
    broadcast_object_list(sent)
    error = outcome[1] or sent[1]
    if error is not None:
        raise error
    return outcome[0] if is_main() else sent[0]


def main_first(make: Callable[[], Result]) -> Result:
    """Runs a function in the main process and then in the others, which find what the first one left in caches."""
    made: list[Result] = []
    decided(lambda: made.append(make()))
    return made[0] if made else make()


@contextmanager
def together() -> Iterator[None]:
    """A block that ends when it has ended in every process; an exception of one is raised in all.

    The block itself must not exchange anything, since a process that failed no longer takes part.
    """
    if count() == 1:
        yield
        return
    from accelerate.utils import gather_object

    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    failures = gather_object([_portable(failure)])
    failure = failure or next((other for other in failures if other is not None), None)
    if failure is not None:
        raise failure


@contextmanager
def main_heard_first() -> Iterator[None]:
    """Holds an exception of another process back, so that the main one, if it has the same, reports it alone.

    It ends then, whereupon the launcher ends this process; an exception that only this one has goes on after a while.
    """
    try:
        yield
    except Exception:
        if not heard():
            time.sleep(HEARING_S)
        raise


def require_supported(precision: str) -> None:
    """Raises a TrainingError when the launcher asks for more than processes that share a batch.

    Args:
        precision: of the forward pass, which the launcher must not contradict.
    """
    for name, what in _UNSUPPORTED.items():
        if _asked(name):
            raise TrainingError(
                f"bwsk-fx train does not support {what}; launch it with several processes that share the batch: "
                "accelerate launch --multi_gpu, or torchrun"
            )
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        raise TrainingError("leave the launcher's --dynamo_backend out, and give the run --trainer torch_compile=true")
    mixed = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if mixed not in {"no", precision}:
        raise TrainingError(
            f"the launcher asks for --mixed_precision {mixed}, the run for {precision}; give the run "
            f"--precision {mixed}, or the launcher --mixed_precision no"
        )


def batch_of_each(batch_size: int) -> int:
    """How many samples of a step each process takes; raises a TrainingError when they cannot share it evenly."""
    if batch_size % count():
        raise TrainingError(
            f"{count()} processes cannot share a batch of {batch_size} samples evenly; choose a --batch-size that is "
            f"a multiple of {count()}, or another number of processes"
        )
    return batch_size // count()


@dataclass(frozen=True)
class Share:
    """What one process does for a step.

    Attributes:
        samples: of its batch, from the front; the rest repeats samples of other steps.
        weight: of its mean loss, so that the mean over the processes is the mean over the samples.
    """

    samples: int
    weight: float


def share(total: int, batch_size: int) -> Share:
    """This process's share of a step over `total` samples, at most `batch_size`, which are laid out rank by rank.

    Who has none takes part with one sample of weight 0, since the others wait for its gradients.
    """
    each = batch_of_each(batch_size)
    own = min(max(total - each * rank(), 0), each)
    return Share(max(own, 1), own * count() / total)


def _state() -> PartialState:
    import torch
    from accelerate import PartialState

    # Trainer clears what accelerate knows of the processes and finds it out anew, so nothing is kept here.
    on_cpu = _asked("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
    return PartialState(cpu=on_cpu, timeout=WAITING_LIMIT)


def _asked(name: str) -> bool:
    return os.environ.get(name, "false").lower() in {"1", "true", "yes", "on"}


def _attempt(action: Callable[[], Result]) -> tuple[Result | None, Exception | None]:
    try:
        return action(), None
    except Exception as error:
        return None, error


def _portable(error: Exception | None) -> Exception | None:
    """The exception, or what can be sent of it."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return TrainingError(f"{type(error).__name__}: {first_line(error)}" if error else "")
    return error
