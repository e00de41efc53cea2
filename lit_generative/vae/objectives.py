"""Bounds on the log-likelihood, as losses: one value per example, in nats."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor
from typing_extensions import override

from lit_generative.recipe import Recorded


class Draws(NamedTuple):
    """What an objective is made of: K draws ``z ~ q(z|x)`` for each of N examples; nats."""

    log_likelihood: Tensor
    """``log p(x|z)``, ``(K, N)``."""
    log_prior: Tensor
    """``log p(z)``, ``(K, N)``."""
    log_posterior: Tensor
    """``log q(z|x)``, ``(K, N)``."""
    kl: Tensor
    """``KL(q(z|x) || p(z))`` in closed form, ``(N,)``."""


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
