"""Images of your own, in a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lit_generative.data.batches import BatchDataset, BatchKey, InMemoryExamples
from lit_generative.data.image_data import ImageDataModule
from lit_generative.data.image_files import EXTENSIONS, Background, decode_image, find_images, shown
from lit_generative.data.splits import Splits, check_fraction, split_indices
from lit_generative.types import Batch

MAX_IN_MEMORY_BYTES = 2 * 1024**3


class FileSplit(NamedTuple):
    """Files of one split, and what they show."""

    paths: list[str]
    labels: Tensor
    """int64, ``(N,)``."""

    def take(self, indices: Tensor) -> FileSplit:
        """The files at ``indices``, ``(M,)`` int64."""
        return FileSplit([self.paths[i] for i in indices.tolist()], self.labels[indices])


class FileSplits(NamedTuple):
    """Files of all splits; ``classes`` is empty if there are none."""

    train: FileSplit
    val: FileSplit
    test: FileSplit
    classes: list[str]


class ImageFiles(BatchDataset):
    """Image files that are decoded when a batch asks for them.

    Args:
        files: Where they are.
        image_size: Height and width in pixels.
        channels: 3 for RGB, 1 for grey.
        background: What shows through transparent pixels.
    """

    def __init__(self, files: FileSplit, image_size: int, channels: int, background: Background) -> None:
        self.files, self.image_size, self.channels, self.background = files, image_size, channels, background

    def decode(self, path: str) -> Tensor:
        """Pixels of one file: uint8, ``(C, image_size, image_size)``."""
        return decode_image(path, self.image_size, self.channels, self.background)

    @override
    def __len__(self) -> int:
        return len(self.files.paths)

    @override
    def __getitem__(self, key: BatchKey) -> Batch:
        paths, labels = self.files.take(key.indices)
        return {"image": torch.stack([self.decode(path) for path in paths]), "label": labels}


class ImageFolder(ImageDataModule):
    """Image files below a folder, with or without class folders.

    If ``data_dir`` holds ``train`` and at least one of ``val`` and ``test``, these are the splits; a missing ``val`` is
    taken from ``train``, a missing ``test`` stays empty. Otherwise all files below ``data_dir`` are split.

    The folders right below are the classes, sorted by name; files in deeper folders belong to them. If all files lie
    directly in the folder there are no classes and every label is 0. How a file becomes pixels:
    :func:`~lit_generative.data.image_files.decode_image`.

    Args:
        data_dir: The folder.
        image_size: Height and width in pixels: the shorter side is scaled, the centre is kept.
        channels: 3 for RGB, 1 for grey.
        test_fraction: Part of all images to test on, in ``[0, 1)``. ``val_fraction`` is taken from the rest.
        in_memory: Decode all images in ``setup`` and hold them, in every process. False decodes each batch anew, best
            in workers. None holds them if they take no more than 2 GiB.
        unreadable: "raise" stops at an image that cannot be read. "skip" decodes all of them in ``setup`` and leaves
            out the unreadable ones, with a warning.
        background: What shows through transparent pixels.
        kwargs: Arguments of :class:`~lit_generative.data.image_data.ImageDataModule` but ``resize``.

    Raises:
        ValueError: If an argument is out of its range, or when the files are looked for: if there are none, if some
            lie in class folders and some beside them, or if an image cannot be read.
    """

    def __init__(
        self,
        data_dir: str,
        image_size: int,
        channels: Literal[1, 3] = 3,
        test_fraction: float = 0.1,
        in_memory: bool | None = None,
        unreadable: Literal["raise", "skip"] = "raise",
        background: Background = "white",
        **kwargs: Any,
    ) -> None:
        super().__init__(image_size=image_size, resize="crop", **kwargs)
        check_fraction(self._name, "test_fraction", test_fraction)
        for name, value, allowed in (
            ("channels", channels, (1, 3)),
            ("unreadable", unreadable, ("raise", "skip")),
            ("background", background, ("white", "black")),
        ):
            if value not in allowed:
                raise ValueError(f"{self._name}: {name} must be one of {allowed}, got {value!r}.")
        self.data_dir, self.size, self.channels = data_dir, image_size, channels
        self.test_fraction, self.in_memory = test_fraction, in_memory
        self.unreadable, self.background = unreadable, background

    @property
    @override
    def num_classes(self) -> int | None:
        return len(self.files.classes) or None

    @property
    @override
    def native_shape(self) -> tuple[int, int, int]:
        return (self.channels, self.size, self.size)

    @cached_property
    def files(self) -> FileSplits:
        """The files of each split, looked for at the first use."""
        if self._has_split_folders("train") and self._has_split_folders("val", "test"):
            return self._read_split_folders()
        everything, classes = self._scan(self.data_dir)
        rest, test = split_indices(len(everything.paths), self.test_fraction, self.split_seed, "test")
        train, val = self._split_val(everything.take(rest))
        return FileSplits(train, val, everything.take(test), classes)

    @override
    def load_splits(self) -> Splits:
        parts = [ImageFiles(part, self.size, self.channels, self.background) for part in self.files[:3]]
        num_bytes = sum(len(part) for part in parts) * self.channels * self.size**2
        hold = num_bytes <= MAX_IN_MEMORY_BYTES if self.in_memory is None else self.in_memory
        if hold or self.unreadable == "skip":
            return self._decode_all(parts, hold)
        return Splits(*parts)

    def _has_split_folders(self, *names: str) -> bool:
        return any(os.path.isdir(os.path.join(self.data_dir, name)) for name in names)

    def _read_split_folders(self) -> FileSplits:
        train, classes = self._scan(os.path.join(self.data_dir, "train"))
        val, test = (
            self._scan(os.path.join(self.data_dir, name), classes)[0] if self._has_split_folders(name) else None
            for name in ("val", "test")
        )
        if val is None:
            train, val = self._split_val(train)
        return FileSplits(
            train, val, FileSplit([], torch.zeros(0, dtype=torch.int64)) if test is None else test, classes
        )

    def _split_val(self, files: FileSplit) -> tuple[FileSplit, FileSplit]:
        train, val = split_indices(len(files.paths), self.val_fraction, self.split_seed, "val")
        return files.take(train), files.take(val)

    def _scan(self, folder: str, classes: list[str] | None = None) -> tuple[FileSplit, list[str]]:
        """Files below ``folder`` and their classes, which must be among ``classes`` if these are given."""
        paths = find_images(folder) if os.path.isdir(folder) else []
        if not paths:
            what = "holds no images" if os.path.isdir(folder) else "is no folder"
            raise ValueError(
                f"{self._name}: {shown(folder)} {what}. Looked for files ending in {', '.join(EXTENSIONS)}, "
                "hidden ones left out."
            )
        names = [path.split(os.sep)[0] if os.sep in path else "" for path in paths]
        found = sorted(set(names) - {""})
        if found and "" in names:
            raise ValueError(
                f"{self._name}: images must lie either in class folders or directly in {shown(folder)}, got both: "
                f"{shown(paths[names.index('')])} and the folder {shown(found[0])}. Move one or the other."
            )
        if classes is not None and (not set(found) <= set(classes) or bool(found) != bool(classes)):
            raise ValueError(
                f"{self._name}: the class folders of {shown(folder)} must be among those of train, {classes}, "
                f"got {found}."
            )
        classes = found if classes is None else classes
        number = {name: i for i, name in enumerate(classes)}
        labels = torch.tensor([number.get(name, 0) for name in names], dtype=torch.int64)
        return FileSplit([os.path.join(folder, path) for path in paths], labels), classes

    def _decode_all(self, parts: list[ImageFiles], hold: bool) -> Splits:
        errors: list[str] = []
        splits = Splits(*(self._decode_part(part, hold, errors) for part in parts))
        if errors:
            rank_zero_warn(f"{self._name}: left out {len(errors)} unreadable images: {' '.join(errors[:3])}")
        if sum(map(len, splits)) == 0:
            raise ValueError(f"{self._name}: none of the images in {shown(self.data_dir)} can be read. {errors[0]}")
        return splits

    def _decode_part(self, part: ImageFiles, hold: bool, errors: list[str]) -> BatchDataset:
        images = torch.empty(len(part) if hold else 0, *self.native_shape, dtype=torch.uint8)
        readable: list[int] = []
        for i, result in enumerate(self._decoded(part)):
            if isinstance(result, str):
                errors.append(result)
                continue
            readable.append(i)
            if hold:
                images[i] = result
        if len(readable) == len(part):
            return InMemoryExamples(images, part.files.labels) if hold else part
        indices = torch.tensor(readable, dtype=torch.int64)
        files = part.files.take(indices)
        if hold:
            return InMemoryExamples(images[indices], files.labels)
        return ImageFiles(files, self.size, self.channels, self.background)

    def _decoded(self, part: ImageFiles) -> Iterator[Tensor | str]:
        """Pixels of each file, or with ``unreadable="skip"`` why there are none."""

        def decode(path: str) -> Tensor | str:
            try:
                return part.decode(path)
            except ValueError as error:
                if self.unreadable == "raise":
                    raise
                return str(error)

        if self.num_workers == 0:
            yield from map(decode, part.files.paths)
            return
        with ThreadPoolExecutor(self.num_workers) as pool:
            yield from pool.map(decode, part.files.paths)
