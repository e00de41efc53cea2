"""How networks read a time: one scale for discrete steps and continuous times, and its sinusoidal features."""

from __future__ import annotations

import math

import torch
from torch import Tensor

CONTINUOUS_TIME_SCALE = 1000.0
"""A float time of 1 is read like step 1000: the sinusoidal frequencies are made for times of that size."""


def embeddable_time(t: Tensor) -> Tensor:
    """Bring continuous times to the scale of discrete steps; leave steps alone.

    Args:
        t: int64 steps in ``[0, num_timesteps)``, or float times in ``[0, 1]``, ``(N,)``.

    Returns:
        Integer ``t`` unchanged; floating ``t`` times :data:`CONTINUOUS_TIME_SCALE`, in at least float32; ``(N,)``.
    """
    if not t.is_floating_point():
        return t
    return t.to(torch.promote_types(t.dtype, torch.float32)) * CONTINUOUS_TIME_SCALE


def sinusoidal_embedding(t: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Cosines and sines of ``t`` at ``dim / 2`` frequencies from 1 down to ``1 / max_period``, spaced evenly in log.

    Source: Vaswani et al. 2017, sec. 3.5 (arXiv:1706.03762), as used by Ho et al. 2020 (arXiv:2006.11239).

    Args:
        t: Times, ``(N,)``; see :func:`embeddable_time` for their scale.
        dim: How many features; even.
        max_period: The slowest feature has the period ``2 * pi * max_period``.

    Returns:
        Features in ``[-1, 1]``, cosines first, ``(N, dim)``, float32 (float64 if ``t`` is).

    Raises:
        ValueError: If ``dim`` is not a positive even number of at least 4.
    """
    if dim < 4 or dim % 2:
        raise ValueError(f"sinusoidal_embedding: dim must be even and at least 4, got {dim}.")
    dtype = torch.promote_types(t.dtype, torch.float32)
    exponents = torch.linspace(0.0, 1.0, dim // 2, dtype=dtype, device=t.device)
    angles = t.to(dtype)[:, None] * torch.exp(-math.log(max_period) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=1)
