"""The IDX file format of MNIST.

Source: http://yann.lecun.com/exdb/mnist/ ("the IDX file format"): two zero bytes, a type code, the number of axes,
one big-endian 32-bit length per axis, then the values.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

UNSIGNED_BYTE = 0x08


def find_idx(folder: Path, name: str) -> Path | None:
    """The file ``name`` or ``name.gz`` in ``folder``; None if there is neither."""
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def read_idx(path: Path) -> Tensor:
    """Read an IDX file of unsigned bytes, gzipped if its name ends in ``.gz``.

    Returns:
        uint8 tensor with the axes of the file.

    Raises:
        ValueError: If the file is damaged, incomplete, or not an IDX file of unsigned bytes.
    """
    data = _read_bytes(path)
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] != UNSIGNED_BYTE or data[3] == 0:
        raise ValueError(
            f"read_idx: {path} must start with 00 00 08 and the number of axes, got {data[:4].hex(' ') or 'nothing'}. "
            "It is no IDX file of unsigned bytes; get it again."
        )
    num_axes = data[3]
    start = 4 + 4 * num_axes
    if len(data) < start:
        raise ValueError(f"read_idx: {path} is cut off within its header of {start} bytes. Get it again.")
    shape = struct.unpack(f">{num_axes}I", data[4:start])
    if len(data) - start != math.prod(shape):
        raise ValueError(
            f"read_idx: {path} must hold {math.prod(shape)} values for its shape {shape}, got {len(data) - start}. "
            "It is incomplete or damaged; get it again."
        )
    return torch.from_numpy(np.frombuffer(data, dtype=np.uint8, offset=start).reshape(shape).copy())


def _read_bytes(path: Path) -> bytes:
    if path.suffix != ".gz":
        return path.read_bytes()
    try:
        return gzip.decompress(path.read_bytes())
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"read_idx: {path} is no complete gzip file ({error}). Get it again.") from error
