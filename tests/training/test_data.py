import numpy as np
import pytest
import torch
from PIL import Image

from bwsk_fx.errors import TrainingError
from bwsk_fx.training import data, models
from bwsk_fx.training.augment import random_crop_and_flip
from bwsk_fx.training.data import as_tensors, load_splits, only_labels


@pytest.fixture
def folder(tmp_path):
    """A folder with 30 images of each of two colours."""
    for name, shade in (("dark", 20), ("light", 230)):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for index in range(30):
            pixels = np.full((6, 6, 3), shade + index % 5, dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{index}.png")
    return tmp_path / "pictures"


def _fingerprint(split) -> list[int]:
    return [int(np.asarray(image).astype(int).sum()) for image in split["image"]]


def test_digits_are_cut_as_published():
    splits = load_splits("digits")
    sizes = [len(split) for split in (splits.train, splits.validation, splits.test)]
    assert sizes == [1293, 144, 360]
    assert splits.labels == tuple("0123456789")
    assert splits.train[0]["image"].size == (8, 8)


def test_digits_keep_scikit_learns_shades():
    from sklearn.datasets import load_digits

    image = np.asarray(data.digits()["train"][17]["image"])
    assert np.array_equal(np.round(image / 255 * 16), load_digits().images[17])


def test_the_cut_depends_on_the_seed_alone():
    first, again, other = (load_splits("digits", seed) for seed in (0, 0, 1))
    assert _fingerprint(first.test) == _fingerprint(again.test)
    assert _fingerprint(first.test) != _fingerprint(other.test)


def test_train_limit_leaves_the_other_splits_alone():
    splits = load_splits("digits", train_limit=50)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (50, 144, 360)


def test_a_folder_is_a_data_set(folder):
    splits = load_splits(str(folder))
    assert splits.labels == ("dark", "light")
    assert [len(split) for split in (splits.train, splits.validation, splits.test)] == [43, 5, 12]
    shades = {label: np.asarray(image).mean() for image, label in zip(*splits.train[:].values(), strict=True)}
    assert shades[0] < 30 < 200 < shades[1]


def test_columns_of_other_names_are_found():
    import datasets

    features = datasets.Features(
        {"id": datasets.Value("int64"), "img": datasets.Image(), "kind": datasets.ClassLabel(names=["a", "b"])}
    )
    images = [Image.new("RGB", (4, 4))] * 20
    split = datasets.Dataset.from_dict({"id": range(20), "img": images, "kind": [0, 1] * 10}, features=features)
    splits = data._cut("mine", datasets.DatasetDict({"train": split}), seed=0)
    assert splits.train.column_names == ["image", "label"]
    with pytest.raises(TrainingError, match="'mine' has no column that holds a class label: img"):
        data._cut("mine", datasets.DatasetDict({"train": split.select_columns("img")}), seed=0)


def test_only_labels():
    chosen = only_labels(load_splits("digits").validation, range(5))
    assert set(chosen["label"]) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("materialize", [True, False])
def test_samples_are_pixels_and_labels(monkeypatch, materialize):
    if not materialize:
        monkeypatch.setattr(data, "MATERIALIZE_BYTES", 0)
    split = load_splits("digits").validation
    samples = as_tensors(split, models.load_processor("vit-tiny-digits"))
    assert isinstance(samples, list) == materialize
    assert len(samples) == len(split)
    pixels, label = samples[3]["pixel_values"], samples[3]["labels"]
    assert pixels.shape == (3, 16, 16)
    assert pixels.dtype == torch.float32
    assert -1 <= pixels.min() < -0.9 < 0.5 < pixels.max() <= 1
    assert label == split[3]["label"]


def test_augmented_images_are_crops_of_enlarged_ones_and_half_of_them_mirrored():
    ramp = torch.arange(14.0).expand(64, 3, 14, 14) + 100 * torch.arange(14.0)[:, None]
    torch.manual_seed(0)
    augmented = random_crop_and_flip(ramp)
    assert augmented.shape == ramp.shape
    across, down = augmented[:, 0, 5].diff(dim=1)[:, 1:-1], augmented[:, 0, :, 5].diff(dim=1)[:, 1:-1]
    # 16 pixels are made of 14, so neighbours differ by about 7/8, to the left in half of the images and never upwards.
    assert torch.allclose(across.abs(), torch.tensor(0.875), atol=0.02)
    assert torch.allclose(down, torch.tensor(87.5), atol=2)
    assert 16 < int((across[:, 0] < 0).sum()) < 48
    # A crop of 14 out of 16 has three places in each direction.
    assert len(augmented[:, 0].amin(dim=2).amin(dim=1).div(80).round().unique()) == 3


def test_augmentation_draws_from_the_global_generator_alone(monkeypatch):
    images = torch.rand(8, 3, 16, 16)
    torch.manual_seed(0)
    first, second = random_crop_and_flip(images), random_crop_and_flip(images)
    np.random.seed(3)
    torch.manual_seed(0)
    assert torch.equal(random_crop_and_flip(images), first)
    assert not torch.equal(first, second)


def test_unknown_data_sets_are_one_line(tmp_path):
    with pytest.raises(TrainingError, match=r"no such folder$"):
        load_splits(str(tmp_path / "missing"))
    with pytest.raises(TrainingError, match=r"'nobody/nothing' cannot be loaded.*--data takes digits"):
        load_splits("nobody/nothing")
