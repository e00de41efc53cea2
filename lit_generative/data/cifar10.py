"""CIFAR-10."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from typing_extensions import override

from lit_generative.data.image_data import ImageDataModule, LabelledImages
from lit_generative.data.splits import Splits


class CIFAR10(ImageDataModule):
    """50000 training and 10000 test photographs of 32 x 32 pixels in three channels, 10 classes.

    Source: Krizhevsky 2009, Learning multiple layers of features from tiny images.

    Args:
        data_dir: Folder that holds ``cifar-10-batches-py``, as torchvision makes it.
        download: Get missing files from the internet.
        kwargs: Arguments of :class:`~lit_generative.data.image_data.ImageDataModule`.

    Raises:
        ValueError: In ``prepare_data`` or ``setup``, if the files are missing, damaged, or cannot be downloaded.
    """

    def __init__(self, data_dir: str = "datasets", download: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.data_dir, self.download = data_dir, download

    @property
    @override
    def num_classes(self) -> int:
        return 10

    @property
    @override
    def native_shape(self) -> tuple[int, int, int]:
        return (3, 32, 32)

    @override
    def prepare_data(self) -> None:
        if self.download:
            self._read(train=False, download=True)

    @override
    def load_splits(self) -> Splits:
        return self.split_images(self._read(train=True, download=False), self._read(train=False, download=False))

    def _read(self, train: bool, download: bool) -> LabelledImages:
        from torchvision import datasets  # slow to import, and only needed here

        try:
            cifar = datasets.CIFAR10(self.data_dir, train=train, download=download)
        except (OSError, RuntimeError) as error:
            what = "the download failed" if download else "the files are missing or damaged"
            raise ValueError(
                f"{self._name}: {what}. Unpack https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz so that "
                f"{Path(self.data_dir).absolute() / 'cifar-10-batches-py'} is there, or set download to true and call "
                f"prepare_data() if you use no Trainer. The cause was: {error}"
            ) from error
        images = torch.from_numpy(cifar.data).permute(0, 3, 1, 2).contiguous()
        return LabelledImages(images, torch.tensor(cifar.targets, dtype=torch.int64))
