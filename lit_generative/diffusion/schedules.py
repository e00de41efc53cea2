"""Noise schedules: how much of the image and of the noise ``x_t = alpha * x0 + sigma * eps`` holds at time t."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lit_generative.recipe import Recorded


class NoiseSchedule(Recorded, nn.Module):
    """A discrete, variance-preserving schedule: ``alpha**2 = alphas_cumprod``, ``sigma**2 = 1 - alphas_cumprod``.

    Source: Ho et al. 2020, eq. 4 (arXiv:2006.11239).

    Args:
        betas: Variance added at each step, ``(num_timesteps,)`` float64, each in ``(0, 1)``.

    Raises:
        ValueError: If a beta lies outside ``(0, 1)``.
    """

    alphas: Tensor
    sigmas: Tensor

    def __init__(self, betas: Tensor) -> None:
        super().__init__()
        if not ((betas > 0) & (betas < 1)).all():
            raise ValueError(
                f"{type(self).__name__}: every beta must lie in (0, 1), got {betas.min():g} to {betas.max():g}."
            )
        self.alphas_cumprod = (1 - betas).cumprod(0)  # float64 on the CPU, for exact steps of a sampler
        # Not in the state_dict: the constructor's arguments say it all. The last entry is that of clean data.
        exact = torch.cat([self.alphas_cumprod, torch.ones(1, dtype=torch.float64)])
        self.register_buffer("alphas", exact.sqrt().float(), persistent=False)
        self.register_buffer("sigmas", (1 - exact).sqrt().float(), persistent=False)

    @property
    def num_timesteps(self) -> int:
        """Number of noise levels; t lies in ``[0, num_timesteps)``, noisier with t."""
        return len(self.alphas_cumprod)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of image and noise.

        Args:
            t: int64 in ``[0, num_timesteps)``, any shape; -1 means clean data (alpha 1, sigma 0).

        Returns:
            ``alpha`` and ``sigma``, float32, of the shape of ``t``.
        """
        return self.alphas[t], self.sigmas[t]

    def exact_alpha_sigma(self, t: int) -> tuple[float, float]:
        """The same for one time, in double precision: a sampler divides differences of neighbouring times."""
        alphas_cumprod = 1.0 if t < 0 else float(self.alphas_cumprod[t])
        return alphas_cumprod**0.5, (1 - alphas_cumprod) ** 0.5


class LinearSchedule(NoiseSchedule):
    """Betas on a straight line.

    Source: Ho et al. 2020, sec. 4 (arXiv:2006.11239).

    Args:
        num_timesteps: Number of noise levels.
        beta_start: First beta.
        beta_end: Last beta.
    """

    def __init__(self, num_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> None:
        _check_length(self, num_timesteps)
        super().__init__(torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64))


class CosineSchedule(NoiseSchedule):
    """``alphas_cumprod`` along a squared cosine, betas at most 0.999.

    Source: Nichol & Dhariwal 2021, eq. 17 (arXiv:2102.09672).

    Args:
        num_timesteps: Number of noise levels.
        offset: The paper's s, which keeps the first betas from being too small.
    """

    def __init__(self, num_timesteps: int = 1000, offset: float = 0.008) -> None:
        _check_length(self, num_timesteps)
        steps = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
        f = torch.cos((steps + offset) / (1 + offset) * math.pi / 2).square()
        super().__init__((1 - f[1:] / f[:-1]).clamp(max=0.999))


def _check_length(schedule: NoiseSchedule, num_timesteps: int) -> None:
    if num_timesteps < 1:
        raise ValueError(f"{type(schedule).__name__}: num_timesteps must be at least 1, got {num_timesteps}.")
