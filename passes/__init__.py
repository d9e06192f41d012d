"""Graph passes, and the pipeline that runs them."""

# Relative to the parent on purpose: a stray `import passes` fails instead of loading a second copy.
from ..passes.calm import Calm
from ..passes.find_regions import FindRegions
from ..passes.fuse_regions import FuseRegions
from ..passes.pipeline import Pass, PassError, PassPipeline, PassResult
from ..passes.propagate_values import PropagateValues
from ..passes.type_nodes import TypeNodes

__all__ = [
    "Calm",
    "FindRegions",
    "FuseRegions",
    "Pass",
    "PassError",
    "PassPipeline",
    "PassResult",
    "PropagateValues",
    "TypeNodes",
]
