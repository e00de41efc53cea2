"""Pixel blitting and geometric operations of ADA, composed into one matrix and one resampling.

Source: Karras et al. 2020, app. B (arXiv:2006.06676). Matrices are written from the paper's, and inverted: they take a
place in the result to the place it comes from, in pixels from the image's centre, x to the right and y down.
"""

from __future__ import annotations

import math
from collections.abc import Container
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lit_generative.gan.augmentation.draws import Draws

_BILINEAR, _REFLECTION = 0, 2
REACH = 0.125
"""Largest integer translation, and standard deviation of the fractional one, as a share of the size."""


def warp(x: Tensor, draws: Draws, operations: Container[str]) -> Tensor:
    """Move, turn and scale each image by its own draw; beyond its border it is continued by reflection.

    Bilinear at the image's own resolution. The paper does it at twice that between wavelet filters, which blurs less
    and costs several times as much. Blitting alone copies pixels, up to rounding, and an image that no operation acts
    on stays as it is.

    Args:
        x: Images ``(N, C, H, W)``.
        draws: Their random numbers.
        operations: Which of ``x_flip``, ``rotate_90``, ``translate_integer``, ``scale``, ``rotate``,
            ``scale_anisotropic``, ``translate``.

    Returns:
        Same shape, twice differentiable in ``x``.
    """
    H, W = x.shape[2:]
    matrix = inverse_transform(draws, operations, H, W)
    changed = (matrix != torch.eye(3, device=x.device, dtype=x.dtype)).flatten(1).any(dim=1)
    warped: Tensor = _Resample.apply(x, sampling_grid(matrix, H, W))
    return torch.where(changed[:, None, None, None], warped, x)


def inverse_transform(draws: Draws, operations: Container[str], H: int, W: int) -> Tensor:
    """Where each place of the result comes from, ``(N, 3, 3)``."""
    steps = [
        ("x_flip", _x_flip),
        ("rotate_90", _rotate_90),
        ("translate_integer", _translate_integer),
        ("scale", _scale),
        ("rotate", _rotate),
        ("scale_anisotropic", _scale_anisotropic),
        ("rotate", _rotate),
        ("translate", _translate),
    ]
    one = torch.ones(len(draws.x), device=draws.x.device, dtype=draws.x.dtype)
    matrix = scaling(one, one)
    for name, step in steps:
        if name in operations:
            matrix = product(matrix, step(draws, H, W))
    return matrix


def _x_flip(draws: Draws, _H: int, _W: int) -> Tensor:
    sign = 1 - 2 * torch.where(draws.acts(), draws.integers(2), 0.0)
    return scaling(sign, torch.ones_like(sign))


def _rotate_90(draws: Draws, _H: int, _W: int) -> Tensor:
    angle = torch.where(draws.acts(), draws.integers(4), 0.0) * (math.pi / 2)
    return rotation(angle).round()  # the cosine of a right angle is not quite zero


def _translate_integer(draws: Draws, H: int, W: int) -> Tensor:
    acts, x, y = draws.acts(), draws.uniform(-REACH, REACH), draws.uniform(-REACH, REACH)
    return translation(torch.where(acts, (x * W).round(), 0.0), torch.where(acts, (y * H).round(), 0.0))


def _scale(draws: Draws, _H: int, _W: int) -> Tensor:
    factor = torch.where(draws.acts(), draws.power_of_two(0.2), 1.0)
    return scaling(1 / factor, 1 / factor)


def _rotate(draws: Draws, _H: int, _W: int) -> Tensor:
    # One of two: with this probability of each, an image is turned at all with probability p.
    acts = draws.acts(1 - (1 - draws.p).sqrt())
    return rotation(torch.where(acts, draws.uniform(-math.pi, math.pi), 0.0))


def _scale_anisotropic(draws: Draws, _H: int, _W: int) -> Tensor:
    factor = torch.where(draws.acts(), draws.power_of_two(0.2), 1.0)
    return scaling(1 / factor, factor)


def _translate(draws: Draws, H: int, W: int) -> Tensor:
    acts, x, y = draws.acts(), draws.normal(REACH), draws.normal(REACH)
    return translation(torch.where(acts, x * W, 0.0), torch.where(acts, y * H, 0.0))


def scaling(x: Tensor, y: Tensor) -> Tensor:
    """Factors ``(N,)`` along the axes, as ``(N, 3, 3)``."""
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    return torch.stack([x, zero, zero, zero, y, zero, zero, zero, one], dim=1).view(-1, 3, 3)


def rotation(angle: Tensor) -> Tensor:
    """Turn by ``angle`` radians, ``(N,)``, from x to y, as ``(N, 3, 3)``."""
    cos, sin, zero, one = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
    return torch.stack([cos, -sin, zero, sin, cos, zero, zero, zero, one], dim=1).view(-1, 3, 3)


def translation(x: Tensor, y: Tensor) -> Tensor:
    """Where an image that moves by ``x`` and ``y`` pixels, each ``(N,)``, comes from: ``(N, 3, 3)``."""
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    return torch.stack([one, zero, -x, zero, one, -y, zero, zero, one], dim=1).view(-1, 3, 3)


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of ``(N, K, K)``, never in TF32, whose rounding would move pixels."""
    return (a[:, :, :, None] * b[:, None, :, :]).sum(dim=2)


def sampling_grid(matrix: Tensor, H: int, W: int) -> Tensor:
    """What ``grid_sample`` reads, ``(N, H, W, 2)``, of matrices ``(N, 3, 3)``.

    Not torch's ``affine_grid``, whose product may be in TF32.
    """
    x = torch.arange(W, device=matrix.device, dtype=matrix.dtype) - (W - 1) / 2
    y = torch.arange(H, device=matrix.device, dtype=matrix.dtype)[:, None] - (H - 1) / 2
    m = matrix[:, :2, :, None, None]
    places = m[:, :, 0] * x + m[:, :, 1] * y + m[:, :, 2]
    return torch.stack([places[:, 0] * (2 / W), places[:, 1] * (2 / H)], dim=-1)


class _Resample(torch.autograd.Function):
    """``grid_sample``, linear in images: its gradient is its transpose, and that one's is itself.

    Gradient penalties need the second derivative, which torch has not had in every version; none needs the grid's.
    """

    @staticmethod
    @override
    def forward(ctx: Any, x: Tensor, grid: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(grid)
        return torch.ops.aten.grid_sampler_2d(x, grid, _BILINEAR, _REFLECTION, False)

    @staticmethod
    @override
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _ResampleTransposed.apply(gradient, *ctx.saved_tensors), None


class _ResampleTransposed(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx: Any, gradient: Tensor, grid: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(grid)
        # Of the images only the shape is read, which is the gradient's.
        images = gradient.contiguous()
        options = (_BILINEAR, _REFLECTION, False, (True, False))
        return torch.ops.aten.grid_sampler_2d_backward(images, images, grid, *options)[0]

    @staticmethod
    @override
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _Resample.apply(gradient, *ctx.saved_tensors), None
