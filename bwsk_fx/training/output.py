"""The output folder: a variant appears in it whole or not at all, and nothing of anybody else's is touched."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from bwsk_fx.errors import TrainingError
from bwsk_fx.training import processes
from bwsk_fx.training.config import Experiment, Mode, RunConfig, Variant
from bwsk_fx.training.faults import disk_error
from bwsk_fx.training.trainer_options import LOGS

RESULT_FILE = "training_results.json"
SUMMARY_FILE = "results.json"
PRETRAINED = "pretrained"
ALL_VARIANTS = tuple(Variant(experiment, mode) for experiment in Experiment for mode in Mode)

_NUMBER_LIST = re.compile(r"\[\n[-+.\deE,\s]+\]")
_STAGE_PREFIX = ".partial-"
_UNFINISHED_PREFIX = ".unfinished-"
_SEED_FOLDER = re.compile(r"seed-(0|[1-9]\d*)")


@dataclass(frozen=True)
class Output:
    """The folder that a run writes to."""

    root: Path

    def require_usable(self) -> None:
        """Raises a TrainingError when the folder cannot be written or belongs to something else."""
        parent = _nearest_existing(self.root)
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise TrainingError(f"output folder '{self.root}' cannot be written; choose another --output")
        if self._has_foreign_content():
            raise TrainingError(
                f"output folder '{self.root}' holds other files and no results of bwsk-fx; choose another --output"
            )

    def require_layout(self, of_seeds: bool) -> None:
        """Raises a TrainingError when the folder holds a run of one seed and several are asked for, or the reverse."""
        entries = {entry.name for entry in self.root.iterdir()} if self.root.is_dir() else set()
        single = {PRETRAINED, *(variant.folder for variant in ALL_VARIANTS)}
        if of_seeds and any(name in single or name.startswith(_UNFINISHED_PREFIX) for name in entries):
            raise TrainingError(
                f"'{self.root}' holds a run of one seed, and --seeds puts each seed into a folder of its own; "
                "choose another --output"
            )
        if not of_seeds and self.seeds():
            raise TrainingError(
                f"'{self.root}' holds a run of several seeds; pass --seeds with their number, "
                "or choose another --output"
            )

    def seeds(self) -> dict[int, Output]:
        """The folders of single seeds, by seed."""
        entries = sorted(self.root.iterdir()) if self.root.is_dir() else []
        found = ((_SEED_FOLDER.fullmatch(entry.name), entry) for entry in entries)
        return dict(sorted((int(match[1]), Output(entry)) for match, entry in found if match))

    def unfinished(self, folder: str) -> Path:
        """Where the checkpoints of a training belong until its folder is there."""
        return self.root / f"{_UNFINISHED_PREFIX}{folder}"

    def result(self, variant: Variant) -> dict[str, Any] | None:
        """The results of a finished variant, or None."""
        return read_json(self.root / variant.folder / RESULT_FILE)

    def results(self) -> dict[str, dict[str, Any]]:
        """The results of all finished variants, by folder."""
        found = {variant.folder: self.result(variant) for variant in ALL_VARIANTS}
        return {folder: result for folder, result in found.items() if result is not None}

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Makes the folder for the block, and removes it again when the block leaves nothing in it.

        Every process enters the block; the main one does the work.
        """
        made = processes.decided(self._make)
        try:
            yield
        finally:
            if processes.is_main():
                _remove_empty(made)

    @contextmanager
    def staged(self, folder: str) -> Iterator[Path]:
        """A folder to fill, which takes its name in the output only when the block ends well."""
        try:
            stage = Path(tempfile.mkdtemp(prefix=_STAGE_PREFIX, dir=self.root))
            # mkdtemp makes private folders; what is published gets ordinary permissions.
            (stage / folder).mkdir()
        except OSError as error:
            raise _unwritable(self.root, error) from error
        try:
            yield stage / folder
            _replace_folder(stage / folder, self.root / folder, stage / "old")
        except (OSError, SafetensorError) as error:
            raise _unwritable(self.root / folder, error) from error
        finally:
            shutil.rmtree(stage, ignore_errors=True)

    def write(self, name: str, fill: Callable[[Path], object]) -> None:
        """Writes one file through a temporary name; `fill` is given the path to write to."""
        # The suffix stays, since writers of images choose the format by it.
        temporary = self.root / f"{_STAGE_PREFIX}{name}"
        try:
            fill(temporary)
            temporary.replace(self.root / name)
        except OSError as error:
            raise _unwritable(self.root / name, error) from error
        finally:
            temporary.unlink(missing_ok=True)

    def _make(self) -> list[Path]:
        """Makes the folder, sweeps it, and gives the folders that were not there before."""
        made = [path for path in (self.root, *self.root.parents) if not path.exists()]
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._sweep()
        except OSError as error:
            raise _unwritable(self.root, error) from error
        return made

    def _sweep(self) -> None:
        """Removes what a killed run left behind, but for the checkpoints of what is not finished."""
        for stale in self.root.glob(f"{_STAGE_PREFIX}*"):
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
        for checkpoints in self.root.glob(f"{_UNFINISHED_PREFIX}*"):
            if (self.root / checkpoints.name.removeprefix(_UNFINISHED_PREFIX)).is_dir():
                shutil.rmtree(checkpoints)

    def _has_foreign_content(self) -> bool:
        if not self.root.is_dir() or (self.root / SUMMARY_FILE).exists():
            return False
        ours = {PRETRAINED, LOGS, *(variant.folder for variant in ALL_VARIANTS)}
        hidden = (_STAGE_PREFIX, _UNFINISHED_PREFIX)
        foreign = (entry.name for entry in self.root.iterdir() if not _SEED_FOLDER.fullmatch(entry.name))
        return any(name not in ours and not name.startswith(hidden) for name in foreign)


