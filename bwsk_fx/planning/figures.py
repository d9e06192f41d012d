"""What has been measured on a device, in a file of the user's cache folder.

The file is `figures-….json` in `$BWSK_FX_CACHE`, else in `$XDG_CACHE_HOME/bwsk-fx`, else in `~/.cache/bwsk-fx`. There
is one for each device, number of threads, PyTorch version and precision of float32 products.
"""

from __future__ import annotations

import json
import os
import platform
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bwsk_fx.errors import first_line
from bwsk_fx.planning.cost import DeviceProfile

# Part of the file's name; to be raised when what the figures mean changes.
_FORMAT = 1
_UNREADABLE = (OSError, ValueError, TypeError, KeyError, AttributeError)


class FigureFile(dict[str, float]):
    """Measured seconds by call, and the device's profile, in a JSON file to which each new figure goes at once.

    A file that cannot be read or written leads to one warning; the figures then last as long as the process.

    Attributes:
        path: The file; None keeps everything in memory.
        profile: The device's profile; None where none is known yet.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.profile: DeviceProfile | None = None
        try:
            self.profile, calls = _read(path) if path else (None, {})
            self.update(calls)
        except _UNREADABLE as error:
            self._warn("read", error)

    def __setitem__(self, call: str, seconds: float) -> None:
        super().__setitem__(call, seconds)
        self._save()

    def keep(self, profile: DeviceProfile) -> None:
        """Remember the device's profile."""
        self.profile = profile
        self._save()

    def _save(self) -> None:
        if self.path is None:
            return
        try:
            self._write(self.path)
        except OSError as error:
            self._warn("written", error)
            self.path = None

    def _write(self, path: Path) -> None:
        try:
            others = _read(path)[1]  # of a process beside this one
        except _UNREADABLE:
            others = {}
        content = {"profile": self.profile and asdict(self.profile), "calls": {**others, **self}}
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        partial.write_text(json.dumps(content, indent=0), encoding="utf-8")
        partial.replace(path)

    def _warn(self, done: str, error: Exception) -> None:
        warnings.warn(
            f"{self.path} cannot be {done} ({type(error).__name__}: {first_line(error)}): what calls cost on this "
            "device is measured anew; remove the file, or let BWSK_FX_CACHE name a folder that can be written to",
            stacklevel=3,
        )


def _read(path: Path) -> tuple[DeviceProfile | None, dict[str, float]]:
    """Return the profile and the calls of a file; neither where there is no file."""
    if not path.exists():
        return None, {}
    content = json.loads(path.read_text(encoding="utf-8"))
    profile = content["profile"] and DeviceProfile(**_figures(content["profile"]))
    return profile, _figures(content["calls"])


def _figures(content: Mapping[str, Any]) -> dict[str, float]:
    return {str(name): _positive(value) for name, value in content.items()}


def _positive(value: Any) -> float:
    if not isinstance(value, float) or not value > 0.0:
        raise ValueError(f"{value!r} is no figure: expected a number above zero")
    return value


def figures_path(device: torch.device) -> Path | None:
    """Return the file of a device's figures for the current settings; None where the user has no home folder."""
    name = f"{_device_name(device)} {torch.get_num_threads()} threads torch {torch.__version__}"
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"figures {_FORMAT} {name} {torch.get_float32_matmul_precision()}")
    try:
        return _folder() / f"{name}.json"
    except RuntimeError:
        return None


def _folder() -> Path:
    if own := os.environ.get("BWSK_FX_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bwsk-fx"


def _device_name(device: torch.device) -> str:
    if device.type != "cpu":
        own = getattr(torch.get_device_module(device), "get_device_name", None)
        return device.type if own is None else str(own(device))
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{next(iter(names), platform.processor() or platform.machine())} {torch.backends.cpu.get_cpu_capability()}"
