"""Colour operations of ADA, composed into one matrix.

Source: Karras et al. 2020, app. B (arXiv:2006.06676). A grey image has brightness, contrast and luma flip alone: the
others turn about the grey axis or scale the distance from it, and there is nothing but that axis.
"""

from __future__ import annotations

import math
from collections.abc import Container

import torch
from torch import Tensor

from lit_generative.gan.augmentation.draws import Draws
from lit_generative.gan.augmentation.warping import product


def recolor(x: Tensor, draws: Draws, operations: Container[str]) -> Tensor:
    """Change the colours of each image by its own draw; nothing is clamped, as in the paper.

    Args:
        x: Images ``(N, C, H, W)``, grey or RGB, in ``[-1, 1]``.
        draws: Their random numbers.
        operations: Which of ``brightness``, ``contrast``, ``luma_flip``, ``hue``, ``saturation``.

    Returns:
        Same shape; an image that no operation acts on stays as it is.
    """
    C = x.shape[1]
    matrix = color_transform(draws, operations, C)
    changed = (matrix != torch.eye(C + 1, device=x.device, dtype=x.dtype)).flatten(1).any(dim=1)
    m = matrix[:, :C, :, None, None]
    recolored = m[:, :, C]
    for c in range(C):  # not a matrix product, which may be in TF32
        recolored = recolored + m[:, :, c] * x[:, c : c + 1]
    return torch.where(changed[:, None, None, None], recolored, x)


def color_transform(draws: Draws, operations: Container[str], channels: int) -> Tensor:
    """Homogeneous matrices ``(N, channels + 1, channels + 1)`` on colours."""
    steps = [("brightness", _brightness), ("contrast", _contrast), ("luma_flip", _luma_flip)]
    if channels == 3:
        steps += [("hue", _hue), ("saturation", _saturation)]
    identity = torch.eye(channels + 1, device=draws.x.device, dtype=draws.x.dtype)
    matrix = identity.repeat(len(draws.x), 1, 1)
    for name, step in steps:
        if name in operations:
            matrix = product(step(draws, channels), matrix)
    return matrix


def _brightness(draws: Draws, channels: int) -> Tensor:
    shift = torch.where(draws.acts(), draws.normal(0.2), 0.0)
    return _homogeneous(_eye(draws, channels).repeat(len(shift), 1, 1), shift)


def _contrast(draws: Draws, channels: int) -> Tensor:
    factor = torch.where(draws.acts(), draws.power_of_two(0.5), 1.0)
    return _homogeneous(factor[:, None, None] * _eye(draws, channels))


def _luma_flip(draws: Draws, channels: int) -> Tensor:
    flips = torch.where(draws.acts(), draws.integers(2), 0.0)
    return _homogeneous(_eye(draws, channels) - 2 * flips[:, None, None] * _grey(draws, channels))


def _hue(draws: Draws, channels: int) -> Tensor:
    # Rodrigues' formula about the grey axis.
    angle = torch.where(draws.acts(), draws.uniform(-math.pi, math.pi), 0.0)[:, None, None]
    identity, grey = _eye(draws, channels), _grey(draws, channels)
    cross = (identity.roll(1, dims=0) - identity.roll(-1, dims=0)) / math.sqrt(3)
    return _homogeneous(angle.cos() * identity + angle.sin() * cross + (1 - angle.cos()) * grey)


def _saturation(draws: Draws, channels: int) -> Tensor:
    factor = torch.where(draws.acts(), draws.power_of_two(1.0), 1.0)[:, None, None]
    grey = _grey(draws, channels)
    # Written so that a factor of 1 is exactly the identity.
    return _homogeneous(factor * _eye(draws, channels) + (1 - factor) * grey)


def _eye(draws: Draws, channels: int) -> Tensor:
    return torch.eye(channels, device=draws.x.device, dtype=draws.x.dtype)


def _grey(draws: Draws, channels: int) -> Tensor:
    """Projection onto the grey axis, ``(C, C)``: ``v v^T`` of the paper."""
    return torch.full((channels, channels), 1 / channels, device=draws.x.device, dtype=draws.x.dtype)


def _homogeneous(matrix: Tensor, shift: Tensor | None = None) -> Tensor:
    """Matrices ``(N, C, C)`` and one shift of all channels, ``(N,)``, as ``(N, C + 1, C + 1)``."""
    N, C, _ = matrix.shape
    column = matrix.new_zeros(N, C, 1) if shift is None else shift[:, None, None].expand(N, C, 1)
    last = torch.cat([matrix.new_zeros(N, 1, C), matrix.new_ones(N, 1, 1)], dim=2)
    return torch.cat([torch.cat([matrix, column], dim=2), last], dim=1)