def seed_folder(seed: int) -> str:
    """The name of the folder of a single seed."""
    return f"seed-{seed}"


def require_same_configuration(output: Output, config: RunConfig, identities: dict[str, dict[str, Any]]) -> None:
    """Raises a TrainingError when finished variants in the folder come from another configuration.

    Args:
        output: the folder.
        config: the run; with `overwrite` its own variants are replaced and need not agree.
        identities: for every variant folder, what this run's configuration gives.
    """
    requested = {variant.folder for variant in config.variants}
    for folder, result in output.results().items():
        differing = differences(result.get("configuration", {}), identities[folder])
        if differing and not (config.overwrite and folder in requested):
            raise TrainingError(
                f"'{output.root}' holds {folder} of another configuration ({'; '.join(differing)}); "
                f"choose another --output{'' if folder not in requested else ' or pass --overwrite'}"
            )


def differences(there: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """The fields in which two configurations differ, in words."""
    keys = sorted(there.keys() | wanted.keys())
    return [f"{key} is {there.get(key)}, not {wanted.get(key)}" for key in keys if there.get(key) != wanted.get(key)]


def without_curves(result: Mapping[str, Any]) -> dict[str, Any]:
    """A variant's results without what is there to be plotted."""
    return {key: value for key, value in result.items() if not key.endswith(("_curve", "_timeline"))}


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object from a file, or None when there is no such file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise TrainingError(f"'{path}' cannot be read ({error}); remove it or choose another --output") from error


def write_json(path: Path, value: object) -> None:
    """Writes readable JSON, lists of numbers on one line each, with a final newline."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    text = _NUMBER_LIST.sub(lambda match: " ".join(match.group().split()), text)
    path.write_text(text + "\n", encoding="utf-8")


def _replace_folder(new: Path, target: Path, aside: Path) -> None:
    if target.exists():
        target.replace(aside)
    new.replace(target)


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _nearest_existing(path: Path) -> Path:
    # A path below a regular file does not exist either, and reading its parents ends at that file.
    return next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())


def _unwritable(path: Path, error: OSError | SafetensorError) -> TrainingError:
    return disk_error(path.parent, error, f"'{path.name}'", "the same command then goes on")
