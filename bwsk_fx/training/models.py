"""Models and image processors: built-in architectures, checkpoints, and the two kinds of start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from bwsk_fx.errors import TrainingError

TINY_VIT = "vit-tiny-digits"

# Built-in architectures, as arguments of ViTConfig; they need no network.
BUILT_IN: dict[str, dict[str, Any]] = {
    "vit-base": {},
    TINY_VIT: {
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 256,
        "image_size": 16,
        "patch_size": 4,
    },
}


def load_config(name: str, **overrides: Any) -> Any:
    """The configuration of a built-in architecture, a local checkpoint or a model on the Hub.

    Args:
        name: a key of `BUILT_IN`, a folder, or a Hub id.
        **overrides: configuration fields to set.

    Raises:
        TrainingError: there is no such model.
    """
    from transformers import AutoConfig, ViTConfig

    if name in BUILT_IN:
        return ViTConfig(**(BUILT_IN[name] | overrides))
    config = _loaded(name, lambda: AutoConfig.from_pretrained(name))
    for field, value in overrides.items():
        if not hasattr(config, field):
            raise TrainingError(f"model '{name}': its {type(config).__name__} has no field '{field}'")
        setattr(config, field, value)
    return config


def load_processor(name: str) -> Any:
    """The image processor that belongs to a model; a built-in architecture gets one for its image size."""
    if name in BUILT_IN:
        return _vit_processor(load_config(name).image_size)
    return _loaded(name, lambda: _processor_of_checkpoint(name))


def from_scratch(name: str, labels: tuple[str, ...]) -> Any:
    """An image classifier with random weights; seed the random state before."""
    return from_config(name, **_label_fields(labels))


def from_config(name: str, **overrides: Any) -> Any:
    """An image classifier with a model's architecture and random weights; only configuration files are read."""
    from transformers import AutoModelForImageClassification

    config = load_config(name, **overrides)
    return _loaded(name, lambda: AutoModelForImageClassification.from_config(config))


def from_checkpoint(name: str, labels: tuple[str, ...]) -> Any:
    """A checkpoint with a classifier for these labels; a head of another size is drawn anew."""
    from transformers import AutoModelForImageClassification

    if name in BUILT_IN:
        raise TrainingError(
            f"model '{name}' is an architecture without weights and cannot be fine-tuned; "
            "name a checkpoint, or train with --experiments scratch"
        )
    fields = _label_fields(labels)
    return _loaded(
        name,
        lambda: AutoModelForImageClassification.from_pretrained(name, ignore_mismatched_sizes=True, **fields),
    )


def _label_fields(labels: tuple[str, ...]) -> dict[str, Any]:
    return {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}


def _vit_processor(size: int) -> Any:
    from transformers import ViTImageProcessorPil

    half = [0.5, 0.5, 0.5]
    return ViTImageProcessorPil(size={"height": size, "width": size}, image_mean=half, image_std=half)


def _processor_of_checkpoint(name: str) -> Any:
    # The PIL backend gives the same pixels with and without torchvision. AutoImageProcessor is asked only when it has
    # to be: until transformers 5.17 at least it insists on torchvision for every backend.
    from transformers import AutoImageProcessor, ViTImageProcessorPil

    settings, _ = ViTImageProcessorPil.get_image_processor_dict(name)
    kind = settings.get("image_processor_type") or settings.get("feature_extractor_type") or "ViT"
    if kind.startswith("ViT"):
        return ViTImageProcessorPil.from_dict(settings)
    return AutoImageProcessor.from_pretrained(name, backend="pil")


def _loaded(name: str, load: Callable[[], Any]) -> Any:
    """Runs a loader of transformers and turns its failures into one line."""
    if _looks_local(name) and not Path(name).is_dir():
        raise TrainingError(f"checkpoint '{name}': no such folder")
    try:
        return load()
    except Exception as error:  # a damaged configuration fails wherever its fields are first read
        raise TrainingError(
            f"checkpoint '{name}' cannot be loaded ({_first_sentence(error)}); name a folder with config.json and "
            f"model.safetensors, a model on the Hugging Face Hub, or one of {', '.join(BUILT_IN)}"
        ) from error


def _looks_local(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def _first_sentence(error: Exception) -> str:
    # Messages of the Hub's client go on with advice about logging in, which is not the point here.
    sentences = str(error).strip().replace("\n", " ").split(". ")
    sentence = sentences[0] or type(error).__name__
    return sentence if isinstance(error, (ImportError, OSError, ValueError)) else f"{type(error).__name__}: {sentence}"
