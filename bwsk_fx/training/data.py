"""Image data sets in one shape: three splits with an `image` and a `label` column, seeded and named."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bwsk_fx.errors import TrainingError
from bwsk_fx.training.config import DIGITS, published

TEST_FRACTION = 0.2
# Processed once and kept when they take no more than this; otherwise images are processed as they are read.
MATERIALIZE_BYTES = 256 * 2**20

_HUB_IDS = {"cifar10": "uoft-cs/cifar10"}


@dataclass(frozen=True)
class Splits:
    """A data set ready to train on; each split has the columns `image` and `label`."""

    name: str
    train: Any
    validation: Any
    test: Any
    labels: tuple[str, ...]

    def with_train(self, train: Any) -> Splits:
        """The same data with other training samples."""
        return Splits(self.name, train, self.validation, self.test, self.labels)


def load_splits(data: str, seed: int = 0, train_limit: int | None = None) -> Splits:
    """Loads a data set and cuts it into train, validation and test splits.

    Splits that the data set has are used; a missing test split is a fifth of the training split, a missing
    validation split a tenth of what remains, as published. The cut depends on the seed alone.

    Args:
        data: `digits`, `cifar10`, a folder with one sub-folder of images per class, or a Hub id.
        seed: of the cut.
        train_limit: keep at most this many training samples.

    Raises:
        TrainingError: the data set does not exist, cannot be reached, or has no image or class column.
    """
    splits = _cut(data, digits() if data == DIGITS else _load(data), seed)
    if train_limit is not None and train_limit < len(splits.train):
        splits = splits.with_train(splits.train.select(range(train_limit)))
    return splits


def digits() -> Any:
    """scikit-learn's 1,797 handwritten digits, 8 by 8 pixels, as a `datasets.DatasetDict` with one split."""
    import datasets
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    bunch = load_digits()
    # Ink comes in 17 shades, 0 to 16.
    pixels = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(digit) for digit in range(10)])}
    )
    columns = {"image": [Image.fromarray(image) for image in pixels], "label": bunch.target.tolist()}
    return datasets.DatasetDict({"train": datasets.Dataset.from_dict(columns, features=features)})


def only_labels(split: Any, labels: range) -> Any:
    """The samples of a split whose label is one of `labels`."""
    chosen = [index for index, label in enumerate(split["label"]) if label in labels]
    return split.select(chosen)


def as_tensors(split: Any, processor: Any) -> Any:
    """A split as a map-style data set of `pixel_values` and `labels`.

    Small splits are processed once and kept, since decoding would otherwise take as long as a small model's step.
    """

    def transform(batch: dict[str, list[Any]]) -> dict[str, Any]:
        images = [image.convert("RGB") for image in batch["image"]]
        return {"pixel_values": processor(images, return_tensors="pt")["pixel_values"], "labels": batch["label"]}

    if len(split) * _bytes_per_image(split, transform) > MATERIALIZE_BYTES:
        return split.with_transform(transform)
    samples: list[dict[str, Any]] = []
    for batch in split.iter(batch_size=256):
        columns = transform(batch)
        pairs = zip(columns["pixel_values"], columns["labels"], strict=True)
        samples += [{"pixel_values": pixels, "labels": label} for pixels, label in pairs]
    return samples


def _bytes_per_image(split: Any, transform: Any) -> int:
    return int(transform(split[:1])["pixel_values"].nbytes)


def _load(data: str) -> Any:
    import datasets

    try:
        if _is_path(data):
            if not Path(data).is_dir():
                raise TrainingError(f"data set '{data}': no such folder")
            return datasets.load_dataset("imagefolder", data_dir=data)
        return datasets.load_dataset(_HUB_IDS.get(data, data))
    except TrainingError:
        raise
    except Exception as error:  # the datasets library raises whatever its back ends raise
        raise TrainingError(
            f"data set '{data}' cannot be loaded ({_first_line(error)}); --data takes digits, cifar10, "
            "a folder with one sub-folder of images per class, or the id of a data set on the Hugging Face Hub"
        ) from error


def _is_path(data: str) -> bool:
    return Path(data).exists() or data.startswith((".", "/", "~"))


def _cut(name: str, data: Any, seed: int) -> Splits:
    data = {split: _canonical(name, data[split]) for split in data}
    if "train" not in data:
        raise TrainingError(f"data set '{name}' has no split 'train', only {', '.join(data)}")
    train, test = data["train"], data.get("test")
    validation = data.get("validation")
    if test is None:
        train, test = _split_off(train, TEST_FRACTION, seed)
    if validation is None:
        train, validation = _split_off(train, published()["validation_fraction"], seed)
    return Splits(name, train, validation, test, tuple(train.features["label"].names))


def _split_off(split: Any, fraction: float, seed: int) -> tuple[Any, Any]:
    halves = split.train_test_split(test_size=fraction, seed=seed)
    return halves["train"], halves["test"]


def _canonical(name: str, split: Any) -> Any:
    import datasets

    image = _column_of(name, split, datasets.Image, "an image")
    label = _column_of(name, split, datasets.ClassLabel, "a class label")
    renames = {old: new for old, new in ((image, "image"), (label, "label")) if old != new}
    return split.select_columns([image, label]).rename_columns(renames)


def _column_of(name: str, split: Any, kind: type, words: str) -> str:
    found = [column for column, feature in split.features.items() if isinstance(feature, kind)]
    if not found:
        raise TrainingError(f"data set '{name}' has no column that holds {words}: {', '.join(split.features)}")
    return found[0]


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
