"""Each prior's density is that of torch.distributions, and what it draws follows it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from lit_generative.tensor_ops import sample_generators
from lit_generative.vae.distributions import normal_log_prob
from lit_generative.vae.priors import Components, GaussianMixturePrior, Prior, StandardNormal, VampPrior

D = 2


def encoder(x: Tensor) -> tuple[Tensor, Tensor]:
    """Pseudo-inputs of shape (1, 2, 2) to posteriors in two dimensions."""
    return 3 * x.flatten(start_dim=1)[:, :2], x.flatten(start_dim=1)[:, 2:] - 1


def mixture() -> GaussianMixturePrior:
    torch.manual_seed(0)
    prior = GaussianMixturePrior(latent_dim=D, num_components=3)
    with torch.no_grad():
        prior.mean.mul_(2)
        prior.logvar.normal_()
        prior.logit.normal_()
    return prior


def vamp() -> VampPrior:
    torch.manual_seed(0)
    return VampPrior(sample_shape=(1, 2, 2), num_components=4)


def reference(prior: Prior) -> torch.distributions.Distribution:
    if isinstance(prior, StandardNormal):
        return Independent(Normal(torch.zeros(D), torch.ones(D)), 1)
    if isinstance(prior, GaussianMixturePrior):
        mean, logvar, logits = prior.mean, prior.logvar, prior.logit
    else:
        mean, logvar = encoder(prior.pseudo_inputs.tanh())
        logits = torch.zeros(len(mean))
    return MixtureSameFamily(Categorical(logits=logits), Independent(Normal(mean, (0.5 * logvar).exp()), 1))


PRIORS = {"StandardNormal": StandardNormal, "mixture": mixture, "VampPrior": vamp}
every_prior = pytest.mark.parametrize("build", PRIORS.values(), ids=PRIORS.keys())


def test_every_prior_is_among_the_examples():
    assert {type(build()) for build in PRIORS.values()} == set(Prior.__subclasses__())


@every_prior
def test_the_density_is_that_of_torch(build):
    prior, z = build(), 2 * torch.randn(3, 5, D)
    torch.testing.assert_close(prior.log_prob(z, encoder), reference(prior).log_prob(z))


@every_prior
def test_draws_follow_the_density(build):
    prior = build()
    z = prior.sample(40_000, D, encoder, torch.Generator().manual_seed(0)).detach()
    entropy = -reference(prior).log_prob(reference(prior).sample((40_000,)))
    drawn = -prior.log_prob(z[None], encoder)[0].detach()
    error = float(entropy.std() / 40_000**0.5)
    assert float(drawn.mean()) == pytest.approx(float(entropy.detach().mean()), abs=6 * error)
    expected = reference(prior)
    torch.testing.assert_close(z.mean(dim=0), expected.mean.detach(), rtol=0, atol=0.06)
    torch.testing.assert_close(z.var(dim=0), expected.variance.detach(), rtol=0.05, atol=0)


@every_prior
def test_a_draw_does_not_depend_on_its_batch(build):
    prior = build()
    together = prior.sample(4, D, encoder, sample_generators(0, 4))
    apart = torch.cat([prior.sample(1, D, encoder, sample_generators(0, 1, start=i)) for i in range(4)])
    torch.testing.assert_close(apart, together, rtol=0, atol=0)


@every_prior
def test_every_parameter_learns(build):
    prior = build()
    z = torch.randn(2, 3, D, requires_grad=True)
    prior.log_prob(z, encoder).mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in prior.parameters())


def test_the_kl_of_each_dimension_sums_to_that_of_torch():
    mean, logvar = torch.randn(2, 5, D)
    posterior = Normal(mean, (0.5 * logvar).exp())
    expected = torch.distributions.kl_divergence(posterior, Normal(0.0, 1.0))
    torch.testing.assert_close(StandardNormal().kl_by_dimension(mean, logvar), expected)
    assert mixture().kl_by_dimension(mean, logvar) is None


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GaussianMixturePrior(0), "GaussianMixturePrior: latent_dim must be at least 1, got 0"),
        (lambda: GaussianMixturePrior(2, 0), "GaussianMixturePrior: num_components must be at least 1, got 0"),
        (lambda: VampPrior((1, 2, 2), 0), "VampPrior: num_components must be at least 1, got 0"),
    ],
)
def test_bad_numbers_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_pseudo_inputs_may_begin_with_images():
    prior, images = vamp(), torch.linspace(-1, 1, 16).reshape(4, 1, 2, 2)
    prior.begin_with(images)
    torch.testing.assert_close(prior.pseudo_inputs.tanh(), 0.95 * images)
    with pytest.raises(ValueError, match=r"begins with 4 images of shape \(1, 2, 2\), got \(3, 1, 2, 2\)"):
        prior.begin_with(images[:3])


def test_a_mixture_of_narrow_components_far_off_keeps_its_digits():
    generator = torch.Generator().manual_seed(0)
    mean, z = 30 + torch.randn(2, 5, 8, generator=generator)
    components = Components(mean, torch.full((5, 8), -9.0), torch.full((5,), 0.2).log())
    each = normal_log_prob(z.double().unsqueeze(-2), mean.double(), components.logvar.double())
    expected = torch.logsumexp(components.log_weight.double() + each, dim=-1)
    assert expected.min() < -1e4
    torch.testing.assert_close(components.log_prob(z).double(), expected, rtol=1e-6, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(components.log_prob(z).double(), expected, rtol=1e-6, atol=0)
