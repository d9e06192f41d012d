"""The reports that `bwsk-fx calm` shows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bwsk_fx.calm import analyze_calm
from bwsk_fx.certify_axes import certify_axes
from bwsk_fx.errors import BwskError
from bwsk_fx.inspection.sources import Request, load
from bwsk_fx.report.calm import CalmReport
from bwsk_fx.report.calm_sharding import Sharding


@dataclass(frozen=True)
class Wanted:
    """What a user wants to see.

    Attributes:
        model: The name of the model.
        axis: The axis that is shown in detail.
        devices: How many devices a training step is sharded for.
        batch: How many samples the step has.
        certify: Whether the claims are run.
        picture: Where a picture of the partitions goes.
    """

    model: str
    axis: str | None = None
    devices: int | None = None
    batch: int | None = None
    certify: bool = False
    picture: Path | None = None


def check(devices: int | None, **options: float | None) -> None:
    """Refuse options that say nothing without `--devices`.

    Raises:
        BwskError: One of them is given, and `--devices` is not.
    """
    given = [name for name, value in options.items() if value is not None]
    if given and devices is None:
        raise BwskError(f"--{given[0].replace('_', '-')} is for --devices, which is missing")


def reports(wanted: Wanted, request: Request) -> dict[str, Any]:
    """Return the whole report as `calm`, and, if asked for, an axis, a sharding, and certificates by those names.

    The picture is written, if there is to be one.

    Raises:
        BwskError: See `sources.load`; or the graph has no such axis, or no inputs to certify on, or the picture cannot
            be written.
    """
    # The same weights every time, and so the same certificates.
    torch.manual_seed(0)
    source = load(wanted.model, request)
    calm = analyze_calm(source.graph)
    found: dict[str, Any] = {"calm": calm}
    if wanted.axis is not None:
        try:
            found["axis"] = calm.axis(wanted.axis)
        except KeyError as error:
            raise BwskError(error.args[0]) from error
    if wanted.devices is not None:
        found["sharding"] = calm.sharding(wanted.devices, wanted.batch)
    if wanted.certify:
        found["certificates"] = certify_axes(source.graph, source.inputs_for("--certify", wanted.model))
    if wanted.picture is not None:
        save_picture(calm, wanted.picture)
    return found


def save_picture(report: CalmReport, path: Path) -> None:
    """Write the picture.

    Raises:
        BwskError: The file cannot be written.
    """
    try:
        report.save_svg(path)
    except OSError as error:
        raise BwskError(f"--svg: {path} cannot be written: {error.strerror}") from error


def shown(
    found: dict[str, Any], bandwidth: float | None, speed: float | None
) -> tuple[dict[str, Any], dict[str, float]]:
    """Return the reports that are to be shown, by their keys in the JSON, and the times that rates were given for.

    Args:
        found: What `reports` returned.
        bandwidth: GB/s that a device sends.
        speed: TFLOP/s that a device computes.
    """
    kept = {name: report for name, report in found.items() if name != "calm" or "axis" not in found}
    sharding: Sharding | None = found.get("sharding")
    if sharding is None:
        return kept, {}
    computing, sending = sharding.seconds((bandwidth or 1.0) * 1e9, (speed or 1.0) * 1e12)
    seconds = {} if speed is None else {"seconds_computing": computing}
    return kept, seconds if bandwidth is None else {**seconds, "seconds_sending": sending}
