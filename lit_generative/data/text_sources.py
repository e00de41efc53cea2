"""Where texts come from: files, and data sets of Hugging Face."""

from __future__ import annotations

import json
import string
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lit_generative.data.tokenizers import is_hub_name

Record = dict[str, Any]
_SAVED = ("dataset_info.json", "dataset_dict.json")


def read_documents(who: str, place: str, column: str = "text", one_per_line: bool = False) -> list[str]:
    """Texts that are not blank.

    Args:
        who: Named in messages.
        place: A text file, a JSONL file, a folder of ``*.txt``, or what :func:`read_records` takes.
        column: Which key of a record is the text.
        one_per_line: Each line of a text file is a document; else the file is.

    Raises:
        FileNotFoundError: If there is no such place.
        ValueError: If it holds no text, or cannot be read.
    """
    path = Path(place)
    if path.is_file() and path.suffix != ".jsonl":
        files = [path]
    elif path.is_dir() and not _is_saved(path):
        files = sorted(path.rglob("*.txt"))
    else:
        texts = [str(record[column]) for record in read_records(who, place, [column])]
        return _not_blank(who, place, texts)
    texts = [_read(who, file) for file in files]
    return _not_blank(who, place, [line for text in texts for line in text.splitlines()] if one_per_line else texts)


def read_records(who: str, place: str, keys: Sequence[str]) -> list[Record]:
    """Records with certain keys.

    Args:
        who: Named in messages.
        place: A JSONL file (one JSON object a line); a folder that ``datasets`` saved by ``save_to_disk``, or the name
            of a data set on the hub, each with ``:split`` or ``:config:split`` behind it where there are several.
        keys: Each record must have them.

    Raises:
        FileNotFoundError: If there is no such place.
        ValueError: If a record lacks a key (the message names its line), there are none, or ``datasets`` is absent.
    """
    path = Path(place)
    records = list(_read_lines(who, path) if path.is_file() else _read_dataset(who, place))
    if not records:
        raise ValueError(f"{who}: {place} must hold records, and is empty.")
    for where, record in records:
        if missing := [key for key in keys if key not in record]:
            raise ValueError(
                f"{who}: {where} must have {_listed(missing)}, but has {_listed(record)}. Name the keys that it has."
            )
    return [record for _, record in records]


def fields(template: str) -> list[str]:
    """The keys that a template names: of ``"{instruction} {input}"``, both."""
    return list(dict.fromkeys(name for _, name, _, _ in string.Formatter().parse(template) if name))


def _read(who: str, file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{who}: {file} must be a text in UTF-8: {error}. Convert it.") from error


def _read_lines(who: str, file: Path) -> Iterator[tuple[str, Record]]:
    for number, line in enumerate(_read(who, file).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number},"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{who}: {where} must be a JSON object: {error}.") from error
        if not isinstance(record, dict):
            raise ValueError(f"{who}: {where} must be a JSON object, got {line.strip()[:40]!r}.")
        yield where, record


def _read_dataset(who: str, place: str) -> Iterator[tuple[str, Record]]:
    name, _, rest = place.partition(":")
    saved = _is_saved(Path(name))
    if not saved and not is_hub_name(name):
        raise FileNotFoundError(
            f"{who}: there is no {place!r}. Give a file, a folder, or the name of a data set on the hub, owner/name."
        )
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"{who}: {place} is a Hugging Face data set, and the package datasets is not installed. Install it."
        ) from error
    config, _, split = rest.rpartition(":")
    try:
        loaded: Any = datasets.load_from_disk(name) if saved else datasets.load_dataset(name, config or None)
    except (OSError, ValueError) as error:
        raise ValueError(f"{who}: the data set {name!r} could not be loaded: {str(error).splitlines()[0]}") from error
    table = _table(who, name, loaded, split) if isinstance(loaded, dict) else loaded
    for number, record in enumerate(table):
        yield f"record {number} of {place}", record


def _table(who: str, name: str, loaded: dict[str, Any], split: str) -> Any:
    split = split or "train"
    if split not in loaded:
        raise ValueError(
            f"{who}: the data set {name!r} must have the split {split!r}, but has {_listed(loaded)}. Name one of them "
            f"as {name}:split."
        )
    return loaded[split]


def _is_saved(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _SAVED)


def _not_blank(who: str, place: str, texts: Sequence[str]) -> list[str]:
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ValueError(f"{who}: {place} must hold texts, and has none that is not blank. Give *.txt or a JSONL file.")
    return texts


def _listed(names: Any) -> str:
    return ", ".join(repr(name) for name in names) or "nothing"
