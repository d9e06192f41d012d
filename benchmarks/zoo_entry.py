"""A model of the zoo: an architecture, what its configuration is given, and a batch of inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

BATCH = 4
WORDS = 99
TOKENS = 16
PIXELS = 32
SAMPLES = 1200


@dataclass(frozen=True)
class Entry:
    """One architecture of the zoo.

    Attributes:
        architecture: Class of transformers; or `timm:` and a model's name.
        inputs: Kind of its inputs, a key of `INPUTS`.
        options: What its configuration is given.
        implementation: What is chosen of attention and experts, as `from_config` takes it.
        study: Whether it is one of the seventeen of the published study.
        padding: Whether its inputs come with a mask of padding.
    """

    architecture: str
    inputs: str
    options: Mapping[str, Any] = field(default_factory=dict)
    implementation: Mapping[str, str] = field(default_factory=dict)
    study: bool = False
    padding: bool = False

    def make(self) -> nn.Module:
        """Make the model in train mode, with weights that hide nothing: no scale is one, no bias is zero.

        Dropout, stochastic depth and jitter are off: in float64 they would draw otherwise.

        Raises:
            ImportError: The architecture is timm's, which is not installed.
        """
        torch.manual_seed(0)
        model = self._of_timm() if self.architecture.startswith("timm:") else self._of_transformers()
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
        return model.train()

    def _of_transformers(self) -> nn.Module:
        import transformers

        made: Any = getattr(transformers, self.architecture)
        config = made.config_class(**self.options)
        for part in _parts(config):
            part.use_cache = False
            _switch_off_randomness(part)
        return made._from_config(config, **self.implementation)

    def _of_timm(self) -> nn.Module:
        import timm

        return timm.create_model(self.architecture.partition(":")[2], **self.options)

    def example(self) -> dict[str, Tensor]:
        """Return a batch of inputs, with labels where the model takes them."""
        generator = torch.Generator().manual_seed(0)
        inputs = INPUTS[self.inputs](generator)
        if self.padding:
            lengths = torch.tensor([TOKENS, TOKENS - 3, TOKENS - 1, TOKENS])
            inputs["attention_mask"] = (torch.arange(TOKENS) < lengths[:, None]).long()
        return inputs


def _parts(config: Any) -> Iterator[Any]:
    yield config
    for value in list(vars(config).values()):
        if hasattr(value, "to_dict"):
            yield from _parts(value)


def _switch_off_randomness(config: Any) -> None:
    for name, value in list(vars(config).items()):
        if any(word in name for word in ("drop", "jitter", "mask_time", "mask_feature")):
            if isinstance(value, float):
                setattr(config, name, 0.0)
            elif isinstance(value, list):
                setattr(config, name, [0.0] * len(value))


def _tokens(generator: torch.Generator) -> Tensor:
    return torch.randint(3, WORDS, (BATCH, TOKENS), generator=generator)


def _labels(generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, (BATCH,), generator=generator)


def _pixels(generator: torch.Generator, size: int = PIXELS) -> Tensor:
    return torch.randn(BATCH, 3, size, size, generator=generator)


def _pictures_and_texts(generator: torch.Generator) -> dict[str, Tensor]:
    tokens = _tokens(generator)
    return {"input_ids": tokens, "pixel_values": _pixels(generator), "attention_mask": torch.ones_like(tokens)}


INPUTS: dict[str, Any] = {
    "images": lambda generator: {"pixel_values": _pixels(generator), "labels": _labels(generator)},
    "larger images": lambda generator: {"pixel_values": _pixels(generator, 64), "labels": _labels(generator)},
    "bare images": lambda generator: {"pixel_values": _pixels(generator)},
    "timm images": lambda generator: {"x": _pixels(generator)},
    "noisy images": lambda generator: {
        "pixel_values": _pixels(generator),
        "noise": torch.rand(BATCH, 16, generator=generator),
    },
    "maps": lambda generator: {
        "pixel_values": _pixels(generator),
        "labels": torch.randint(0, 2, (BATCH, PIXELS, PIXELS), generator=generator),
    },
    "words": lambda generator: {"input_ids": _tokens(generator), "labels": _tokens(generator)},
    "texts": lambda generator: {"input_ids": _tokens(generator), "labels": _labels(generator)},
    "bare texts": lambda generator: {"input_ids": _tokens(generator)},
    "sounds": lambda generator: {
        "input_values": torch.randn(BATCH, SAMPLES, generator=generator),
        "labels": _labels(generator),
    },
    "spectra": lambda generator: {
        "input_values": torch.randn(BATCH, 32, 16, generator=generator),
        "labels": _labels(generator),
    },
    "features": lambda generator: {
        "input_features": torch.randn(BATCH, 16, 2 * TOKENS, generator=generator),
        "labels": _labels(generator),
    },
    "videos": lambda generator: {
        "pixel_values": torch.randn(BATCH, 4, 3, PIXELS, PIXELS, generator=generator),
        "labels": _labels(generator),
    },
    "series": lambda generator: {
        "past_values": torch.randn(BATCH, 32, 2, generator=generator),
        "future_values": torch.randn(BATCH, 8, 2, generator=generator),
    },
    "pictures and texts": _pictures_and_texts,
}
