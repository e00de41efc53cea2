import itertools

import pytest
import torch
from torch import distributions

from lit_generative.vae.likelihoods import Bernoulli, Gaussian, Likelihood

LIKELIHOODS = [cls for cls in Likelihood.__subclasses__() if cls.__module__.startswith("lit_generative.")]
every_likelihood = pytest.mark.parametrize(
    "likelihood", [cls() for cls in LIKELIHOODS], ids=[cls.__name__ for cls in LIKELIHOODS]
)


def outputs_and_images() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    output = torch.randn(5, 3, 2, 4, generator=generator, dtype=torch.float64)
    return output, 2 * torch.rand(output.shape, generator=generator, dtype=torch.float64) - 1


# ---- laws


@every_likelihood
def test_log_prob_is_summed_over_pixels_and_not_over_examples(likelihood):
    output, x = outputs_and_images()
    whole = likelihood.log_prob(output, x)
    halves = [likelihood.log_prob(output[..., part], x[..., part]) for part in (slice(0, 1), slice(1, 4))]
    assert whole.shape == (5,)
    torch.testing.assert_close(whole, halves[0] + halves[1])
    torch.testing.assert_close(likelihood.log_prob(output[2:3], x[2:3]), whole[2:3])


@every_likelihood
def test_no_other_output_explains_its_own_mean_better(likelihood):
    output, shift = outputs_and_images()
    output = 0.2 * output  # inside [-1, 1], where a Gaussian's mean is not clamped
    x = likelihood.mean(output)
    best = likelihood.log_prob(output, x)
    assert (likelihood.log_prob(output + 0.05 * shift, x) < best).all()
    assert (likelihood.log_prob(output - 0.05 * shift, x) < best).all()


@every_likelihood
def test_mean_lies_in_the_range_of_images(likelihood):
    output = torch.linspace(-100, 100, 5 * 3 * 2 * 4, dtype=torch.float64).reshape(5, 3, 2, 4)
    mean = likelihood.mean(output)
    assert mean.shape == output.shape
    assert mean.min() >= -1
    assert mean.max() <= 1
    assert (mean.flatten().diff() >= 0).all()


# ---- values


def test_bernoulli_agrees_with_torch_on_binary_images():
    output, x = outputs_and_images()
    x = x.sign()
    expected = distributions.Bernoulli(logits=output).log_prob((x > 0).double()).sum(dim=(1, 2, 3))
    torch.testing.assert_close(Bernoulli().log_prob(output, x), expected)


def test_bernoulli_probabilities_of_all_binary_images_sum_to_one():
    x = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=6)), dtype=torch.float64).reshape(64, 1, 3, 2)
    output = torch.linspace(-2, 3, 6, dtype=torch.float64).reshape(1, 1, 3, 2).expand_as(x)
    torch.testing.assert_close(Bernoulli().log_prob(output, x).exp().sum(), torch.tensor(1.0, dtype=torch.float64))


def test_bernoulli_of_a_grey_pixel_is_its_cross_entropy():
    output, x = (
        torch.tensor([[[[0.0, 1.5]]]], dtype=torch.float64),
        torch.tensor([[[[0.3, -0.5]]]], dtype=torch.float64),
    )
    p = torch.sigmoid(torch.tensor(1.5, dtype=torch.float64))
    expected = torch.tensor(0.5, dtype=torch.float64).log() + 0.25 * p.log() + 0.75 * (1 - p).log()
    torch.testing.assert_close(Bernoulli().log_prob(output, x), expected[None])


def test_bernoulli_mean_is_the_expected_pixel():
    output, _ = outputs_and_images()
    torch.testing.assert_close(Bernoulli().mean(output), 2 * distributions.Bernoulli(logits=output).mean - 1)


@pytest.mark.parametrize("sigma", [0.1, 0.7])
def test_gaussian_agrees_with_torch(sigma):
    output, x = outputs_and_images()
    expected = distributions.Normal(output, sigma).log_prob(x).sum(dim=(1, 2, 3))
    torch.testing.assert_close(Gaussian(sigma=sigma).log_prob(output, x), expected)


def test_gaussian_density_of_a_pixel_integrates_to_one():
    x = torch.linspace(-3, 3, 6001, dtype=torch.float64)
    density = Gaussian().log_prob(torch.full((6001, 1, 1, 1), 0.3, dtype=torch.float64), x.reshape(-1, 1, 1, 1)).exp()
    torch.testing.assert_close(torch.trapezoid(density, x), torch.tensor(1.0, dtype=torch.float64))


def test_gaussian_mean_is_the_output_within_the_range_of_images():
    output = torch.tensor([[[[-1.5, -0.4, 0.0, 2.0]]]])
    torch.testing.assert_close(Gaussian().mean(output), torch.tensor([[[[-1.0, -0.4, 0.0, 1.0]]]]))


@pytest.mark.parametrize("sigma", [0.0, -0.1])
def test_a_sigma_that_is_not_positive_is_refused(sigma):
    with pytest.raises(ValueError, match="Gaussian: sigma must be positive"):
        Gaussian(sigma=sigma)
