import copy
import math

import pytest
import torch
from torch import distributions

from lit_generative.recipe import describe
from lit_generative.vae.gaussians import LearnedGaussian, OptimalGaussian, PixelwiseGaussian
from lit_generative.vae.likelihoods import Gaussian


def outputs_and_images(channels: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    output = torch.randn(5, channels, 2, 4, generator=generator, dtype=torch.float64)
    return output, 2 * torch.rand(5, 3, 2, 4, generator=generator, dtype=torch.float64) - 1


def rmse(output: torch.Tensor, x: torch.Tensor) -> float:
    return (output - x).square().mean().sqrt().item()


# ---- one learned sigma


def test_a_learned_gaussian_is_a_gaussian_of_its_sigma():
    output, x = outputs_and_images()
    expected = Gaussian(sigma=0.4).log_prob(output, x)
    torch.testing.assert_close(LearnedGaussian(sigma=0.4).log_prob(output, x), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_a_learned_sigma_is_drawn_to_the_root_of_the_mean_squared_error(factor):
    output, x = outputs_and_images()
    likelihood = LearnedGaussian(sigma=factor * rmse(output, x)).double()
    likelihood.log_prob(output, x).sum().backward()
    # d/d(log sigma) of the log-density of n values: n * (mse / sigma**2 - 1)
    expected = torch.tensor(x.numel() * (factor**-2 - 1), dtype=torch.float64)
    torch.testing.assert_close(likelihood.log_sigma.grad, expected, rtol=1e-5, atol=1e-5)


def test_a_learned_sigma_is_a_parameter_and_remembers_how_it_was_built():
    likelihood = LearnedGaussian(sigma=0.4)
    assert [name for name, _ in likelihood.named_parameters()] == ["log_sigma"]
    assert describe(likelihood) == {
        "class_path": "lit_generative.vae.gaussians.LearnedGaussian",
        "init_args": {"sigma": 0.4},
    }


# ---- a sigma for each value


def test_a_pixelwise_gaussian_agrees_with_torch():
    output, x = outputs_and_images(channels=6)
    likelihood = PixelwiseGaussian(min_sigma=0.3)
    floor = 2 * math.log(0.3)
    variance = (floor + (1 + (output[:, 3:] - floor).exp()).log()).exp()
    expected = distributions.Normal(output[:, :3], variance.sqrt()).log_prob(x).sum(dim=(1, 2, 3))
    torch.testing.assert_close(likelihood.log_prob(output, x), expected)
    torch.testing.assert_close(likelihood.mean(output), output[:, :3].clamp(-1, 1))


def test_a_large_variance_is_that_of_the_decoder_and_a_small_one_stays_above_the_floor():
    x = torch.zeros(1, 1, 1, 1, dtype=torch.float64)

    def log_prob(logvar: float) -> torch.Tensor:
        output = torch.tensor([0.0, logvar], dtype=torch.float64).reshape(1, 2, 1, 1)
        return PixelwiseGaussian(min_sigma=0.01).log_prob(output, x)

    torch.testing.assert_close(log_prob(3.0), Gaussian(sigma=math.exp(1.5)).log_prob(x, x), rtol=1e-5, atol=0)
    torch.testing.assert_close(log_prob(-1e6), Gaussian(sigma=0.01).log_prob(x, x))


# ---- the optimal sigma


def test_in_training_sigma_is_the_root_of_the_mean_squared_error_of_the_batch():
    output, x = outputs_and_images()
    expected = Gaussian(sigma=rmse(output, x)).log_prob(output, x)
    torch.testing.assert_close(OptimalGaussian().log_prob(output, x), expected)


def test_no_gaussian_finds_the_batch_likelier():
    output, x = outputs_and_images()
    best = OptimalGaussian().log_prob(output, x).sum()
    for factor in (0.9, 0.99, 1.01, 1.1):
        assert Gaussian(sigma=factor * rmse(output, x)).log_prob(output, x).sum() < best


def test_the_gradient_passes_through_sigma():
    output, x = outputs_and_images()
    output.requires_grad_()
    (through,) = torch.autograd.grad(OptimalGaussian().log_prob(output, x)[0], output)
    # log p of the first example by hand: 24 values of 120 in the batch
    variance = (x - output).square().mean()
    by_hand = -0.5 * ((x - output)[0].square().sum() / variance + 24 * variance.log())
    torch.testing.assert_close(through, torch.autograd.grad(by_hand, output)[0])
    assert through[1:].any()


def test_evaluation_takes_the_average_over_batches_which_starts_with_the_first():
    output, x = outputs_and_images()
    likelihood = OptimalGaussian(decay=0.75)
    torch.testing.assert_close(likelihood.eval().log_prob(output, x), Gaussian(sigma=1.0).log_prob(output, x))
    likelihood.train().log_prob(output, x)
    first = rmse(output, x) ** 2
    torch.testing.assert_close(likelihood.variance.item(), first, rtol=1e-6, atol=0)
    average, later = first, rmse(0.1 * output, x) ** 2
    for weight in (1 / 2, 1 / 3, 0.25, 0.25, 0.25):
        likelihood.log_prob(0.1 * output, x)
        average = (1 - weight) * average + weight * later
        torch.testing.assert_close(likelihood.variance.item(), average, rtol=1e-6, atol=0)
    expected = Gaussian(sigma=math.sqrt(average)).log_prob(output, x)
    for _ in range(2):  # and looking does not change it
        torch.testing.assert_close(likelihood.eval().log_prob(output, x), expected, rtol=1e-5, atol=0)


def test_the_average_survives_its_state_dict():
    output, x = outputs_and_images()
    likelihood, other = OptimalGaussian(), OptimalGaussian()
    likelihood.log_prob(output, x)
    other.load_state_dict(copy.deepcopy(likelihood.state_dict()))
    torch.testing.assert_close(other.eval().log_prob(output, x), likelihood.eval().log_prob(output, x), rtol=0, atol=0)
    for one in (likelihood, other):
        one.train().log_prob(0.1 * output, x)  # the second batch of both: neither starts again
    torch.testing.assert_close(other.variance, likelihood.variance, rtol=0, atol=0)
    assert other.num_batches == 2


def test_a_perfect_reconstruction_has_a_finite_density_and_gradient():
    _, x = outputs_and_images()
    output = x.float().requires_grad_()
    log_prob = OptimalGaussian(min_sigma=0.01).log_prob(output, x.float())
    torch.testing.assert_close(log_prob, Gaussian(sigma=0.01).log_prob(x.float(), x.float()))
    log_prob.sum().backward()
    assert output.grad.isfinite().all()


# ---- refusals


@pytest.mark.parametrize(
    ("cls", "argument", "message"),
    [
        (LearnedGaussian, {"sigma": 0.0}, "sigma must be positive, got 0.0"),
        (LearnedGaussian, {"sigma": -1.0}, "sigma must be positive, got -1.0"),
        (PixelwiseGaussian, {"min_sigma": 0.0}, "min_sigma must be positive, got 0.0"),
        (OptimalGaussian, {"min_sigma": 0.0}, "min_sigma must be positive, got 0.0"),
        (OptimalGaussian, {"decay": 1.0}, "decay must be at least 0 and below 1, got 1.0"),
        (OptimalGaussian, {"decay": -0.1}, "decay must be at least 0 and below 1, got -0.1"),
    ],
)
def test_an_argument_out_of_range_is_refused(cls, argument, message):
    with pytest.raises(ValueError, match=f"{cls.__name__}: {message}"):
        cls(**argument)
