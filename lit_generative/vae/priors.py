"""Distributions of the latent before anything is seen: the standard normal, and mixtures of Gaussians."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from lit_generative.recipe import Recorded
from lit_generative.tensor_ops import Generators, randn, uniform
from lit_generative.vae.distributions import kl_to_standard_normal, normal_log_prob

Encoder = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Images ``(N, C, H, W)`` to mean and logvar, each ``(N, D)``."""


class Prior(Recorded, nn.Module, ABC):
    """Distribution ``p(z)``; it may have parameters of its own, and may ask the encoder."""

    @abstractmethod
    def log_prob(self, z: Tensor, encoder: Encoder) -> Tensor:
        """Log-density.

        Args:
            z: Where, ``(K, N, D)``.
            encoder: The model's, which VampPrior is made of.

        Returns:
            Nats, ``(K, N)``.
        """

    @abstractmethod
    def sample(self, num: int, latent_dim: int, encoder: Encoder, generator: Generators = None) -> Tensor:
        """Draw ``(num, latent_dim)``, on the prior's or the encoder's device; ``generator`` as in ``randn``."""

    def kl_by_dimension(self, mean: Tensor, logvar: Tensor) -> Tensor | None:  # noqa: ARG002  most have no such form
        """``KL(N(mean, exp(logvar)) || p)`` of each dimension, nats, ``(N, D)``; None if there is no closed form."""
        return None


class StandardNormal(Prior):
    """``N(0, I)``, without parameters.

    Source: Kingma & Welling 2014, sec. 3 (arXiv:1312.6114).
    """

    @override
    def log_prob(self, z: Tensor, encoder: Encoder) -> Tensor:
        return normal_log_prob(z, torch.zeros_like(z[0]), torch.zeros_like(z[0]))

    @override
    def sample(self, num: int, latent_dim: int, encoder: Encoder, generator: Generators = None) -> Tensor:
        return randn((num, latent_dim), generator)

    @override
    def kl_by_dimension(self, mean: Tensor, logvar: Tensor) -> Tensor:
        return kl_to_standard_normal(mean.reshape(-1, 1), logvar.reshape(-1, 1)).view_as(mean)


class Components(NamedTuple):
    """A mixture of M diagonal Gaussians."""

    mean: Tensor
    """``(M, D)``."""
    logvar: Tensor
    """``(M, D)``."""
    log_weight: Tensor
    """``(M,)``, normalized."""

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density at ``z``, ``(..., D)``: nats, ``(...)``."""
        if z.device.type == "mps":  # has no float64, without which the products below would cancel
            each = normal_log_prob(z.unsqueeze(-2), self.mean, self.logvar)
            return torch.logsumexp(self.log_weight + each, dim=-1)
        # Two matrix products instead of (..., M, D) differences: a tenth of the time, and of the memory.
        wide, mean, logvar = z.double(), self.mean.double(), self.logvar.double()
        precision = (-logvar).exp()
        squares = wide.square() @ precision.T - 2 * wide @ (mean * precision).T + (mean.square() * precision).sum(dim=1)
        each = -0.5 * (squares + (logvar + math.log(2 * math.pi)).sum(dim=1))
        return torch.logsumexp(self.log_weight + each, dim=-1).to(z.dtype)

    def sample(self, num: int, generator: Generators) -> Tensor:
        """Draw ``(num, D)``: a component, then a point of it."""
        edges = self.log_weight.exp().cumsum(dim=0)
        chosen = torch.searchsorted(edges, uniform((num,), generator, edges.device).to(edges.dtype))
        chosen = chosen.clamp(max=len(edges) - 1)  # weights sum to one up to rounding
        noise = randn((num, self.mean.shape[1]), generator, edges.device)
        return self.mean[chosen] + (0.5 * self.logvar[chosen]).exp() * noise


class GaussianMixturePrior(Prior):
    """A mixture of diagonal Gaussians, whose means, variances and weights are learned with the model.

    Source: the "MoG" prior of Tomczak & Welling 2018, sec. 4 (arXiv:1705.07120).

    Args:
        latent_dim: Length of the latent, D.
        num_components: How many Gaussians, M.

    Raises:
        ValueError: If a number is below 1.
    """

    def __init__(self, latent_dim: int, num_components: int = 100) -> None:
        super().__init__()
        for name, value in (("latent_dim", latent_dim), ("num_components", num_components)):
            if value < 1:
                raise ValueError(f"GaussianMixturePrior: {name} must be at least 1, got {value}.")
        self.latent_dim = latent_dim
        self.mean = nn.Parameter(torch.randn(num_components, latent_dim))
        self.logvar = nn.Parameter(torch.zeros(num_components, latent_dim))
        self.logit = nn.Parameter(torch.zeros(num_components))

    def _components(self) -> Components:
        return Components(self.mean, self.logvar, self.logit.log_softmax(dim=0))

    @override
    def log_prob(self, z: Tensor, encoder: Encoder) -> Tensor:
        return self._components().log_prob(z)

    @override
    def sample(self, num: int, latent_dim: int, encoder: Encoder, generator: Generators = None) -> Tensor:
        return self._components().sample(num, generator)


class VampPrior(Prior):
    """The mean posterior of learned pseudo-inputs: ``p(z) = 1/M sum_m q(z | u_m)``.

    Source: Tomczak & Welling 2018, eq. 9 (arXiv:1705.07120). There a pseudo-input lies in ``[0, 1]`` by a hard tanh;
    here a tanh brings it to ``[-1, 1]``, which leaves no pixel without a gradient.

    Args:
        sample_shape: Shape of a pseudo-input, that of an image, as in ``(1, 8, 8)``.
        num_components: How many, M; the paper uses 500.
        from_data: Begin with training images, see :meth:`begin_with`; else with noise, which large images need many
            updates to turn into something that the encoder knows.

    Raises:
        ValueError: If ``num_components`` is below 1.
    """

    def __init__(self, sample_shape: tuple[int, ...], num_components: int = 500, from_data: bool = False) -> None:
        super().__init__()
        if num_components < 1:
            raise ValueError(f"VampPrior: num_components must be at least 1, got {num_components}.")
        self.sample_shape = tuple(sample_shape)
        self.from_data = from_data
        self.pseudo_inputs = nn.Parameter(torch.randn(num_components, *sample_shape))

    @torch.no_grad()
    def begin_with(self, images: Tensor) -> None:
        """Make the pseudo-inputs these images, ``(M, *sample_shape)`` in ``[-1, 1]``, scaled to 0.95 of their contrast.

        Raises:
            ValueError: If there are not M.
        """
        if images.shape != self.pseudo_inputs.shape:
            raise ValueError(
                f"VampPrior: begins with {len(self.pseudo_inputs)} images of shape {self.sample_shape}, got "
                f"{tuple(images.shape)}. Lower num_components, or leave from_data out."
            )
        self.pseudo_inputs.copy_((0.95 * images).atanh())

    def _components(self, encoder: Encoder) -> Components:
        mean, logvar = (value.float() for value in encoder(self.pseudo_inputs.tanh()))
        return Components(mean, logvar, mean.new_full((len(mean),), 1 / len(mean)).log())

    @override
    def log_prob(self, z: Tensor, encoder: Encoder) -> Tensor:
        return self._components(encoder).log_prob(z)

    @override
    def sample(self, num: int, latent_dim: int, encoder: Encoder, generator: Generators = None) -> Tensor:
        return self._components(encoder).sample(num, generator)
