import torch
from torch.distributions import Independent, Normal, kl_divergence

from lit_generative.vae.distributions import kl_to_standard_normal, normal_log_prob, reparameterize


def gaussians(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, *shape, generator=generator, dtype=torch.float64))


def test_kl_agrees_with_torch():
    mean, logvar = gaussians(5, 3)
    expected = kl_divergence(Normal(mean, (0.5 * logvar).exp()), Normal(0.0, 1.0)).sum(dim=1)
    torch.testing.assert_close(kl_to_standard_normal(mean, logvar), expected)


def test_kl_is_zero_at_the_prior_and_positive_elsewhere():
    zeros = torch.zeros(5, 3, dtype=torch.float64)
    torch.testing.assert_close(kl_to_standard_normal(zeros, zeros), zeros[:, 0])
    assert (kl_to_standard_normal(*gaussians(1000, 2)) > 0).all()


def test_normal_log_prob_agrees_with_torch():
    mean, logvar = gaussians(5, 3)
    z = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = Independent(Normal(mean, (0.5 * logvar).exp()), 1).log_prob(z)
    assert expected.shape == (4, 5)
    torch.testing.assert_close(normal_log_prob(z, mean, logvar), expected)


def test_draws_have_the_mean_and_the_variance_asked_for():
    torch.manual_seed(0)
    mean, logvar = gaussians(2, 3)
    draws = reparameterize(mean, logvar, num_draws=100_000)
    assert draws.shape == (100_000, 2, 3)
    torch.testing.assert_close(draws.mean(dim=0), mean, rtol=0, atol=0.03)
    torch.testing.assert_close(draws.var(dim=0), logvar.exp(), rtol=0.03, atol=0)


def test_draws_of_different_examples_and_dimensions_are_independent():
    torch.manual_seed(0)
    draws = reparameterize(*(torch.zeros(2, 3, dtype=torch.float64) for _ in range(2)), num_draws=100_000)
    correlation = torch.corrcoef(draws.flatten(start_dim=1).T)
    torch.testing.assert_close(correlation, torch.eye(6, dtype=torch.float64), rtol=0, atol=0.02)


def test_a_single_draw_is_the_default():
    assert reparameterize(*gaussians(5, 3)).shape == (1, 5, 3)


def test_gradients_of_draws_reach_mean_and_logvar():
    torch.manual_seed(0)
    mean, logvar = (value.requires_grad_() for value in gaussians(2, 3))
    draws = reparameterize(mean, logvar, num_draws=4)
    to_mean, to_logvar = torch.autograd.grad(draws.sum(), (mean, logvar))
    torch.testing.assert_close(to_mean, torch.full_like(mean, 4.0))
    torch.testing.assert_close(to_logvar, 0.5 * (draws - mean).sum(dim=0))  # dz/dlogvar = sigma * eps / 2
