"""A model whose evidence is known in closed form, and two examples to compute by hand."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.distributions import MultivariateNormal

from lit_generative.vae.distributions import reparameterize
from lit_generative.vae.likelihoods import Gaussian
from lit_generative.vae.objectives import Draws


class LinearGaussian:
    """``z ~ N(0, I)``, ``x = W z + b + sigma * eps``: evidence and posterior in closed form.

    The columns of W are orthogonal, so the true posterior is a diagonal Gaussian, as an encoder's is.
    """

    sigma = 0.6

    def __init__(self, num: int = 5) -> None:
        generator = torch.Generator().manual_seed(0)
        basis, _ = torch.linalg.qr(torch.randn(6, 2, generator=generator, dtype=torch.float64))
        self.weight = basis * torch.tensor([1.5, 0.4], dtype=torch.float64)
        self.bias = torch.randn(6, generator=generator, dtype=torch.float64)
        covariance = self.weight @ self.weight.T + self.sigma**2 * torch.eye(6, dtype=torch.float64)
        self.x = torch.randn(num, 6, generator=generator, dtype=torch.float64)
        self.log_evidence = MultivariateNormal(self.bias, covariance).log_prob(self.x)

    def posterior(self) -> tuple[torch.Tensor, torch.Tensor]:
        precision = 1 + self.weight.square().sum(dim=0) / self.sigma**2
        mean = (self.x - self.bias) @ self.weight / self.sigma**2 / precision
        return mean, -precision.log().expand_as(mean)

    def draws(self, mean: torch.Tensor, logvar: torch.Tensor, num_draws: int) -> Draws:
        z = reparameterize(mean, logvar, num_draws)
        output = z @ self.weight.T + self.bias
        x = self.x.expand_as(output).flatten(0, 1)
        log_likelihood = Gaussian(self.sigma).log_prob(output.flatten(0, 1), x)
        return Draws(log_likelihood.unflatten(0, output.shape[:2]), z, mean, logvar)


def two_examples() -> Draws:
    """Three draws for each of two examples; KL of 0.5 and 4."""
    log_likelihood = torch.tensor([[-1.0, -20.0], [-2.0, -30.0], [-6.0, -40.0]])
    mean = torch.tensor([[1.0, 0.0], [2.0, -2.0]])
    return Draws(log_likelihood, torch.full((3, 2, 2), torch.nan), mean, torch.zeros(2, 2))


def two_examples_with_draws() -> Draws:
    return replace(two_examples(), z=torch.randn(3, 2, 2))
