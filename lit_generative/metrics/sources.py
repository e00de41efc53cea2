"""Where images to be scored come from: data modules, folders, arrays, models. Each answers indices with pixels."""

from __future__ import annotations

import hashlib
import warnings
from abc import ABC, abstractmethod
from typing import Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from lit_generative.metrics.processes import process_index
from lit_generative.recipe import class_path
from lit_generative.tensor_ops import evaluating, from_uint8, sample_generators, to_uint8
from lit_generative.types import (
    DescribesSampling,
    Split,
    SupportsExamples,
    SupportsLabels,
    SupportsReference,
    SupportsSampling,
    draws_from_images,
)

ONE_LEVEL = 2 / 255
PROBES = 256


class ImageSource(ABC):
    """A numbered set of images; which process asks for which does not matter."""

    count: int
    """Number of images."""

    @abstractmethod
    def pixels(self, indices: Tensor) -> Tensor:
        """The images at ``indices``, ``(N,)`` int64: uint8 ``(N, C, H, W)``.

        Raises:
            ValueError: If one is damaged; it is named.
        """

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """Plain data that says which images these are."""

    def fingerprint(self) -> str:
        """Hash of the number of images and of up to 256 of them, evenly spaced: the data after its transform."""
        digest = hashlib.sha256(str(self.count).encode())
        probes = torch.linspace(0, self.count - 1, min(PROBES, self.count)).round().long()
        for part in probes.split(64):
            pixels = self.pixels(part)
            digest.update(f"{tuple(pixels.shape[1:])}".encode())
            digest.update(pixels.contiguous().numpy().tobytes())
        return digest.hexdigest()


class DataModuleImages(ImageSource):
    """A split of a data module.

    Args:
        data: The data module, set up.
        split: Which part.

    Raises:
        TypeError: If the data module does not give single examples.
        ValueError: If the split is empty.
    """

    def __init__(self, data: object, split: Split) -> None:
        if not isinstance(data, SupportsReference):
            raise TypeError(
                f"{type(data).__name__} gives no images to compare with. It needs num_examples(split) and "
                "examples(split, indices), as the data modules of lit_generative have."
            )
        self.data, self.split, self.count = data, split, data.num_examples(split)
        self._quantize = Quantizer(f"{type(data).__name__}, {split} split")
        if self.count == 0:
            raise ValueError(f"{type(data).__name__}: the split {split!r} is empty. Compare with another one.")

    @override
    def pixels(self, indices: Tensor) -> Tensor:
        images = self.data.examples(self.split, indices)
        return images if images.dtype == torch.uint8 else self._quantize(images, indices)

    def labels(self, indices: Tensor) -> Tensor:
        """Class labels ``(N,)`` int64 of the examples at ``indices``, ``(N,)``.

        Raises:
            TypeError: If the data module gives none.
        """
        if not isinstance(self.data, SupportsLabels):
            raise TypeError(
                f"{type(self.data).__name__} gives no labels of its images. It needs labels(split, indices)."
            )
        return self.data.labels(self.split, indices)

    @override
    def record(self) -> dict[str, Any]:
        return {
            "data": class_path(type(self.data)),
            "split": self.split,
            "count": self.count,
            "fingerprint": self.fingerprint(),
        }


class ModelSamples(ImageSource):
    """Samples of a model: sample ``i`` is a function of the seed and ``i``.

    Args:
        module: Has ``sample``; drawn from in evaluation mode.
        count: How many samples.
        seed: Seed of noise and labels.
        shown: Images, and their labels, that a model draws from which is shown some, as in super-resolution: sample
            ``i`` is made of number ``i``, and the first follows the last. Other models leave them alone.

    Raises:
        TypeError: If the module cannot sample.
        ValueError: If ``count`` is below 2, or a model that draws from images is given none.
    """

    def __init__(self, module: nn.Module, count: int, seed: int = 0, shown: DataModuleImages | None = None) -> None:
        if not isinstance(module, SupportsSampling):
            raise TypeError(f"{type(module).__name__} has no sample() and num_classes to draw from.")
        if count < 2:
            raise ValueError(f"ModelSamples: a score needs at least 2 samples, got {count}.")
        if draws_from_images(module) and shown is None:
            raise ValueError(
                f"ModelSamples: this {type(module).__name__} draws from images, and was given none. Draw with litgen "
                "sample --low_res IMAGES --format png, and score what it writes by litgen evaluate --images; during "
                "training FIDEvaluation gives it those of the validation data."
            )
        self.module, self.count, self.seed = module, count, seed
        self.shown = shown if draws_from_images(module) else None
        self._quantize = Quantizer(type(module).__name__)

    @override
    def pixels(self, indices: Tensor) -> Tensor:
        generators = [g for i in indices.tolist() for g in sample_generators(self.seed, 1, start=i)]
        with torch.no_grad(), evaluating(self.module):
            if self.shown is None:
                samples = self.module.sample(len(indices), generator=generators)
            else:
                samples = self._of_shown(self.shown, indices % self.shown.count, generators)
        return self._quantize(samples, indices)

    def _of_shown(self, shown: DataModuleImages, indices: Tensor, generators: list[torch.Generator]) -> Tensor:
        labels = None if self.module.num_classes is None else shown.labels(indices)
        module = cast(SupportsExamples, self.module)  # as draws_from_images() says
        return module.samples_of(from_uint8(shown.pixels(indices)), labels, generators)[1]

    @override
    def record(self) -> dict[str, Any]:
        settings = self.module.sampling_settings() if isinstance(self.module, DescribesSampling) else {}
        shown = {} if self.shown is None else {"shown": self.shown.record()}
        return {"model": class_path(type(self.module)), "count": self.count, "seed": self.seed, **shown, **settings}


class Quantizer:
    """:func:`~lit_generative.tensor_ops.to_uint8` that says what it clamps, once, and refuses what is no image.

    Args:
        who: Where the images come from.
    """

    def __init__(self, who: str) -> None:
        self.who = who
        self._said = False

    def __call__(self, images: Tensor, indices: Tensor) -> Tensor:
        """Quantize.

        Args:
            images: ``(N, C, H, W)`` in ``[-1, 1]``.
            indices: Their numbers, ``(N,)``.

        Returns:
            uint8, on the CPU.

        Raises:
            ValueError: If they are no images, or one holds NaN or infinity; process and image are named.
        """
        if images.ndim != 4:
            raise ValueError(f"{self.who}: need images (N, C, H, W) to score, got {tuple(images.shape)}.")
        # Two numbers an image, so that a GPU is waited for once; NaN is passed on by both.
        low, high = (x.cpu() for x in images.float().flatten(start_dim=1).aminmax(dim=1))
        where = f"{self.who}, process {process_index()}, image"
        broken = ~(low.isfinite() & high.isfinite())
        if broken.any():
            raise ValueError(
                f"{where} {int(indices[broken][0])}: NaN or infinite pixels ({int(broken.sum())} of {len(images)} "
                "images of this batch). The model has diverged: lower its learning rate or clip gradients."
            )
        outside = (low < -1 - ONE_LEVEL) | (high > 1 + ONE_LEVEL)
        if outside.any() and not self._said:
            self._said = True
            first = int(outside.nonzero()[0])
            warnings.warn(
                f"{where} {int(indices[first])}: values from {float(low[first]):.3g} to {float(high[first]):.3g}, and "
                "perhaps others, are clamped to [-1, 1] before scoring.",
                stacklevel=2,
            )
        return to_uint8(images).cpu()
