"""Three digits in one image: a thousand modes that a classifier can count."""

from __future__ import annotations

from typing import Any

import torch
from typing_extensions import override

from lit_generative.data.digits import development_and_test
from lit_generative.data.image_data import ImageDataModule, LabelledImages
from lit_generative.data.splits import Splits, check_fraction
from lit_generative.tensor_ops import derive_seed


class StackedDigits(ImageDataModule):
    """Random triples of :class:`~lit_generative.data.digits.Digits` as red, green and blue: 8 x 8 pixels, 1000 classes.

    The class is the number that the digits of red, green and blue spell. The triples depend on ``split_seed`` only;
    digits of the test part are in no other.

    Source: the stacked MNIST of Metz et al. 2017, sec. 3.3.1 (arXiv:1611.02163), with scikit-learn's digits.

    Args:
        num_samples: Number of triples, all splits together.
        test_fraction: Part of all digits, and of all triples, to test on, in ``[0, 1)``. ``val_fraction`` is taken from
            the other triples.
        kwargs: Arguments of :class:`~lit_generative.data.image_data.ImageDataModule`.

    Raises:
        ValueError: If ``num_samples`` is below 1, ``test_fraction`` not in ``[0, 1)``, or so small that it leaves no
            digit to test on but triples of them.
    """

    def __init__(self, num_samples: int = 50_000, test_fraction: float = 0.1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if num_samples < 1:
            raise ValueError(f"{self._name}: num_samples must be at least 1, got {num_samples}.")
        check_fraction(self._name, "test_fraction", test_fraction)
        self.num_samples, self.test_fraction = num_samples, test_fraction

    @property
    @override
    def num_classes(self) -> int:
        return 1000

    @property
    @override
    def native_shape(self) -> tuple[int, int, int]:
        return (3, 8, 8)

    @override
    def load_splits(self) -> Splits:
        development, test = development_and_test(self.test_fraction, self.split_seed)
        num_test = round(self.num_samples * self.test_fraction)
        return self.split_images(
            self._stack(development, self.num_samples - num_test, "development"), self._stack(test, num_test, "test")
        )

    def _stack(self, digits: LabelledImages, num: int, part: str) -> LabelledImages:
        if num and not len(digits.labels):
            raise ValueError(
                f"StackedDigits: test_fraction={self.test_fraction} leaves no digit for {num} triples of the {part} "
                "part. Set it to 0, or larger."
            )
        generator = torch.Generator().manual_seed(derive_seed("stacked digits", part, self.split_seed))
        chosen = torch.randint(max(1, len(digits.labels)), (num, 3), generator=generator)
        images, labels = digits.images[chosen], digits.labels[chosen]
        return LabelledImages(images.squeeze(2), labels @ torch.tensor([100, 10, 1]))
