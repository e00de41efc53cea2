"""Objectives that look at the whole batch's codes: total correlation, and the maximum mean discrepancy."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from typing_extensions import override

from lit_generative.vae.objectives import Draws, Objective
from lit_generative.vae.priors import Prior


class TotalCorrelation(Objective):
    """ELBO whose KL term is taken apart, with a weight for each part (beta-TCVAE).

    ``KL = MI + TC + dimension-wise KL``: what the code tells of the example, how its dimensions depend on each other,
    and how far each is from the prior. ``q(z)`` is estimated from the batch by weighted sampling, so that the parts'
    sum is ``log q(z|x) - log p(z)`` at the draws, whatever the estimate.

    Source: Chen et al. 2018, eq. 2 and 4, app. C.1 (arXiv:1802.04942). It needs a prior whose dimensions are
    independent, so here the standard normal, and a Gaussian posterior: no flow.

    Args:
        dataset_size: Number of training examples.
        alpha: Weight of the mutual information.
        beta: Weight of the total correlation.
        gamma: Weight of the dimension-wise KL.

    Raises:
        ValueError: If ``dataset_size`` is below 1, a weight negative, the prior another, or there is a flow.
    """

    def __init__(self, dataset_size: int, alpha: float = 1.0, beta: float = 6.0, gamma: float = 1.0) -> None:
        if dataset_size < 1:
            raise ValueError(f"TotalCorrelation: dataset_size must be at least 1, got {dataset_size}.")
        for name, value in (("alpha", alpha), ("beta", beta), ("gamma", gamma)):
            if not 0 <= value < math.inf:
                raise ValueError(f"TotalCorrelation: {name} must not be negative, got {value}.")
        self.dataset_size, self.alpha, self.beta, self.gamma = dataset_size, alpha, beta, gamma

    @override
    def loss(self, draws: Draws) -> Tensor:
        parts = self.terms(draws)
        weighted = (
            self.alpha * parts["mutual_information"]
            + self.beta * parts["total_correlation"]
            + self.gamma * parts["dimension_kl"]
        )
        return draws.kl_weight * weighted - draws.log_likelihood.mean(dim=0)

    @override
    def check_flow(self) -> None:
        raise ValueError(
            "TotalCorrelation: needs each draw's density under the posterior of every example, for which a flow would "
            "have to be inverted. Leave the flow out."
        )

    @override
    def check_prior(self, prior: Prior) -> None:
        raise ValueError(
            f"TotalCorrelation: needs a prior of independent dimensions, got {type(prior).__name__}. Use "
            "StandardNormal."
        )

    @override
    def terms(self, draws: Draws) -> dict[str, Tensor]:
        if draws.base is not None:
            self.check_flow()
        if draws.kl_by_dimension is None:
            self.check_prior(draws.prior)
        z = draws.z
        num = len(draws.mean) * self.dataset_size
        # (K, N, N', D): each draw under the posterior of every example of the batch.
        difference = z.unsqueeze(2) - draws.mean
        each = -0.5 * (difference.square() / draws.logvar.exp() + draws.logvar + math.log(2 * math.pi))
        aggregate = torch.logsumexp(each.sum(dim=3), dim=2) - math.log(num)
        product = (torch.logsumexp(each, dim=2) - math.log(num)).sum(dim=2)
        parts = {
            "mutual_information": draws.log_posterior - aggregate,
            "total_correlation": aggregate - product,
            "dimension_kl": product - draws.log_prior,
        }
        return {name: value.mean(dim=0) for name, value in parts.items()}


class InfoVAE(Objective):
    """ELBO with less weight on each example's KL, and more on the distance of all codes from the prior.

    ``-log p(x|z) + (1 - alpha) KL(q(z|x) || p(z)) + (alpha + lambda_ - 1) MMD(q(z), p(z))``; the last is one number
    for the batch of each process, by the unbiased estimate with a Gaussian kernel; of a single image, as a test's last
    batch may be, it is 0. ``alpha=1`` is the MMD-VAE.

    Source: Zhao, Song & Ermon 2019, eq. 6 and sec. 3.2 (arXiv:1706.02262).

    Args:
        alpha: Share of the KL term that is taken away; at most 1.
        lambda_: Weight of the discrepancy.
        bandwidth: The kernel is ``exp(-|z - z'|^2 / (bandwidth D))``; the authors' code uses 1.

    Raises:
        ValueError: If ``alpha`` is above 1, ``alpha + lambda_`` below 1, or ``bandwidth`` not positive.
    """

    def __init__(self, alpha: float = 1.0, lambda_: float = 1000.0, bandwidth: float = 1.0) -> None:
        if not -math.inf < alpha <= 1:
            raise ValueError(f"InfoVAE: alpha must be at most 1, got {alpha}: the KL term's weight is 1 - alpha.")
        if not 1 <= alpha + lambda_ < math.inf:
            raise ValueError(f"InfoVAE: alpha + lambda_ must be at least 1, got {alpha} + {lambda_}.")
        if not 0 < bandwidth < math.inf:
            raise ValueError(f"InfoVAE: bandwidth must be positive, got {bandwidth}.")
        self.alpha, self.lambda_, self.bandwidth = alpha, lambda_, bandwidth

    @override
    def loss(self, draws: Draws) -> Tensor:
        bound = (1 - self.alpha) * draws.kl_weight * draws.kl - draws.log_likelihood.mean(dim=0)
        return bound + (self.alpha + self.lambda_ - 1) * draws.kl_weight * self.terms(draws)["mmd"]

    @override
    def terms(self, draws: Draws) -> dict[str, Tensor]:
        z = draws.z.flatten(0, 1)
        if len(z) < 2:
            if torch.is_grad_enabled():
                raise ValueError("InfoVAE: the discrepancy needs at least two codes, got a batch of 1. Enlarge it.")
            return {"mmd": z.new_zeros(len(draws.mean))}
        wanted = draws.prior.sample(len(z), z.shape[1], draws.encoder).to(z)
        return {"mmd": mean_discrepancy(z, wanted, self.bandwidth * z.shape[1]).expand(len(draws.mean))}


def mean_discrepancy(first: Tensor, second: Tensor, scale: float) -> Tensor:
    """Squared maximum mean discrepancy with the kernel ``exp(-|a - b|^2 / scale)``: unbiased, so it may be negative.

    Source: Gretton et al. 2012, eq. 3 (JMLR 13).

    Args:
        first: ``(N, D)``, at least two rows.
        second: ``(M, D)``, at least two rows.
        scale: Squared distance over which the kernel falls to 1/e.

    Returns:
        A scalar.

    Raises:
        ValueError: If a side has fewer than two rows.
    """
    if min(len(first), len(second)) < 2:
        raise ValueError(f"mean_discrepancy: needs at least two rows a side, got {len(first)} and {len(second)}.")

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (-torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square() / scale).exp()

    def within(a: Tensor) -> Tensor:
        num = len(a)
        return (kernel(a, a).sum() - num) / (num * (num - 1))  # without each row's similarity to itself

    return within(first) + within(second) - 2 * kernel(first, second).mean()
