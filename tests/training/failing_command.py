"""Two processes agree on results and on errors, which each writes down, and then run a command that cannot start."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from bwsk_fx import cli
from bwsk_fx.training import processes


class Unsendable(Exception):
    """Can be pickled, but not read again."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(first + second)


def fail(rank: int, error: Exception) -> None:
    if processes.rank() == rank:
        raise error


def together(rank: int, error: Exception) -> None:
    with processes.together():
        fail(rank, error)


def outcome(action: Callable[[], object]) -> object:
    try:
        return action()
    except Exception as error:
        return [type(error).__name__, str(error)]


ACTIONS = {
    "decided": lambda: processes.decided(lambda: processes.rank() + 5),
    "made by each": lambda: processes.main_first(processes.rank),
    "mean": lambda: processes.mean(torch.tensor(1.0 + processes.rank())).item(),
    "main failed to decide": lambda: processes.decided(lambda: fail(0, OSError(28, "full"))),
    "main failed to make": lambda: processes.main_first(lambda: fail(0, ValueError("broken"))),
    "main failed": lambda: together(0, ValueError("broken")),
    "the other failed": lambda: together(1, OSError(28, "full")),
    "the other failed in its own way": lambda: together(1, Unsendable("own ", "way")),
    "nobody failed": lambda: together(2, ValueError("broken")),
}


if __name__ == "__main__":
    found = {name: outcome(action) for name, action in ACTIONS.items()}
    Path(sys.argv[1], f"{processes.rank()}.json").write_text(json.dumps(found), encoding="utf-8")
    sys.argv = ["bwsk-fx", *sys.argv[2:]]
    cli.main()
