"""Checkpoints of a training that is not finished yet: which of them are whole, and whether they belong to this run.

A checkpoint is a folder that Trainer fills. Its last file is a marker, put in place by a rename, that holds a digest of
every other file: a folder without it was cut off, one that does not match it is damaged, and both are passed over.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from bwsk_fx.errors import TrainingError
from bwsk_fx.training import processes
from bwsk_fx.training.faults import disk_error, is_disk_error
from bwsk_fx.training.output import differences

MARKER = "complete.json"
KEPT = 2
# Of the time; what a kill costs at most is then about 20 times what a checkpoint takes, or one evaluation to the next.
SAVING_SHARE = 0.05

# What a checkpoint that says nothing of processes was written by.
_ALONE = {"processes": 1}
_PREFIX = "checkpoint-"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint: its folder, and the optimizer steps that it has behind it."""

    folder: Path
    step: int

    @property
    def marker(self) -> Path:
        """The file that makes the checkpoint whole."""
        return self.folder / MARKER

    def seal(self, identity: dict[str, Any]) -> None:
        """Writes the marker; everything else has to be there."""
        temporary = self.folder / f".{MARKER}"
        temporary.write_text(json.dumps({"identity": identity, "files": self._digests()}, indent=1), encoding="utf-8")
        temporary.replace(self.marker)

    def identity(self) -> dict[str, Any] | None:
        """What the checkpoint was written for; None where its marker cannot be read."""
        contents = self._read_marker()
        return None if contents is None else contents["identity"]

    def damage(self) -> str | None:
        """What is wrong with a checkpoint that has a marker, in words; None when it is whole."""
        contents = self._read_marker()
        if contents is None:
            return f"{MARKER} cannot be read"
        there, wanted = self._digests(), contents["files"]
        changed = sorted(name for name in there.keys() | wanted.keys() if there.get(name) != wanted.get(name))
        return f"{changed[0]} is not what was written" if changed else None

    def _digests(self) -> dict[str, str]:
        files = (path for path in self.folder.iterdir() if path.name not in {MARKER, f".{MARKER}"})
        return {path.name: _digest(path) for path in sorted(files)}

    def _read_marker(self) -> dict[str, Any] | None:
        try:
            contents = json.loads(self.marker.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        fields = contents if isinstance(contents, dict) else {}
        whole = all(isinstance(fields.get(name), dict) for name in ("identity", "files"))
        return fields if whole else None


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one training.

    Attributes:
        name: of the training, for messages.
        folder: which holds them; Trainer's output folder.
        identity: everything that decides the weights, and what they can only be bit-equal under.
    """

    name: str
    folder: Path
    identity: dict[str, Any] = field(default_factory=dict)

    def require_same_identity(self) -> None:
        """Raises a TrainingError when there is unfinished work that this training cannot go on with."""
        processes.decided(self._require_same_identity)

    def _require_same_identity(self) -> None:
        for checkpoint in self._sealed():
            there = checkpoint.identity()
            differing = [] if there is None else differences(_ALONE | there, _ALONE | self.identity)
            if differing:
                raise TrainingError(
                    f"'{self.folder.parent}' holds an unfinished {self.name} of another configuration "
                    f"({'; '.join(differing)}); choose another --output, or pass --overwrite to give that work up"
                )

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole; removes those after it."""
        return processes.decided(self._newest)

    def _newest(self) -> Checkpoint | None:
        for checkpoint in reversed(self._all()):
            if checkpoint.marker.exists():
                damage = checkpoint.damage()
                if damage is None:
                    return checkpoint
                _log.warning("%s: passing over the damaged '%s' (%s)", self.name, checkpoint.folder, damage)
            shutil.rmtree(checkpoint.folder)
        return None

    @contextmanager
    def saving(self, step: int) -> Iterator[Path]:
        """A folder to fill with a checkpoint; it is whole when the block ends well, and gone otherwise.

        Every process fills it with what is its own, and the marker comes when all have done so.
        """
        checkpoint = Checkpoint(self.folder / f"{_PREFIX}{step}", step)
        try:
            processes.decided(partial(_make_anew, checkpoint.folder))
            with processes.together():
                yield checkpoint.folder
            processes.decided(partial(checkpoint.seal, self.identity))
        except Exception as error:
            failure = self._unwritable(error) if is_disk_error(error) else None
            if processes.is_main():
                shutil.rmtree(checkpoint.folder, ignore_errors=True)
            if failure is None:
                raise
            raise failure from error
        processes.decided(self._forget_old)

    def discard(self) -> None:
        """Removes all of them."""
        processes.decided(partial(shutil.rmtree, self.folder, ignore_errors=True))

    @contextmanager
    def opened(self) -> Iterator[Path]:
        """The folder for the block, which is gone afterwards when no checkpoint is in it."""
        try:
            processes.decided(partial(self.folder.mkdir, parents=True, exist_ok=True))
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            yield self.folder
        finally:
            if processes.is_main() and not any(self.folder.iterdir()):
                self.folder.rmdir()

    def _all(self) -> list[Checkpoint]:
        found = (path for path in self.folder.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdecimal())
        checkpoints = (Checkpoint(path, int(path.name.removeprefix(_PREFIX))) for path in found)
        return sorted(checkpoints, key=lambda checkpoint: checkpoint.step)

    def _sealed(self) -> list[Checkpoint]:
        return [checkpoint for checkpoint in self._all() if checkpoint.marker.exists()]

    def _forget_old(self) -> None:
        for checkpoint in self._sealed()[:-KEPT]:
            # Without its marker first, a folder of which half is gone would pass for a damaged one.
            checkpoint.marker.unlink()
            shutil.rmtree(checkpoint.folder)

    def _unwritable(self, error: Exception) -> TrainingError:
        sealed = self._sealed()
        rest = f"goes on from step {sealed[-1].step}" if sealed else "starts this training from its beginning"
        return disk_error(self.folder, error, f"a checkpoint of {self.name}", f"the same command then {rest}")


@dataclass
class Pace:
    """Says when the next checkpoint is due, so that writing them takes a small share of the time.

    On a fast device a large model would otherwise be written about as long as it is trained.
    """

    _took: float = 0.0
    _ended: float = -math.inf

    def due(self, now: float) -> bool:
        """Whether a checkpoint may be written; the first one always."""
        return now - self._ended >= self._took / SAVING_SHARE

    def saved(self, began: float, ended: float) -> None:
        """Takes note of how long one took."""
        self._took, self._ended = ended - began, ended


def _make_anew(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
