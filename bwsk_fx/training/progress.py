"""Progress bars, seen by the training code as a small interface that also works without a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from bwsk_fx.training import processes


class Bar(Protocol):
    """The progress of one training."""

    def begin(self, total: int) -> None:
        """Training starts and will take at most `total` steps."""

    def advance(self, loss: float) -> None:
        """One step is done."""

    def note(self, accuracy: float) -> None:
        """The model was evaluated."""

    def finish(self) -> None:
        """Training is over, maybe early."""


class Reporter(Protocol):
    """Hears about the stages of a run."""

    def bar(self, label: str) -> Bar:
        """A bar for one training."""

    def working(self, label: str) -> AbstractContextManager[None]:
        """Around a stage without steps, such as reading data."""


@dataclass(frozen=True)
class SilentBar:
    """Shows nothing."""

    def begin(self, total: int) -> None:
        """Shows nothing."""

    def advance(self, loss: float) -> None:
        """Shows nothing."""

    def note(self, accuracy: float) -> None:
        """Shows nothing."""

    def finish(self) -> None:
        """Shows nothing."""


@dataclass(frozen=True)
class SilentReporter:
    """Shows nothing."""

    def bar(self, label: str) -> Bar:
        """A bar that shows nothing."""
        return SilentBar()

    def working(self, label: str) -> AbstractContextManager[None]:
        """Shows nothing."""
        return nullcontext()


@dataclass
class RichBar:
    """One line of a `rich` progress display."""

    progress: Progress
    task: TaskID
    _loss: float | None = None
    _accuracy: float | None = None

    def begin(self, total: int) -> None:
        """Sets the length of the bar."""
        self.progress.reset(self.task, total=total)

    def advance(self, loss: float) -> None:
        """Moves the bar by a step."""
        # A running mean: single batches of 16 jump too much to be read.
        self._loss = loss if self._loss is None else 0.95 * self._loss + 0.05 * loss
        self.progress.update(self.task, advance=1, figures=self._figures())

    def note(self, accuracy: float) -> None:
        """Shows the latest validation accuracy."""
        self._accuracy = accuracy
        self.progress.update(self.task, figures=self._figures())

    def finish(self) -> None:
        """Fills the bar, also when training stopped early."""
        done = next(task.completed for task in self.progress.tasks if task.id == self.task)
        self.progress.update(self.task, total=done)

    def _figures(self) -> str:
        loss = "" if self._loss is None else f"loss {self._loss:.3f}"
        accuracy = "" if self._accuracy is None else f"  val {self._accuracy:.1%}"
        return loss + accuracy


@dataclass(frozen=True)
class RichReporter:
    """Bars on a terminal; a training without steps yet shows a moving bar."""

    progress: Progress

    def bar(self, label: str) -> Bar:
        """A new line with a bar."""
        return RichBar(self.progress, self.progress.add_task(label, total=None, figures=""))

    @contextmanager
    def working(self, label: str) -> Iterator[None]:
        """A moving bar that is gone afterwards."""
        line = self.progress.add_task(label, total=None, figures="")
        try:
            yield
        finally:
            self.progress.remove_task(line)


@dataclass
class LineBar:
    """Writes one line when a training is over."""

    console: Console
    label: str
    _steps: int = 0
    _accuracy: float = 0.0

    def begin(self, total: int) -> None:
        """Shows nothing yet."""

    def advance(self, loss: float) -> None:
        """Counts the step."""
        self._steps += 1

    def note(self, accuracy: float) -> None:
        """Remembers the best accuracy."""
        self._accuracy = max(self._accuracy, accuracy)

    def finish(self) -> None:
        """Writes the line."""
        self.console.print(f"{self.label}: {self._steps} steps, best validation accuracy {self._accuracy:.2%}")


@dataclass(frozen=True)
class LineReporter:
    """For logs, in which a moving bar would be rubbish: one line per training."""

    console: Console

    def bar(self, label: str) -> Bar:
        """A bar that ends in a line."""
        return LineBar(self.console, label)

    def working(self, label: str) -> AbstractContextManager[None]:
        """Shows nothing."""
        return nullcontext()


@contextmanager
def on_console(console: Console) -> Iterator[Reporter]:
    """A reporter for a console: bars while the block runs on a terminal, lines elsewhere.

    Of several processes only the main one shows anything.
    """
    if not processes.heard():
        yield SilentReporter()
        return
    if not console.is_terminal:
        yield LineReporter(console)
        return
    columns = (
        SpinnerColumn(finished_text="[green]✓[/green]"),
        TextColumn("{task.description}"),
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        TextColumn("[cyan]{task.fields[figures]}"),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
    )
    with Progress(*columns, console=console) as progress:
        yield RichReporter(progress)
