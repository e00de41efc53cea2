"""The handwritten digits of scikit-learn: real images that need no download."""

from __future__ import annotations

from typing import Any

import torch
from typing_extensions import override

from lit_generative.data.image_data import ImageDataModule, LabelledImages
from lit_generative.data.splits import Splits, check_fraction, split_indices


class Digits(ImageDataModule):
    """1797 digits of 8 x 8 pixels in one channel, 10 classes; grey levels 0..16 become 0..255.

    Source: Alpaydin & Kaynak 1998, Optical Recognition of Handwritten Digits (the test part, as in scikit-learn).

    Args:
        test_fraction: Part of all images to test on, in ``[0, 1)``; there is no official split. ``val_fraction`` is
            taken from the rest.
        digit: Leave all others out: some 180 images, to train on from a model of all digits, say. None for all.
        kwargs: Arguments of :class:`~lit_generative.data.image_data.ImageDataModule`.

    Raises:
        ValueError: If ``test_fraction`` is not in ``[0, 1)``, or there is no such digit.
    """

    def __init__(self, test_fraction: float = 0.1, digit: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_fraction(self._name, "test_fraction", test_fraction)
        if digit is not None and digit not in range(10):
            raise ValueError(f"{self._name}: digit must be one of 0..9, got {digit}.")
        self.test_fraction = test_fraction
        self.digit = digit

    @property
    @override
    def num_classes(self) -> int:
        return 10

    @property
    @override
    def native_shape(self) -> tuple[int, int, int]:
        return (1, 8, 8)

    @override
    def load_splits(self) -> Splits:
        rest, test = development_and_test(self.test_fraction, self.split_seed)
        if self.digit is not None:
            rest, test = (part.take((part.labels == self.digit).nonzero().flatten()) for part in (rest, test))
        return self.split_images(rest, test)


def development_and_test(test_fraction: float, split_seed: int) -> tuple[LabelledImages, LabelledImages]:
    """All digits in two parts; arguments as in :class:`Digits`."""
    from sklearn.datasets import load_digits  # slow to import, and only needed here

    digits = load_digits()
    levels = torch.from_numpy(digits.images).unsqueeze(1)
    images = (levels * 255 / 16).round().to(torch.uint8)
    everything = LabelledImages(images, torch.from_numpy(digits.target).to(torch.int64))
    rest, test = split_indices(len(images), test_fraction, split_seed, "test")
    return everything.take(rest), everything.take(test)
