import math

import pytest
import torch
from torch.distributions import MultivariateNormal

from lit_generative.vae.distributions import reparameterize
from lit_generative.vae.likelihoods import Gaussian
from lit_generative.vae.objectives import Draws, Elbo, Objective

OBJECTIVES = [cls for cls in Objective.__subclasses__() if cls.__module__.startswith("lit_generative.")]
every_objective = pytest.mark.parametrize(
    "objective", [cls() for cls in OBJECTIVES], ids=[cls.__name__ for cls in OBJECTIVES]
)


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


# ---- laws


@every_objective
def test_the_bound_is_below_the_evidence(objective):
    torch.manual_seed(0)
    model = LinearGaussian()
    mean, logvar = model.posterior()
    for wrong_mean, wrong_logvar in ((mean + 0.5, logvar), (mean, logvar + 1), (torch.zeros_like(mean), logvar - 1)):
        loss = objective.loss(model.draws(wrong_mean, wrong_logvar, num_draws=10_000))
        assert loss.shape == (5,)
        assert (-loss < model.log_evidence).all()


@every_objective
def test_the_bound_is_the_evidence_at_the_true_posterior(objective):
    torch.manual_seed(0)
    model = LinearGaussian()
    loss = objective.loss(model.draws(*model.posterior(), num_draws=50_000))
    torch.testing.assert_close(-loss, model.log_evidence, rtol=0, atol=0.03)


def test_every_draw_from_the_true_posterior_gives_the_evidence():
    torch.manual_seed(0)
    model = LinearGaussian()
    draws = model.draws(*model.posterior(), num_draws=4)
    evidence = draws.log_likelihood + draws.log_prior - draws.log_posterior  # Bayes' rule
    torch.testing.assert_close(evidence, model.log_evidence.expand(4, 5))


# ---- values


def two_examples() -> Draws:
    """Three draws for each of two examples; KL of 0.5 and 4."""
    log_likelihood = torch.tensor([[-1.0, -20.0], [-2.0, -30.0], [-6.0, -40.0]])
    mean = torch.tensor([[1.0, 0.0], [2.0, -2.0]])
    return Draws(log_likelihood, torch.full((3, 2, 2), torch.nan), mean, torch.zeros(2, 2))


def test_terms_of_draws_by_hand():
    z, mean, logvar = torch.tensor([[[2.0]], [[0.0]]]), torch.tensor([[1.0]]), torch.tensor([[4.0]]).log()
    draws, constant = Draws(torch.zeros(2, 1), z, mean, logvar), 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(draws.log_prior, torch.tensor([[-2.0], [0.0]]) - constant)
    torch.testing.assert_close(draws.log_posterior, torch.full((2, 1), -0.125 - math.log(2) - constant))
    torch.testing.assert_close(draws.kl, torch.tensor([0.5 * (1 + 4 - 1) - math.log(2)]))


@pytest.mark.parametrize(("beta", "expected"), [(1.0, [3.5, 34.0]), (4.0, [5.0, 46.0]), (0.0, [3.0, 30.0])])
def test_elbo_by_hand(beta, expected):
    torch.testing.assert_close(Elbo(beta=beta).loss(two_examples()), torch.tensor(expected))


def test_elbo_is_the_bound_itself_with_one_draw_by_default():
    torch.testing.assert_close(Elbo().loss(two_examples()), Elbo(beta=1.0).loss(two_examples()))
    assert Elbo().num_draws == 1


def test_a_negative_beta_is_refused():
    with pytest.raises(ValueError, match="Elbo: beta must not be negative, got -1"):
        Elbo(beta=-1.0)
