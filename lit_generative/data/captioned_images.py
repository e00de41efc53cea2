"""Images with a text each: from a folder of your own, or a data set of Hugging Face."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

from typing_extensions import override

from lit_generative.data.batches import BatchDataset
from lit_generative.data.captioned_examples import CaptionedDataModule, CaptionedExamples, DatasetRow, View
from lit_generative.data.image_files import EXTENSIONS, Background, find_images, shown
from lit_generative.data.splits import Splits, check_fraction, split_indices

METADATA = "metadata.jsonl"


class CaptionedImages(CaptionedDataModule):
    """Images and their texts: a batch is ``{"image": (N, 3, H, W), "label": (N,), "caption": list of N texts}``.

    In a folder each image's caption is the text of ``<name>.txt`` beside it. If the folder holds a ``metadata.jsonl``,
    captions are those of its lines ``{"file_name": "a.png", "text": "..."}`` alone, the form "imagefolder" of Hugging
    Face. Line breaks become spaces.

    Args:
        data_dir: The folder. With ``source="datasets"`` a folder of ``save_to_disk``, or a name on the hub.
        image_size: Height and width in pixels: the shorter side is scaled (bilinear, antialiased), a square is cut.
        random_crop: Cut it anywhere along the longer side in training; else from the middle.
        horizontal_flip: Mirror training images with probability 1/2: not where a text says left or right.
        source: "folder", or "datasets" for the library of Hugging Face, which must be installed.
        caption_column: Name of the texts in ``metadata.jsonl`` or in the data set.
        image_column: Name of the images in the data set.
        dataset_split: Which split of the data set.
        revision: Commit, branch or tag on the hub; None for its main branch. A commit stays the same.
        test_fraction: Part of all images to test on, in ``[0, 1)``. ``val_fraction`` is taken from the rest.
        in_memory: Decode all images in ``setup`` and hold them, in every process; else each batch anew.
        background: What shows through transparent pixels.
        kwargs: Arguments of :class:`~lit_generative.data.resumable.ResumableDataModule`.

    Raises:
        ValueError: If an argument is out of its range, or when the data is looked for: if there are no images, if
            captions are missing or empty, or if a data set cannot be had or has no such columns.
    """

    def __init__(
        self,
        data_dir: str,
        image_size: int = 512,
        random_crop: bool = False,
        horizontal_flip: bool = False,
        source: Literal["folder", "datasets"] = "folder",
        caption_column: str = "text",
        image_column: str = "image",
        dataset_split: str = "train",
        revision: str | None = None,
        test_fraction: float = 0.0,
        in_memory: bool = False,
        background: Background = "white",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_square(self._name, image_size, background)
        check_fraction(self._name, "test_fraction", test_fraction)
        if source not in ("folder", "datasets"):
            raise ValueError(f"{self._name}: source must be 'folder' or 'datasets', got {source!r}.")
        self.data_dir, self.image_size, self.source = data_dir, image_size, source
        self.random_crop, self.horizontal_flip = random_crop, horizontal_flip
        self.caption_column, self.image_column = caption_column, image_column
        self.dataset_split, self.revision = dataset_split, revision
        self.test_fraction, self.in_memory, self.background = test_fraction, in_memory, background

    @override
    def prepare_data(self) -> None:
        if self.source == "datasets":
            self._load_dataset()  # a download is for one process alone

    @override
    def load_splits(self) -> Splits:
        pictures, captions = self._read_folder() if self.source == "folder" else self._read_dataset()
        everything = CaptionedExamples(pictures, captions, self.image_size, self.background)
        if self.in_memory:
            everything = everything.held()
        return split_examples(everything, self.test_fraction, self.val_fraction, self.split_seed)

    @override
    def augment(self, train: BatchDataset, seed: int) -> BatchDataset:
        return cast(CaptionedExamples, train).seen(View(seed, self.random_crop, self.horizontal_flip))

    def _read_folder(self) -> tuple[list[str], list[str]]:
        names = images_in(self._name, self.data_dir)
        metadata = os.path.join(self.data_dir, METADATA)
        if os.path.isfile(metadata):
            where, texts = f"in {METADATA}", read_metadata(self._name, metadata, self.caption_column)
            unknown = [name for name in texts if name not in set(names)]
            refuse_some(self._name, f"named in {METADATA} are not in {shown(self.data_dir)}", unknown)
        else:
            where = "in <name>.txt beside it"
            texts = {name: _text_beside(self._name, os.path.join(self.data_dir, name)) for name in names}
        without = [name for name in names if not texts.get(name)]
        refuse_some(self._name, f"of {shown(self.data_dir)} have no caption, or an empty one, {where}", without)
        return [os.path.join(self.data_dir, name) for name in names], [texts[name] for name in names]

    def _read_dataset(self) -> tuple[Sequence[DatasetRow], list[str]]:
        dataset = self._load_dataset()
        for name in (self.image_column, self.caption_column):
            if name not in dataset.column_names:
                raise ValueError(
                    f"{self._name}: {shown(self.data_dir)} must have a column {name!r}, got {dataset.column_names}. "
                    "Set image_column and caption_column."
                )
        texts = [_one_line(text) for text in dataset[self.caption_column]]
        without = [f"row {i}" for i, text in enumerate(texts) if not text]
        refuse_some(self._name, f"of {shown(self.data_dir)} have no caption, or an empty one", without)
        return [DatasetRow(dataset, i, self.image_column) for i in range(len(dataset))], texts

    def _load_dataset(self) -> Any:
        try:
            import datasets  # an optional dependency, and slow to import
        except ImportError as error:
            raise ValueError(f"{self._name}: source='datasets' needs datasets. pip install datasets.") from error
        try:
            if not os.path.isdir(self.data_dir):
                return datasets.load_dataset(self.data_dir, split=self.dataset_split, revision=self.revision)
            found = datasets.load_from_disk(self.data_dir)
            return found[self.dataset_split] if isinstance(found, datasets.DatasetDict) else found
        except (OSError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"{self._name}: split {self.dataset_split!r} of {shown(self.data_dir)} cannot be loaded: {reason} "
                "Give a folder of save_to_disk or a name on the hub, and a split that it has."
            ) from error


def split_examples(everything: CaptionedExamples, test_fraction: float, val_fraction: float, split_seed: int) -> Splits:
    """Take test and validation examples away, as a function of the seed; arguments as in :class:`CaptionedImages`."""
    rest, test = split_indices(len(everything), test_fraction, split_seed, "test")
    train, val = split_indices(len(rest), val_fraction, split_seed, "val")
    return Splits(*(everything.take(part) for part in (rest[train], rest[val], test)))


def read_metadata(who: str, path: str, column: str) -> dict[str, str]:
    """Captions by file name of a ``metadata.jsonl``.

    Args:
        who: Named in messages.
        path: The file.
        column: Name of the texts.

    Raises:
        ValueError: If a line is no JSON object with a ``file_name``, or names a file again.
    """
    texts: dict[str, str] = {}
    for number, line in enumerate(_utf8(who, Path(path)).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            name = os.path.normpath(entry["file_name"])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{who}: line {number} of {shown(path)} must be a JSON object with 'file_name' and {column!r}, got "
                f"{line[:80]!r}."
            ) from error
        if name in texts:
            raise ValueError(f"{who}: line {number} of {shown(path)} names {shown(name)} again. Leave one of them.")
        texts[name] = _one_line(entry.get(column))
    return texts


def images_in(who: str, folder: str) -> list[str]:
    """Image files below a folder, relative to it, in the order of their names.

    Args:
        who: Named in messages.
        folder: The folder.

    Raises:
        ValueError: If there are none.
    """
    names = find_images(folder) if os.path.isdir(folder) else []
    if not names:
        what = "holds no images" if os.path.isdir(folder) else "is no folder"
        raise ValueError(f"{who}: {shown(folder)} {what}. Looked for files ending in {', '.join(EXTENSIONS)}.")
    return names


def refuse_some(who: str, what: str, names: Sequence[str]) -> None:
    """Refuse images, if there are any, and name the first five.

    Raises:
        ValueError: If ``names`` is not empty.
    """
    if names:
        listed = ", ".join(shown(name) for name in names[:5]) + (", ..." if len(names) > 5 else "")
        raise ValueError(f"{who}: {len(names)} images {what}: {listed}. Add what is missing, or take them out.")


def check_square(who: str, image_size: int, background: str) -> None:
    """Refuse a size below 1, and an unknown background.

    Raises:
        ValueError: If one of them is.
    """
    if image_size < 1:
        raise ValueError(f"{who}: image_size must be at least 1, got {image_size}.")
    if background not in ("white", "black"):
        raise ValueError(f"{who}: background must be 'white' or 'black', got {background!r}.")


def _text_beside(who: str, path: str) -> str:
    file = Path(path).with_suffix(".txt")
    return _one_line(_utf8(who, file)) if file.is_file() else ""


def _utf8(who: str, file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{who}: {shown(str(file))} must be text in UTF-8: {error}. Save it so.") from error


def _one_line(text: Any) -> str:
    return " ".join(text.split()) if isinstance(text, str) else ""
