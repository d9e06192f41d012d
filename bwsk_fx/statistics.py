"""Running statistics of batch norms: a region returns their new values, and writes them once it has run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor, nn

_KINDS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_NAMES = ("running_mean", "running_var", "num_batches_tracked")


def updates_statistics(module: nn.Module) -> bool:
    """Whether a module is a batch norm whose new running statistics are functions of the old ones and its input.

    Subclasses and replaced forward methods may do anything else, and a norm without `momentum` reads a count as a
    Python number.
    """
    if type(module) not in _KINDS or "forward" in vars(module) or not module.training:
        return False
    return bool(module.track_running_stats and module.momentum is not None and module.running_mean is not None)


def running_statistics(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[tuple[str, Tensor]]:
    """Yield the buffers, under their paths, that the batch norms among some modules write into in a training step."""
    for path, module in modules:
        if updates_statistics(module):
            for name in _NAMES:
                if (buffer := module._buffers[name]) is not None:
                    yield f"{path}.{name}", buffer
