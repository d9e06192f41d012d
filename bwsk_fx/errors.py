"""The exceptions that the library raises; every message names the place, the cause and the way out."""


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, for a message of our own that names it as the cause."""
    return (str(error).strip().splitlines() or ["no message"])[0]


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
