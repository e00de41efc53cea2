"""Gaussians of the latent space: log-densities, divergence and draws."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def kl_to_standard_normal(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL divergence ``KL(N(mean, exp(logvar)) || N(0, I))``, at least zero.

    Source: Kingma & Welling 2014, App. B (arXiv:1312.6114).

    Args:
        mean: Posterior mean, ``(N, D)``.
        logvar: Logarithm of the posterior variance, ``(N, D)``.

    Returns:
        Nats per example, ``(N,)``.
    """
    return 0.5 * (mean.square() + logvar.exp() - logvar - 1).sum(dim=1)


def normal_log_prob(z: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    """Log-density of a diagonal Gaussian.

    Args:
        z: Where, ``(..., N, D)``.
        mean: Mean, broadcastable to ``z``.
        logvar: Logarithm of the variance, broadcastable to ``z``.

    Returns:
        Nats, ``(..., N)``.
    """
    return -0.5 * ((z - mean).square() / logvar.exp() + logvar + math.log(2 * math.pi)).sum(dim=-1)


def reparameterize(mean: Tensor, logvar: Tensor, num_draws: int = 1) -> Tensor:
    """Draw ``z = mean + sigma * eps`` so that gradients reach both.

    Source: Kingma & Welling 2014, eq. 4 (arXiv:1312.6114).

    Args:
        mean: ``(N, D)``.
        logvar: ``(N, D)``.
        num_draws: Draws for each example.

    Returns:
        ``(num_draws, N, D)``.
    """
    eps = torch.randn(num_draws, *mean.shape, dtype=mean.dtype, device=mean.device)
    return mean + (0.5 * logvar).exp() * eps
