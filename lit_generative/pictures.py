"""Samples as pictures: grids, films and scatter plots, as uint8 arrays and files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from lit_generative.tensor_ops import to_uint8

PLOT_SIZE = 520
"""Side of a scatter plot and least side of a grid, in pixels."""


def grid(samples: Tensor, columns: int | None = None) -> Tensor:
    """Arrange samples in one picture; points become a scatter plot over ``[-1.5, 1.5]``.

    Small images are enlarged by a whole factor, so that pixels stay pixels.

    Args:
        samples: Images ``(N, C, H, W)`` in ``[-1, 1]``, or points ``(N, 2)``.
        columns: Images in a row; None makes the grid about square.

    Returns:
        uint8 picture, ``(height, width, 3)``.

    Raises:
        ValueError: If ``samples`` is neither, or there are none.
    """
    if len(samples) == 0:
        raise ValueError("grid: there must be at least one sample, got none.")
    if samples.ndim == 2 and samples.shape[1] == 2:
        return _scatter(samples)
    if samples.ndim != 4:
        raise ValueError(f"grid: samples must be (N, C, H, W) or (N, 2), got {tuple(samples.shape)}.")
    from torchvision.utils import make_grid

    columns = columns or max(1, round(len(samples) ** 0.5))
    picture = make_grid(to_uint8(samples.cpu()), nrow=columns, padding=1, pad_value=64)
    picture = picture[:3] if len(picture) >= 3 else picture[:1].expand(3, -1, -1)
    factor = max(1, PLOT_SIZE // max(picture.shape[1:]))
    return picture.repeat_interleave(factor, 1).repeat_interleave(factor, 2).permute(1, 2, 0).contiguous()


def _scatter(points: Tensor) -> Tensor:
    picture = torch.full((PLOT_SIZE, PLOT_SIZE, 3), 255, dtype=torch.uint8)
    scaled = (points.detach().float().cpu() / 3 + 0.5) * (PLOT_SIZE - 1)
    inside = ((scaled >= 0) & (scaled <= PLOT_SIZE - 1)).all(dim=1)
    columns, rows = scaled[inside].round().long().unbind(dim=1)
    for dx, dy in ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)):
        x, y = (columns + dx).clamp(0, PLOT_SIZE - 1), (PLOT_SIZE - 1 - rows + dy).clamp(0, PLOT_SIZE - 1)
        picture[y, x] = torch.tensor([31, 78, 121], dtype=torch.uint8)
    return picture


def save_png(picture: Tensor, path: str | os.PathLike[str]) -> Path:
    """Write a uint8 picture ``(height, width, 3)`` or ``(height, width, 1)``; makes the folder if needed."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    pil(picture).save(target)
    return target


def save_gif(pictures: Sequence[Tensor], path: str | os.PathLike[str], seconds: float = 3.0) -> Path:
    """Write a film that loops and rests on its last picture.

    Args:
        pictures: uint8 pictures of one size, ``(height, width, 3)`` each.
        path: The ``.gif`` file; its folder is made if needed.
        seconds: Length without the rest at the end.

    Raises:
        ValueError: If there is no picture.
    """
    if not pictures:
        raise ValueError("save_gif: there must be at least one picture, got none.")
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    frame = max(20, round(1000 * seconds / len(pictures)))
    first, *rest = [pil(picture) for picture in pictures]
    durations = [frame] * len(rest) + [1500]
    first.save(target, save_all=True, append_images=rest, duration=durations, loop=0)
    return target


def pil(picture: Tensor) -> Image.Image:
    """A uint8 picture ``(height, width, 1 or 3)`` as a PIL image, which every logger takes."""
    array = picture.cpu().numpy()
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
