"""Models of transformers from their configurations alone, and small inputs for them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bwsk_fx.errors import InspectError, first_line
from bwsk_fx.training import models

_TOKENS = 16
_PIXELS = 224
_SOUND = 16_000
_CHOICES = 2
_FACTORY = "write a function that returns (model, inputs), and inspect it as module:function"


@dataclass(frozen=True)
class Task:
    """What an architecture is for.

    Attributes:
        auto: The class of transformers that makes its models.
        mapping: The table of transformers that lists them.
        labels: What there is a label for: `sample`, `token`, `pixel`, `span` (a start and an end), or nothing.
    """

    auto: str
    mapping: str
    labels: str = ""


# In the order in which they are tried for a configuration that names no architecture.
TASKS = (
    Task("AutoModelForImageClassification", "MODEL_FOR_IMAGE_CLASSIFICATION", "sample"),
    Task("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM", "token"),
    Task("AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM", "token"),
    Task("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM", "token"),
    Task("AutoModelForSequenceClassification", "MODEL_FOR_SEQUENCE_CLASSIFICATION", "sample"),
    Task("AutoModelForTokenClassification", "MODEL_FOR_TOKEN_CLASSIFICATION", "token"),
    Task("AutoModelForQuestionAnswering", "MODEL_FOR_QUESTION_ANSWERING", "span"),
    Task("AutoModelForMultipleChoice", "MODEL_FOR_MULTIPLE_CHOICE", "sample"),
    Task("AutoModelForSemanticSegmentation", "MODEL_FOR_SEMANTIC_SEGMENTATION", "pixel"),
    Task("AutoModelForObjectDetection", "MODEL_FOR_OBJECT_DETECTION"),
    Task("AutoModelForDepthEstimation", "MODEL_FOR_DEPTH_ESTIMATION"),
    Task("AutoModelForVideoClassification", "MODEL_FOR_VIDEO_CLASSIFICATION", "sample"),
    Task("AutoModelForAudioClassification", "MODEL_FOR_AUDIO_CLASSIFICATION", "sample"),
    Task("AutoModelForSpeechSeq2Seq", "MODEL_FOR_SPEECH_SEQ_2_SEQ", "token"),
    Task("AutoModelForCTC", "MODEL_FOR_CTC"),
    Task("AutoModelForZeroShotImageClassification", "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION"),
    Task("AutoModelForMaskedImageModeling", "MODEL_FOR_MASKED_IMAGE_MODELING"),
    Task("AutoModelForPreTraining", "MODEL_FOR_PRETRAINING"),
    Task("AutoModel", "MODEL"),
)


def build(name: str, overrides: Mapping[str, int]) -> nn.Module:
    """Make a model in train mode, with random weights.

    Args:
        name: A built-in architecture, a folder or a model on the Hub; only its configuration is read.
        overrides: Fields of the configuration to set.

    Raises:
        BwskError: There is no such model, or transformers has no class for its architecture.
    """
    if name in models.BUILT_IN:
        return models.from_config(name, **overrides).train()
    config = models.load_config(name, **overrides)
    if hasattr(config, "use_cache"):
        # A cache is no tensor, which is all that a graph returns.
        config.use_cache = False
    return _made(name, config, _task_of(name, config)).train()


def inputs_of(name: str, model: nn.Module, batch: int) -> dict[str, Tensor]:
    """Return random inputs of a model of transformers, with labels where its task has plain ones.

    Args:
        name: What the user calls the model.
        model: A model that `build` returned.
        batch: The number of samples.

    Raises:
        InspectError: The model takes inputs of a kind that is not known here.
    """
    config: Any = model.config
    task = _task_of(name, config, type(model).__name__)
    taken = inspect.signature(model.forward).parameters
    try:
        inputs = {main: _made_up(name, main, config, task, batch) for main in _mains(model, taken)}
    except (RuntimeError, TypeError, ValueError) as error:
        why = f"{type(error).__name__}: {first_line(error)}"
        raise InspectError(f"model '{name}': its config.json gives no sizes of inputs ({why}); give --input") from error
    labels = _labels(task, config, inputs, batch) if "labels" in taken or task.labels == "span" else {}
    # From labels alone a decoder's input is made by a token that some configurations do not name.
    begun = labels and getattr(config, "decoder_start_token_id", None) is not None
    if getattr(config, "is_encoder_decoder", False) and not begun and "decoder_input_ids" in taken:
        labels = labels | {"decoder_input_ids": _tokens(config, (batch, _TOKENS))}
    return inputs | labels


def _task_of(name: str, config: Any, architecture: str | None = None) -> Task:
    listed = config.architectures or ()
    if not isinstance(listed, (list, tuple)):
        raise InspectError(f"model '{name}': architectures in its config.json is {listed!r}: expected a list of names")
    named = architecture or next(iter(listed), None)
    for task in TASKS:
        classes = _classes(task, config.model_type)
        if (named is None and classes) or named in classes:
            return task
    what = f"architecture {named}" if named else f"model type '{config.model_type}', which names no architecture,"
    raise InspectError(f"model '{name}': no class of transformers is known here for {what}; {_FACTORY}")


def _classes(task: Task, model_type: str) -> tuple[str, ...]:
    from transformers.models.auto import modeling_auto

    found = getattr(modeling_auto, f"{task.mapping}_MAPPING_NAMES").get(model_type, ())
    return (found,) if isinstance(found, str) else tuple(found)


def _made(name: str, config: Any, task: Task) -> Any:
    import transformers

    try:
        return getattr(transformers, task.auto).from_config(config)
    except Exception as error:  # a damaged configuration fails wherever its fields are first read
        why = f"{type(error).__name__}: {first_line(error)}"
        raise InspectError(f"model '{name}' cannot be made by {task.auto} ({why}); mend its config.json") from error


def _mains(model: Any, taken: Mapping[str, Any]) -> list[str]:
    """Return the names of the inputs that a model cannot do without."""
    main, config = model.main_input_name, model.config
    both = {"input_ids", "pixel_values"}
    pairs = hasattr(config, "text_config") and hasattr(config, "vision_config") and not model.can_generate()
    return sorted(both) if pairs and main in both and both <= taken.keys() else [main]


def _made_up(name: str, main: str, config: Any, task: Task, batch: int) -> Tensor:
    if main == "input_ids":
        choices = (_CHOICES,) if task.auto == "AutoModelForMultipleChoice" else ()
        return _tokens(config, (batch, *choices, _TOKENS))
    if main == "pixel_values":
        size, frames = _field(config, "image_size", _PIXELS), getattr(config, "num_frames", None)
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        return torch.randn(batch, *([frames] if frames else []), _field(config, "num_channels", 3), height, width)
    if main == "input_values":
        spectrum = (getattr(config, "max_length", None), getattr(config, "num_mel_bins", None))
        return torch.randn(batch, *(spectrum if all(spectrum) else (_SOUND,)))
    if main == "input_features" and hasattr(config, "max_source_positions"):
        return torch.randn(batch, config.num_mel_bins, 2 * config.max_source_positions)
    raise InspectError(f"model '{name}' takes '{main}', of which no example is made up here; {_FACTORY}")


def _tokens(config: Any, shape: tuple[int, ...]) -> Tensor:
    # Low numbers are often padding, begin and end.
    words = config.get_text_config().vocab_size
    return torch.randint(min(3, words - 1), words, shape)


def _field(config: Any, field: str, otherwise: Any) -> Any:
    """Return a field of a configuration, or of its part for images."""
    for part in (config, getattr(config, "vision_config", None)):
        if getattr(part, field, None) is not None:
            return getattr(part, field)
    return otherwise


def _labels(task: Task, config: Any, inputs: Mapping[str, Tensor], batch: int) -> dict[str, Tensor]:
    if task.labels == "span":
        return {name: torch.zeros(batch, dtype=torch.long) for name in ("start_positions", "end_positions")}
    if task.labels == "sample":
        dtype = torch.float32 if getattr(config, "num_labels", 2) == 1 else torch.long
        return {"labels": torch.zeros(batch, dtype=dtype)}
    if task.labels == "pixel":
        return {"labels": torch.zeros(batch, *inputs["pixel_values"].shape[-2:], dtype=torch.long)}
    if task.labels == "token":
        return {"labels": torch.zeros(inputs.get("input_ids", torch.empty(batch, _TOKENS)).shape, dtype=torch.long)}
    return {}
