"""Checkpoint files that are whole or not there: written beside the target and renamed, checked when read."""

from __future__ import annotations

import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from typing_extensions import override


class SafeCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, made safe against kills, full disks and damage.

    A checkpoint is written to a hidden file in the target's folder, flushed to disk and renamed, so that a kill leaves
    the earlier one untouched. Reading verifies the checksums and never unpickles code.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write ``checkpoint`` to ``path``.

        Raises:
            TypeError: If ``storage_options`` are given.
            OSError: If it cannot be written whole: says how much room is left. The earlier file is still there.
        """
        if storage_options is not None:
            raise TypeError("SafeCheckpointIO takes no storage_options: it writes to local folders.")
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        self._sweep(target)
        hidden = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            with hidden.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(hidden, target)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            free = shutil.disk_usage(target.parent).free
            raise OSError(
                f"{target} could not be written ({free / 2**20:.0f} MiB free there): {error}. "
                "An earlier file of that name is untouched."
            ) from error
        finally:
            hidden.unlink(missing_ok=True)

    @staticmethod
    def _sweep(target: Path) -> None:
        """Remove what a killed process left of this file."""
        for orphan in target.parent.glob(f".{target.name}.*.tmp"):
            pid = orphan.name.removeprefix(f".{target.name}.").partition(".")[0]
            if pid.isdigit() and not _is_running(int(pid)):
                orphan.unlink(missing_ok=True)

    @override
    def load_checkpoint(
        self, path: Any, map_location: Callable[..., Any] | None = lambda storage, _: storage, weights_only: Any = None
    ) -> dict[str, Any]:
        """Read a checkpoint; see :func:`load_checkpoint`."""
        # Weights alone, by which processes that a notebook started (ddp_notebook, ddp_spawn) return what they trained.
        if Path(path).name == ".temp.ckpt":
            return _read(Path(path), map_location)
        return load_checkpoint(path, map_location)


def load_checkpoint(path: str | os.PathLike[str], map_location: Any = "cpu") -> dict[str, Any]:
    """Read a training checkpoint, with its checksums verified and without running any code in it.

    Args:
        path: A ``.ckpt`` file.
        map_location: As in ``torch.load``.

    Returns:
        The checkpoint's dictionary.

    Raises:
        FileNotFoundError: If there is no such file; names checkpoints nearby.
        ValueError: If the file is damaged, holds code, or is not a training checkpoint.
    """
    file = Path(path)
    if not file.is_file():
        nearby = sorted(str(p) for p in file.parent.glob("*.ckpt")) if file.parent.is_dir() else []
        raise FileNotFoundError(
            f"There is no checkpoint {file}." + (f" There are: {', '.join(nearby)}." if nearby else "")
        )
    checkpoint = _read(file, map_location)
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"{file} holds weights, not a training checkpoint: it has no state_dict.")
    return checkpoint


def _read(file: Path, map_location: Any) -> Any:
    _check_archive(file)
    try:
        return torch.load(file, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{file} holds Python objects beside tensors and was refused: it could run code.") from error
    except Exception as error:  # a damaged table of contents shows in many ways
        raise ValueError(f"{file} cannot be read as a checkpoint: {str(error).splitlines()[0]}.") from error


def _check_archive(file: Path) -> None:
    damaged = None
    try:
        complete = zipfile.is_zipfile(file)
        if complete:
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()  # torch writes checksums, but does not read them
    except Exception as error:  # BadZipFile, or what a damaged table of contents leads to
        raise ValueError(f"{file} is damaged: {error}. Take another one.") from error
    if not complete:
        size = file.stat().st_size
        raise ValueError(f"{file} is not a complete checkpoint ({size} bytes). Take an earlier one.")
    if damaged is not None:
        raise ValueError(f"{file} is damaged: the checksum of {damaged} is wrong. Take another one.")


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
