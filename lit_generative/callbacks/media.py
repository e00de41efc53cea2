"""Pictures and records for the loggers: the one place that knows how each of them takes what is no scalar."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from lit_generative.pictures import pil

RECORDS = "records.jsonl"
"""File of the records beside ``metrics.csv``: one JSON object a line, with ``step``, ``key`` and ``record``."""


@rank_zero_only
def log_image(trainer: L.Trainer, key: str, picture: Tensor, step: int) -> None:
    """Show a picture in every logger that can; a CSV file cannot, so a caller who wants a file writes one.

    Every process may call it, or the first one alone.

    Args:
        trainer: Its loggers are used.
        key: Name of the picture, as in ``"samples"``.
        picture: ``(height, width, 1)`` or ``(height, width, 3)``, uint8: W&B shows a float picture black.
        step: ``trainer.global_step``, the updates made so far; see :func:`logger_step`.

    Raises:
        ValueError: If ``picture`` has another type or shape.
    """
    if picture.dtype != torch.uint8 or picture.ndim != 3 or picture.shape[-1] not in (1, 3):
        raise ValueError(
            f"log_image: {key!r} must be a uint8 picture (height, width, 1 or 3), got {picture.dtype} "
            f"{tuple(picture.shape)}. Make one with lit_generative.pictures.grid."
        )
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(key, picture, logger_step(step), dataformats="HWC")
        elif isinstance(logger, WandbLogger):
            logger.log_image(key, [pil(picture)], step=logger_step(step))


@rank_zero_only
def log_record(trainer: L.Trainer, key: str, record: Mapping[str, Any], step: int) -> None:
    """Keep what a score was made of, in each logger that has a place for it: values, counts, settings, versions.

    W&B gets it as nested values of the step, of which the last are in the run's summary; TensorBoard as a text; beside
    a CSV file it is one line of ``records.jsonl``, on disk when the call returns. If a resumed run comes by a step
    again, the later line holds.

    Args:
        trainer: Its loggers are used. Every process may call it, or the first one alone.
        key: Name of the record, as in ``"val/fid_record"``: not that of a scalar.
        record: Numbers, strings, booleans, None, and lists and dictionaries of them.
        step: ``trainer.global_step``, the updates made so far; see :func:`logger_step`.

    Raises:
        TypeError: If ``record`` holds anything else.
    """
    try:
        text = json.dumps(record := dict(record), indent=2)
    except TypeError as error:
        raise TypeError(f"log_record: {key!r} must hold numbers, strings, lists and dictionaries: {error}.") from error
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            code = text.replace("\n", "\n    ")  # TensorBoard renders Markdown, where indented text stays as it is
            logger.experiment.add_text(key, f"    {code}", logger_step(step))
        elif isinstance(logger, WandbLogger):
            logger.log_metrics({key: record}, step=logger_step(step))  # type: ignore[dict-item]
        elif isinstance(logger, CSVLogger):
            _append(Path(logger.log_dir), {"step": logger_step(step), "key": key, "record": record})


def logger_step(step: int) -> int:
    """Where loggers show what belongs to the last update: Lightning counts updates from 0 there.

    Args:
        step: ``trainer.global_step``; 0 before the first update, which is shown where the first one is.
    """
    return max(step - 1, 0)


def _append(folder: Path, line: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / RECORDS).open("a") as file:
        file.write(json.dumps(line) + "\n")
