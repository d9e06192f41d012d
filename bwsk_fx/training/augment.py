"""Random crops and mirror images of a batch of training images."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

# Of the crop: 256 pixels for crops of 224.
ENLARGEMENT = 8 / 7


def random_crop_and_flip(images: Tensor) -> Tensor:
    """Enlarges images, crops each at random to its former size, and mirrors half of them left to right.

    Random numbers are drawn from PyTorch's generator of the CPU, wherever the images are.

    Args:
        images: batch, channels, height and width; any range of values.
    """
    height, width = images.shape[-2:]
    return _augmentation(height, width)(images)


def _augmentation(height: int, width: int) -> Callable[[Tensor], Tensor]:
    # Kornia takes long to import, and most runs augment nothing.
    from kornia.augmentation import AugmentationSequential, RandomCrop, RandomHorizontalFlip, Resize

    enlarged = round(ENLARGEMENT * height), round(ENLARGEMENT * width)
    return AugmentationSequential(Resize(enlarged), RandomCrop((height, width)), RandomHorizontalFlip(p=0.5))
