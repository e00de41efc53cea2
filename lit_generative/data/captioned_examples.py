"""Square pictures with a text each, as a batch: what the data modules of text-to-image fine-tuning share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from typing_extensions import override

from lit_generative.data.batches import BatchDataset, BatchKey
from lit_generative.data.image_files import Background, decode_image, flatten_alpha, to_8_bit
from lit_generative.data.resumable import ResumableDataModule
from lit_generative.tensor_ops import derive_seed, from_uint8
from lit_generative.types import Batch


class CaptionedBatch(Batch):
    """Images with texts; all labels are 0."""

    caption: list[str]
    """What each image shows, ``N`` texts."""


class DatasetRow(NamedTuple):
    """A picture in a data set of Hugging Face, which decodes it when it is asked."""

    dataset: Any
    row: int
    column: str


class View(NamedTuple):
    """How training sees an image, drawn anew each time."""

    seed: int
    """What is drawn is a function of it and the key of the batch."""
    random_crop: bool = False
    """Cut the square anywhere along the longer side; else from the middle."""
    horizontal_flip: bool = False
    """Mirror left to right with probability 1/2."""


class CaptionedExamples(BatchDataset):
    """Pictures and their captions; a batch is a :class:`CaptionedBatch`, its image uint8.

    Args:
        pictures: Each the path of a file, pixels ``(3, H, W)`` uint8, or a row of a data set.
        captions: As many texts.
        image_size: Height and width in pixels: the shorter side is scaled (bilinear, antialiased), a square is cut.
        background: What shows through transparent pixels.
        view: How training sees them; None for the middle of each, not mirrored.
    """

    def __init__(
        self,
        pictures: Sequence[str | Tensor | DatasetRow],
        captions: Sequence[str],
        image_size: int,
        background: Background = "white",
        view: View | None = None,
    ) -> None:
        self.pictures, self.captions = list(pictures), list(captions)
        self.image_size, self.background, self.view = image_size, background, view

    def take(self, indices: Tensor) -> CaptionedExamples:
        """Those at ``indices``, ``(M,)`` int64."""
        chosen = indices.tolist()
        return self._of([self.pictures[i] for i in chosen], [self.captions[i] for i in chosen], self.view)

    def held(self) -> CaptionedExamples:
        """The same with all pictures decoded and scaled, in memory."""
        return self._of([self._scaled(picture) for picture in self.pictures], self.captions, self.view)

    def seen(self, view: View) -> CaptionedExamples:
        """The same as training sees them."""
        return self._of(self.pictures, self.captions, view)

    @override
    def __len__(self) -> int:
        return len(self.captions)

    @override
    def __getitem__(self, key: BatchKey) -> CaptionedBatch:
        indices = key.indices.tolist()
        image = torch.stack(
            [
                self._cut(self._scaled(self.pictures[i]), *place)
                for i, place in zip(indices, self._drawn(key), strict=True)
            ]
        )
        label = torch.zeros(len(indices), dtype=torch.int64)
        return {"image": image, "label": label, "caption": [self.captions[i] for i in indices]}

    def _of(self, pictures: Sequence[Any], captions: Sequence[str], view: View | None) -> CaptionedExamples:
        return CaptionedExamples(pictures, captions, self.image_size, self.background, view)

    def _drawn(self, key: BatchKey) -> list[tuple[float | None, bool]]:
        """Of each picture where its square lies, from 0 (above or left) to 1, None in the middle; and if mirrored."""
        if self.view is None:
            return [(None, False)] * len(key.indices)
        seed = derive_seed("view", self.view.seed, key.epoch, key.batch, key.rank)
        draws = torch.rand(len(key.indices), 2, generator=torch.Generator().manual_seed(seed)).tolist()
        crops, flips = self.view.random_crop, self.view.horizontal_flip
        return [(place if crops else None, flips and chance < 0.5) for place, chance in draws]

    def _cut(self, pixels: Tensor, place: float | None, mirrored: bool) -> Tensor:
        size = self.image_size
        spare = [n - size for n in pixels.shape[1:]]
        top, left = (n // 2 if place is None else int(place * (n + 1)) for n in spare)
        square = pixels[:, top : top + size, left : left + size]
        return square.flip(-1) if mirrored else square

    def _scaled(self, picture: str | Tensor | DatasetRow) -> Tensor:
        """uint8 ``(3, h, w)``, the shorter of which is ``image_size``."""
        pixels = self._pixels(picture)
        shorter = min(pixels.shape[1:])
        if shorter == self.image_size:
            return pixels
        h, w = (max(self.image_size, round(n * self.image_size / shorter)) for n in pixels.shape[1:])
        image = Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize((w, h), Image.Resampling.BILINEAR)
        return _to_pixels(image)

    def _pixels(self, picture: str | Tensor | DatasetRow) -> Tensor:
        if isinstance(picture, str):
            return decode_image(picture, None, 3, self.background)
        if isinstance(picture, Tensor):
            return picture
        image = picture.dataset[picture.row][picture.column]
        if not isinstance(image, Image.Image):
            raise TypeError(
                f"CaptionedExamples: column {picture.column!r} must hold images, got {type(image).__name__} in row "
                f"{picture.row}. Cast it to datasets.Image()."
            )
        return _to_pixels(flatten_alpha(to_8_bit(ImageOps.exif_transpose(image)), self.background).convert("RGB"))


class CaptionedDataModule(ResumableDataModule):
    """Data of square pictures in three channels with a text each; a subclass sets ``image_size``, in pixels."""

    image_size: int

    @property
    @override
    def num_classes(self) -> None:
        return None

    @property
    @override
    def sample_shape(self) -> tuple[int, int, int]:
        return (3, self.image_size, self.image_size)

    @override
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return scaled_to_floats(batch)


def scaled_to_floats(batch: Any) -> Any:
    """A batch with its uint8 tensors as float32 in ``[-1, 1]``; what is no dictionary stays as it is."""
    if not isinstance(batch, dict):
        return batch  # predict_dataloader yields plain indices
    return {
        key: from_uint8(value) if isinstance(value, Tensor) and value.dtype == torch.uint8 else value
        for key, value in batch.items()
    }


def _to_pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
