"""Images of one size: the base of the image data modules."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from lit_generative.data.batches import BatchDataset, InMemoryExamples, RandomFlip
from lit_generative.data.binarization import Binarization, DynamicBinarization, StaticBinarization, binarize_splits
from lit_generative.data.resumable import ResumableDataModule
from lit_generative.data.splits import Splits, split_indices
from lit_generative.tensor_ops import from_uint8

ResizeMode = Literal["pad", "stretch", "crop"]


class LabelledImages(NamedTuple):
    """Images in memory, and what they show."""

    images: Tensor
    """uint8, ``(N, C, H, W)``."""
    labels: Tensor
    """int64, ``(N,)``."""

    def take(self, indices: Tensor) -> LabelledImages:
        """The images at ``indices``, ``(M,)`` int64."""
        return LabelledImages(self.images[indices], self.labels[indices])


class ImageDataModule(ResumableDataModule):
    """Images held as uint8 and scaled to float32 in ``[-1, 1]`` on the model's device.

    A batch is ``{"image": (N, C, H, W), "label": (N,)}``. A subclass gives ``num_classes``, ``native_shape`` and
    ``load_splits``, which calls ``split_images`` if the images lie in memory.

    Args:
        image_size: Height and width in pixels; None for the native ones.
        resize: How an image comes to ``image_size``. "pad": centred in a black square, pixels untouched. "stretch":
            bilinear, antialiased, whatever the aspect. "crop": the shorter side is scaled, the centre is kept.
        horizontal_flip: Mirror training images left to right with probability 1/2.
        binarize: Make each value 0 or 255, the latter with the probability of its grey level, channel by channel and
            after ``resize``. "static" draws each image once, as a function of ``split_seed`` only (Salakhutdinov &
            Murray 2008). "dynamic" draws a training image anew each time it is shown (Burda et al. 2016,
            arXiv:1509.00519); validation, test and :meth:`examples` are those of "static". Say which one a
            log-likelihood was measured with: on MNIST the two differ by about 2 nats.
        kwargs: Arguments of :class:`~lit_generative.data.resumable.ResumableDataModule`: ``batch_size``,
            ``num_workers`` and the like.

    Raises:
        ValueError: If ``image_size`` is below 1, or ``resize`` or ``binarize`` unknown.
    """

    def __init__(
        self,
        image_size: int | None = None,
        resize: ResizeMode = "pad",
        horizontal_flip: bool = False,
        binarize: Binarization | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if image_size is not None and image_size < 1:
            raise ValueError(f"{self._name}: image_size must be at least 1, got {image_size}.")
        if resize not in ("pad", "stretch", "crop"):
            raise ValueError(f"{self._name}: resize must be 'pad', 'stretch' or 'crop', got {resize!r}.")
        if binarize not in (None, *get_args(Binarization)):
            raise ValueError(f"{self._name}: binarize must be 'static', 'dynamic' or None, got {binarize!r}.")
        self.image_size, self.resize = image_size, resize
        self.horizontal_flip, self.binarize = horizontal_flip, binarize

    @property
    @abstractmethod
    def native_shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` before ``image_size`` is applied."""

    @property
    @override
    def sample_shape(self) -> tuple[int, int, int]:
        C, H, W = self.native_shape
        return (C, H, W) if self.image_size is None else (C, self.image_size, self.image_size)

    def split_images(self, development: LabelledImages, test: LabelledImages) -> Splits:
        """Take the validation images from ``development``, and bring all images to ``image_size``."""
        train, val = split_indices(len(development.labels), self.val_fraction, self.split_seed, "val")
        return Splits(*(self._fit(part) for part in (development.take(train), development.take(val), test)))

    @override
    def setup(self, stage: str | None = None) -> None:
        if self._splits is None and self.binarize is not None:
            self._splits = binarize_splits(self.load_splits(), self.split_seed, hold_train=self.binarize == "static")
        super().setup(stage)

    @override
    def augment(self, train: BatchDataset, seed: int) -> BatchDataset:
        if self.binarize == "dynamic":
            train = DynamicBinarization(cast(StaticBinarization, train).dataset, seed)  # made in setup
        return RandomFlip(train, seed) if self.horizontal_flip else train

    @override
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        # predict_dataloader yields plain indices
        if isinstance(batch, dict) and batch["image"].dtype == torch.uint8:
            return {**batch, "image": from_uint8(batch["image"])}
        return batch

    def _fit(self, part: LabelledImages) -> BatchDataset:
        images = part.images if self.image_size is None else fit_images(part.images, self.image_size, self.resize)
        return InMemoryExamples(images, part.labels)


def fit_images(images: Tensor, image_size: int, resize: ResizeMode) -> Tensor:
    """Bring images to ``(image_size, image_size)``.

    Args:
        images: uint8, ``(N, C, H, W)``.
        image_size: Height and width in pixels.
        resize: "pad", "stretch" or "crop", as in :class:`ImageDataModule`. An odd border is one pixel wider below and
            on the right.

    Returns:
        uint8, ``(N, C, image_size, image_size)``.

    Raises:
        ValueError: If "pad" would have to make the images smaller.
    """
    H, W = images.shape[-2:]
    if resize == "pad":
        return _pad(images, image_size)
    if resize == "stretch":
        return _interpolate(images, image_size, image_size)
    scale = image_size / min(H, W)
    h, w = round(H * scale), round(W * scale)
    top, left = (h - image_size) // 2, (w - image_size) // 2
    return _interpolate(images, h, w)[..., top : top + image_size, left : left + image_size].contiguous()


def _pad(images: Tensor, image_size: int) -> Tensor:
    H, W = images.shape[-2:]
    if image_size < max(H, W):
        raise ValueError(
            f"fit_images: resize='pad' needs image_size of at least {max(H, W)} for images of {H} x {W}, "
            f"got {image_size}. Use resize='stretch' to make them smaller."
        )
    top, left = (image_size - H) // 2, (image_size - W) // 2
    return F.pad(images, (left, image_size - W - left, top, image_size - H - top))


def _interpolate(images: Tensor, height: int, width: int) -> Tensor:
    if images.shape[-2:] == (height, width) or len(images) == 0:
        return images.new_zeros(len(images), images.shape[1], height, width) if len(images) == 0 else images
    # In chunks: the float copy of a whole data set is four times its size.
    chunks = [
        F.interpolate(chunk.float(), size=(height, width), mode="bilinear", antialias=True).round().to(torch.uint8)
        for chunk in torch.split(images, 1024)
    ]
    return torch.cat(chunks)
