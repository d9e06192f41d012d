"""Plans as files: written after a step, and followed in another process without solving anything."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from bwsk_fx.errors import PlanError, first_line
from bwsk_fx.planning.integer_program import Problem
from bwsk_fx.planning.plan import Plan
from bwsk_fx.planning.solve import Solution, added_up

_FORMAT = 1


@dataclass(frozen=True)
class StoredPlans:
    """The plans of a file.

    Attributes:
        path: The file, for errors.
        plans: By region and fingerprint; a region has one for each kind of input.
    """

    path: str
    plans: Mapping[tuple[str, str], Mapping[str, Any]]

    def solution(self, region: str, fingerprint: str, problem: Problem) -> Solution:
        """Return the stored choice for a region as a solution of its problem.

        Raises:
            PlanError: The file has none for this region and kind of input.
        """
        plan = self.plans.get((region, fingerprint))
        if plan is None:
            known = sorted({name for name, _ in self.plans})
            what = "plans it for other inputs, options or versions" if region in known else f"has plans for {known}"
            raise PlanError(f"region {region}: {self.path} {what}; write it anew with save_plan after such a step")
        try:
            return _solution(plan, problem)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            what = f"{type(error).__name__}: {first_line(error)}"
            raise PlanError(
                f"region {region}: the plan in {self.path} is damaged ({what}); write it anew with save_plan"
            ) from error


def write_plans(path: str | Path, plans: Iterable[tuple[str, Plan]]) -> None:
    """Write the plans of regions, by name, as JSON; to a temporary name first, so that no half of a file is left.

    Raises:
        PlanError: The file cannot be written.
    """
    entries = [{"region": region, "plan": plan.to_json()} for region, plan in plans]
    content = {"format": _FORMAT, "torch": torch.__version__, "regions": entries}
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise PlanError(f"{path} cannot be written: {error.strerror}; name a file in a folder that exists") from error


@lru_cache(maxsize=8)
def _read(path: str, changed: int) -> StoredPlans:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        entries = {(entry["region"], entry["plan"]["fingerprint"]): entry["plan"] for entry in content["regions"]}
        version = content["format"]
    except OSError as error:
        raise PlanError(f"the plan {path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        what = f"{type(error).__name__}: {first_line(error)}"
        raise PlanError(f"{path} is no file of plans ({what}); write it with save_plan") from error
    if version != _FORMAT:
        raise PlanError(f"{path} has format {version!r}, and this version reads {_FORMAT}; write it anew")
    return StoredPlans(path, entries)


def read_plans(path: str) -> StoredPlans:
    """Read a file of plans; an unchanged file is read once.

    Raises:
        PlanError: The file is missing, or is something else.
    """
    try:
        changed = Path(path).stat().st_mtime_ns
    except OSError as error:
        raise PlanError(f"the plan {path} cannot be read: {error.strerror}") from error
    return _read(str(path), changed)


def _solution(plan: Mapping[str, Any], problem: Problem) -> Solution:
    values = {value.name: value for value in problem.classes}
    ways = {_way(one.head.name, one.rule, (tail.name for tail in one.tails)): one for one in problem.derivations}
    kept = tuple(values[row["name"]] for row in plan["values"] if row["action"] == "keep")
    derived = (row for row in plan["values"] if row["action"] != "keep")
    used = tuple(ways[_way(row["name"], row["rule"], row["sources"])] for row in derived)
    return added_up(problem, kept, used, plan["gap"], "file")


def _way(head: str, rule: str, tails: Iterable[str]) -> tuple[str, ...]:
    return (head, rule, *tails)
