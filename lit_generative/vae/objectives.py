"""Bounds on the log-likelihood, as losses: one value per example, in nats."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from lit_generative.recipe import Recorded
from lit_generative.vae.distributions import normal_log_prob
from lit_generative.vae.priors import Encoder, Prior, StandardNormal


def _no_encoder(_: Tensor) -> tuple[Tensor, Tensor]:
    raise ValueError("Draws: this prior asks the encoder. Give Draws the model's.")


class BaseDraws(NamedTuple):
    """What a flow made the draws of."""

    z0: Tensor
    """Draws from ``N(mean, exp(logvar))``, ``(K, N, D)``."""
    log_det: Tensor
    """``log |det|`` of the Jacobian ``dz / dz0``, nats, ``(K, N)``."""


@dataclass(frozen=True)
class Draws:
    """What an objective is made of: K draws ``z ~ q(z|x)`` for each of N examples; what is not asked for costs nothing.

    The posterior is ``N(mean, exp(logvar))``, or what a flow makes of it.

    Args:
        log_likelihood: ``log p(x|z)``, nats, ``(K, N)``.
        z: The draws, ``(K, N, D)``.
        mean: Mean of the Gaussian, ``(N, D)``.
        logvar: Logarithm of its variance, ``(N, D)``.
        prior: ``p(z)``.
        encoder: The model's, for a prior that asks it.
        kl_weight: Factor on every objective's KL term; below 1 while it is warmed up.
        capacity: Nats that :class:`Capacity` aims at now; None leaves it at its own.
        base: Where the flow started; None if there is none, and ``z`` are draws from the Gaussian.
    """

    log_likelihood: Tensor
    z: Tensor
    mean: Tensor
    logvar: Tensor
    prior: Prior = field(default_factory=StandardNormal)
    encoder: Encoder = _no_encoder
    kl_weight: float = 1.0
    capacity: float | None = None
    base: BaseDraws | None = None

    @cached_property
    def log_prior(self) -> Tensor:
        """``log p(z)``, nats, ``(K, N)``."""
        return self.prior.log_prob(self.z, self.encoder)

    @cached_property
    def log_posterior(self) -> Tensor:
        """``log q(z|x)``, nats, ``(K, N)``."""
        if self.base is None:
            return normal_log_prob(self.z, self.mean, self.logvar)
        return normal_log_prob(self.base.z0, self.mean, self.logvar) - self.base.log_det

    @cached_property
    def kl_by_dimension(self) -> Tensor | None:
        """``KL(q(z|x) || p(z))`` of each dimension, nats, ``(N, D)``; None if prior or flow leave no closed form."""
        return None if self.base is not None else self.prior.kl_by_dimension(self.mean, self.logvar)

    @cached_property
    def kl(self) -> Tensor:
        """``KL(q(z|x) || p(z))``, nats, ``(N,)``: in closed form if there is one, else the mean over the draws."""
        if self.kl_by_dimension is not None:
            return self.kl_by_dimension.sum(dim=1)
        return (self.log_posterior - self.log_prior).mean(dim=0)

    @cached_property
    def log_weight(self) -> Tensor:
        """``log p(x, z) / q(z|x)``, nats, ``(K, N)``: importance weights of the draws."""
        return self.log_likelihood + self.log_prior - self.log_posterior


class Objective(Recorded, ABC):
    """What a VAE minimizes."""

    num_draws: int = 1
    """Draws of ``z`` for each example."""
    has_capacity: bool = False
    """Whether it aims at a KL of its draws' capacity."""

    @abstractmethod
    def loss(self, draws: Draws) -> Tensor:
        """Loss per example, ``(N,)``."""

    def check_flow(self) -> None:
        """Refuse a posterior that a flow makes, if this objective needs a Gaussian one; most do not.

        Raises:
            ValueError: If it does.
        """

    def check_prior(self, prior: Prior) -> None:
        """Refuse a prior that has no KL of each dimension, if this objective needs it; most do not.

        Raises:
            ValueError: If it does.
        """

    def terms(self, draws: Draws) -> dict[str, Tensor]:  # noqa: ARG002  most have none of their own
        """What is logged beside reconstruction, KL and ELBO: values ``(N,)`` by name."""
        return {}


