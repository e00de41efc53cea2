"""Images that ``litgen evaluate`` is given: a folder of files, or an array in an .npz file."""

from __future__ import annotations

import hashlib
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from lit_generative.data.image_files import decode_image, find_images, shown
from lit_generative.metrics.sources import ImageSource, Quantizer

THREADS = 4


class FolderImages(ImageSource):
    """All image files below a folder, in the order of their names, as RGB and in their own size.

    Args:
        folder: Searched with its sub-folders.

    Raises:
        ValueError: If it holds no image.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = os.fspath(folder)
        self.files = find_images(self.folder)
        self.count = len(self.files)
        if self.count == 0:
            raise ValueError(f"{self.folder} holds no image files. Name a folder of PNG, JPEG or the like.")
        self._shape: torch.Size | None = None

    @override
    def pixels(self, indices: Tensor) -> Tensor:
        names = [self.files[i] for i in indices.tolist()]
        with ThreadPoolExecutor(THREADS) as pool:  # decoding leaves the interpreter to others
            images = list(pool.map(self._decode, names))
        self._shape = self._shape or images[0].shape
        for name, image in zip(names, images, strict=True):
            if image.shape != self._shape:
                height, width = self._shape[1:]
                raise ValueError(
                    f"{shown(os.path.join(self.folder, name))}: all images must have one size, this one is "
                    f"{image.shape[1]} x {image.shape[2]} and others are {height} x {width}. Bring them to one size, "
                    "or give a data config with image_size."
                )
        return torch.stack(images)

    def _decode(self, name: str) -> Tensor:
        return decode_image(os.path.join(self.folder, name), None)

    @override
    def record(self) -> dict[str, Any]:
        names = hashlib.sha256("\n".join(shown(name) for name in self.files).encode()).hexdigest()
        return {
            "folder": Path(self.folder).name,
            "count": self.count,
            "names": names,
            "fingerprint": self.fingerprint(),
        }


class NpzImages(ImageSource):
    """The array ``images`` (or ``arr_0``) of an .npz file: uint8 ``(N, H, W, C)``, or floats in ``[-1, 1]``.

    Args:
        path: File as ``litgen sample --format npz`` writes it.

    Raises:
        ValueError: If the file holds no such array.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        arrays = load_arrays(self.path)
        images = next((arrays[name] for name in ("images", "arr_0") if name in arrays), None)
        if images is None or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[-1] not in (1, 3)):
            found = {name: array.shape for name, array in arrays.items()}
            raise ValueError(f"{path} must hold an array `images` (N, H, W, C) with 1 or 3 channels, got {found}.")
        if images.dtype != np.uint8 and images.dtype.kind != "f":
            raise ValueError(f"{path}: images must be uint8, or floats in [-1, 1], got {images.dtype}.")
        images = images.reshape(*images.shape[:3], -1)
        self._images = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
        self.count = len(images)
        self._quantize = Quantizer(str(path))
        self._check_range()

    def _check_range(self) -> None:
        if self._images.dtype != torch.uint8 and self.count:
            for index, image in enumerate(self._images):
                if (outside := (image.abs() > 1).sum()) > 0:
                    raise ValueError(
                        f"{self.path}, image {index}: {int(outside)} values lie outside [-1, 1], the largest is "
                        f"{float(image.max()):g}. Floats must be scaled to [-1, 1], or give uint8."
                    )

    @override
    def pixels(self, indices: Tensor) -> Tensor:
        images = self._images[indices]
        return images if images.dtype == torch.uint8 else self._quantize(images, indices)

    @override
    def record(self) -> dict[str, Any]:
        return {"file": self.path.name, "count": self.count, "fingerprint": self.fingerprint()}


def load_arrays(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """All arrays of an .npz file; nothing in it is unpickled.

    Raises:
        ValueError: If it is no such file, or holds Python objects.
        FileNotFoundError: If it is not there.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no file {path}.") from None
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, AttributeError, KeyError) as error:
        raise ValueError(f"{path} cannot be read as .npz: {error}. Write it with numpy.savez.") from error
