"""Where a run lives: ``<save_dir>/<name>/version_<n>/``, one folder for its loggers, checkpoints and samples."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any


def last_checkpoint(trainer: Any) -> Path | None:
    """The newest ``last.ckpt`` of the runs that a trainer's config names.

    Args:
        trainer: The ``trainer`` part of a parsed config.
    """
    files = [file for root in _roots(trainer) for file in root.glob("version_*/checkpoints/last.ckpt")]
    return max(files, key=lambda file: file.stat().st_mtime, default=None)


def choose_run(trainer: Any, command: str, resumed: Path | None) -> None:
    """Give every logger without a version the same one.

    A new fit takes the next free number; a resumed fit goes on in its folder; evaluation writes to a folder in it.

    Args:
        trainer: The ``trainer`` part of a parsed config; changed in place.
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        resumed: The checkpoint found by :func:`last_checkpoint`.
    """
    if resumed is not None:
        run = resumed.parent.parent.name
        version = run if command == "fit" else f"{run}/{command}"
    else:
        taken = [_number(folder) for root in _roots(trainer) for folder in root.glob("version_*")]
        version = f"version_{max(taken, default=-1) + 1}"
    for logger in _loggers(trainer):
        if "version" in logger.init_args and logger.init_args.version is None:
            logger.init_args.version = version


def _loggers(trainer: Any) -> Iterator[Any]:
    configured = trainer.get("logger")
    for logger in configured if isinstance(configured, list) else [configured]:
        arguments = logger.get("init_args", {}) if hasattr(logger, "class_path") else {}
        # What W&B calls version is the run's id, which must differ between all runs of a project.
        if "save_dir" in arguments and "id" not in arguments:
            yield logger


def _roots(trainer: Any) -> set[Path]:
    return {
        Path(str(logger.init_args.save_dir)) / (logger.init_args.name or "")
        for logger in _loggers(trainer)
        if "name" in logger.init_args
    }


def _number(folder: Path) -> int:
    digits = folder.name.removeprefix("version_")
    return int(digits) if digits.isdigit() else -1