class Elbo(Objective):
    """Negative evidence lower bound, with weight ``beta`` on the KL term.

    Source: Kingma & Welling 2014, eq. 7 (arXiv:1312.6114); Higgins et al. 2017, eq. 4 (beta-VAE); free bits: Kingma et
    al. 2016, app. C.8 (arXiv:1606.04934), with each dimension of the latent as a group.

    Args:
        beta: Weight of the KL term; 1 is the bound itself.
        free_bits: Nats of each dimension that cost nothing more to use: a dimension whose KL, as a mean over the batch,
            is below, counts as that constant.
        num_draws: Draws that the likelihood is averaged over; the bound stays the same.

    Raises:
        ValueError: If ``beta`` or ``free_bits`` is negative, ``num_draws`` below 1, or free bits meet a prior or a flow
            without a KL for each dimension.
    """

    def __init__(self, beta: float = 1.0, free_bits: float = 0.0, num_draws: int = 1) -> None:
        for name, value in (("beta", beta), ("free_bits", free_bits)):
            if not 0 <= value < math.inf:
                raise ValueError(f"Elbo: {name} must not be negative, got {value}.")
        if num_draws < 1:
            raise ValueError(f"Elbo: num_draws must be at least 1, got {num_draws}.")
        self.beta, self.free_bits, self.num_draws = beta, free_bits, num_draws

    @override
    def loss(self, draws: Draws) -> Tensor:
        return self.beta * draws.kl_weight * self._kl(draws) - draws.log_likelihood.mean(dim=0)

    @override
    def check_flow(self) -> None:
        if self.free_bits > 0:
            raise ValueError(
                f"Elbo: free_bits={self.free_bits} needs the KL of each dimension, which a posterior with a flow has "
                "not in closed form. Leave the flow out, or use free_bits=0."
            )

    @override
    def check_prior(self, prior: Prior) -> None:
        if self.free_bits > 0:
            raise ValueError(
                f"Elbo: free_bits={self.free_bits} needs the KL of each dimension, which {type(prior).__name__} has "
                "not in closed form. Use StandardNormal, or free_bits=0."
            )

    def _kl(self, draws: Draws) -> Tensor:
        kl = draws.kl_by_dimension
        if self.free_bits > 0 and kl is None:
            if draws.base is not None:
                self.check_flow()
            self.check_prior(draws.prior)
        if self.free_bits == 0 or kl is None:
            return draws.kl
        return torch.where(kl.mean(dim=0) > self.free_bits, kl, self.free_bits).sum(dim=1)


class Capacity(Objective):
    """Negative log-likelihood plus ``gamma |KL - capacity|``: the code may hold that many nats, neither more nor fewer.

    The callback ``CapacitySchedule`` raises the capacity in the course of training.

    Source: Burgess et al. 2018, eq. 8 (arXiv:1804.03599).

    Args:
        gamma: Strength.
        capacity: Nats aimed at.

    Raises:
        ValueError: If ``gamma`` is not positive, or ``capacity`` negative.
    """

    has_capacity = True

    def __init__(self, gamma: float = 100.0, capacity: float = 25.0) -> None:
        if not 0 < gamma < math.inf:
            raise ValueError(f"Capacity: gamma must be positive, got {gamma}.")
        if not 0 <= capacity < math.inf:
            raise ValueError(f"Capacity: capacity must not be negative, got {capacity}.")
        self.gamma, self.capacity = gamma, capacity

    @override
    def loss(self, draws: Draws) -> Tensor:
        capacity = self.capacity if draws.capacity is None else draws.capacity
        return self.gamma * draws.kl_weight * (draws.kl - capacity).abs() - draws.log_likelihood.mean(dim=0)


class ImportanceWeighted(Objective):
    """Negative ``log 1/K sum_k p(x, z_k) / q(z_k|x)``: a bound that tightens as K grows (IWAE).

    Source: Burda, Grosse & Salakhutdinov 2016, eq. 8 (arXiv:1509.00519); doubly reparameterized gradient: Tucker et
    al. 2019, eq. 8 (arXiv:1810.04152).

    Args:
        num_draws: K.
        doubly_reparameterized: Whether the encoder learns by the gradient whose signal does not fade as K grows. The
            loss is the same number.

    Raises:
        ValueError: If ``num_draws`` is below 1, or the doubly reparameterized gradient meets a flow.
    """

    def __init__(self, num_draws: int = 5, doubly_reparameterized: bool = False) -> None:
        if num_draws < 1:
            raise ValueError(
                f"ImportanceWeighted: num_draws must be at least 1, got {num_draws}. The paper uses 5, 50."
            )
        self.num_draws, self.doubly_reparameterized = num_draws, doubly_reparameterized

    @override
    def check_flow(self) -> None:
        if self.doubly_reparameterized:
            raise ValueError(
                "ImportanceWeighted: doubly_reparameterized=True needs log q(z|x) as a function of z alone, for which "
                "a flow would have to be inverted. Leave the flow out, or use doubly_reparameterized=False."
            )

    @override
    def loss(self, draws: Draws) -> Tensor:
        if draws.base is not None:
            self.check_flow()
        posterior = draws.log_posterior
        if self.doubly_reparameterized:
            posterior = normal_log_prob(draws.z, draws.mean.detach(), draws.logvar.detach())
        log_weight = draws.log_likelihood + draws.kl_weight * (draws.log_prior - posterior)
        if self.doubly_reparameterized and draws.z.requires_grad:
            share = log_weight.detach().softmax(dim=0)
            # The bound's own gradient has one factor of the shares, this one two.
            draws.z.register_hook(lambda gradient: share.unsqueeze(2) * gradient)
        return -importance_bound(log_weight)

    @override
    def terms(self, draws: Draws) -> dict[str, Tensor]:
        return {"iwae": importance_bound(draws.log_weight)}


def importance_bound(log_weight: Tensor) -> Tensor:
    """``log 1/K sum_k w_k`` of log-weights ``(K, N)``: ``(N,)``, nats. Source: Burda et al. 2016 (arXiv:1509.00519)."""
    return torch.logsumexp(log_weight, dim=0) - math.log(len(log_weight))
