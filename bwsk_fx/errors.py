"""The exceptions that the library raises; every message names the place, the cause and the way out."""

import re

# What fx's interpreter appends to the messages of errors.
_NODE = re.compile(r"While executing \(?%(\w+)")
_LINE = re.compile(r'File "([^"]+)", line (\d+)')


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, for a message of our own that names it as the cause."""
    return (str(error).strip().splitlines() or ["no message"])[0]


def place_of(error: BaseException) -> str:
    """Return the node at which fx's interpreter failed, and the user's line, as the start of a message; or nothing."""
    node, line = _NODE.search(str(error)), _LINE.search(str(error))
    where = f" (file {line[1]}:{line[2]})" if line else ""
    return f"node '{node[1]}'{where}: " if node else ""


class BwskError(Exception):
    """Base of every error that bwsk-fx raises on purpose."""


class CaptureError(BwskError):
    """A model could not be captured; names file, line and construct."""


class RuleError(BwskError):
    """A rule is missing, contradictory or was registered wrongly."""


class PassError(BwskError):
    """A graph is malformed before or after a pass; names the pass and the node."""


class PlanError(BwskError):
    """No plan satisfies the request, or a plan does not fit the graph."""


class RegionError(BwskError):
    """A reversible region was used in a way that it does not support."""


class TrainingError(BwskError):
    """A training run cannot start or go on: data, checkpoint or output folder."""


class InspectError(BwskError):
    """A model cannot be inspected: it is not found, or nothing is known of its inputs."""
