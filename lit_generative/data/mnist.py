"""MNIST and Fashion-MNIST."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lit_generative.data.idx import find_idx, read_idx
from lit_generative.data.image_data import ImageDataModule, LabelledImages
from lit_generative.data.splits import Splits

FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


class MNIST(ImageDataModule):
    """Handwritten digits: 60000 training and 10000 test images of 28 x 28 pixels in one channel, 10 classes.

    The four IDX files (``train-images-idx3-ubyte`` and so on, raw or ``.gz``) are looked for in ``data_dir`` itself and
    in ``data_dir/MNIST/raw``, where torchvision puts what it downloads.

    Source: LeCun et al. 1998, Gradient-based learning applied to document recognition.

    Args:
        data_dir: Folder of the files.
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
        return (1, 28, 28)

    @override
    def prepare_data(self) -> None:
        if self.download and self._find() is None:
            self._download()

    @override
    def load_splits(self) -> Splits:
        files = self._find()
        if files is None:
            raise ValueError(
                f"{self._name}: {self._where_to_put}, each raw or as .gz. Not all four are there; "
                "set download to true, and call prepare_data() if you use no Trainer."
            )
        return self.split_images(self._read(files[0], files[1]), self._read(files[2], files[3]))

    def _find(self) -> list[Path] | None:
        for folder in (Path(self.data_dir), Path(self.data_dir) / self._name / "raw"):
            found = [path for name in FILES if (path := find_idx(folder, name)) is not None]
            if len(found) == len(FILES):
                return found
        return None

    def _read(self, image_file: Path, label_file: Path) -> LabelledImages:
        images, labels = read_idx(image_file), read_idx(label_file)
        self._check(images.shape[1:] == (28, 28), "images of 28 x 28", images, image_file)
        self._check(labels.shape == images.shape[:1], f"{len(images)} labels", labels, label_file)
        self._check(bool((labels < 10).all()), "labels 0 to 9", labels, label_file)
        return LabelledImages(images.unsqueeze(1), labels.to(torch.int64))

    def _check(self, holds: bool, needed: str, values: Tensor, path: Path) -> None:
        if not holds:
            raise ValueError(f"{self._name}: {path} must hold {needed}, got values of shape {tuple(values.shape)}.")

    def _download(self) -> None:
        from torchvision import datasets  # slow to import, and only needed here

        try:
            getattr(datasets, self._name)(self.data_dir, download=True)
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"{self._name}: the download failed. Without internet, {self._where_to_put}. The cause was: {error}"
            ) from error

    @property
    def _where_to_put(self) -> str:
        return f"put the files {', '.join(FILES)} into {Path(self.data_dir).absolute()}"


class FashionMNIST(MNIST):
    """Pictures of clothes in the format of :class:`MNIST`: the same sizes and counts, 10 classes.

    The files have the names of MNIST's: give each its own ``data_dir``, or let torchvision download them, which uses
    ``data_dir/FashionMNIST/raw``. On Debian, ``apt install dataset-fashion-mnist`` puts them into
    ``/usr/share/datasets/fashion-mnist``.

    Source: Xiao et al. 2017 (arXiv:1708.07747).

    Args:
        data_dir: Folder of the files.
        download: Get missing files from the internet.
        kwargs: Arguments of :class:`~lit_generative.data.image_data.ImageDataModule`.
    """
