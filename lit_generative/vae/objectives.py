"""Bounds on the log-likelihood, as losses: one value per example, in nats."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from typing_extensions import override

from lit_generative.recipe import Recorded
from lit_generative.vae.distributions import kl_to_standard_normal, normal_log_prob


@dataclass(frozen=True)
class Draws:
    """What an objective is made of: K draws ``z ~ q(z|x)`` for each of N examples; what is not asked for costs nothing.

    Args:
        log_likelihood: ``log p(x|z)``, nats, ``(K, N)``.
        z: The draws, ``(K, N, D)``.
        mean: Mean of the posterior, ``(N, D)``.
        logvar: Logarithm of the posterior's variance, ``(N, D)``.
    """

    log_likelihood: Tensor
    z: Tensor
    mean: Tensor
    logvar: Tensor

    @cached_property
    def log_prior(self) -> Tensor:
        """``log p(z)``, nats, ``(K, N)``."""
        return normal_log_prob(self.z, torch.zeros_like(self.mean), torch.zeros_like(self.mean))

    @cached_property
    def log_posterior(self) -> Tensor:
        """``log q(z|x)``, nats, ``(K, N)``."""
        return normal_log_prob(self.z, self.mean, self.logvar)

    @cached_property
    def kl(self) -> Tensor:
        """``KL(q(z|x) || p(z))`` in closed form, nats, ``(N,)``."""
        return kl_to_standard_normal(self.mean, self.logvar)


class Objective(Recorded, ABC):
    """What a VAE minimizes."""

    num_draws: int = 1
    """Draws of ``z`` for each example."""

    @abstractmethod
    def loss(self, draws: Draws) -> Tensor:
        """Loss per example, ``(N,)``."""


class Elbo(Objective):
    """Negative evidence lower bound, with weight ``beta`` on the KL term.

    Source: Kingma & Welling 2014, eq. 7 (arXiv:1312.6114); Higgins et al. 2017, eq. 4 (beta-VAE).

    Args:
        beta: Weight of the KL term; 1 is the bound itself.

    Raises:
        ValueError: If ``beta`` is negative.
    """

    def __init__(self, beta: float = 1.0) -> None:
        if beta < 0:
            raise ValueError(f"Elbo: beta must not be negative, got {beta}.")
        self.beta = beta

    @override
    def loss(self, draws: Draws) -> Tensor:
        return self.beta * draws.kl - draws.log_likelihood.mean(dim=0)
