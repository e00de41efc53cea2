import itertools

import pytest
import torch
from torch.distributions import AffineTransform, SigmoidTransform, TransformedDistribution, Uniform

from lit_generative.tensor_ops import from_uint8
from lit_generative.vae.discretized import DiscretizedLogistic, DiscretizedLogisticMixture, check_levels, level_log_prob
from lit_generative.vae.likelihoods import Likelihood, soft_floor

BOTH = pytest.mark.parametrize("likelihood", [DiscretizedLogistic(), DiscretizedLogisticMixture(num_components=3)])
LEVELS = torch.arange(256, dtype=torch.uint8)
MEANS = [-1e6, -3.0, -1.0, -0.7512, 0.0, 1 / 255, 1.0, 1.002, 40.0, 1e6]
LOG_SCALES = [-1e6, -9.0, -7.0, -4.0, 0.0, 6.0, 12.0, 80.0, 1e5]


def all_levels(dtype: torch.dtype) -> torch.Tensor:
    """An image of one pixel for each level, as the data modules scale it."""
    return from_uint8(LEVELS).reshape(256, 1, 1, 1).to(dtype)


def described(likelihood: Likelihood, mean: float, log_scale: float, dtype: torch.dtype) -> torch.Tensor:
    """A decoder's output for one pixel; the components of a mixture differ in weight, mean and scale."""
    if likelihood.parameters_per_value == 2:
        numbers = [mean, log_scale]
    else:
        numbers = [0.3, -1.0, 2.0, mean, 0.5 * mean, -0.2, log_scale, -3.0, 0.5 * log_scale]
    return torch.tensor(numbers, dtype=dtype).reshape(1, -1, 1, 1)


def logistic(mean: torch.Tensor, log_scale: torch.Tensor) -> TransformedDistribution:
    uniform = Uniform(torch.zeros_like(mean), torch.ones_like(mean), validate_args=False)
    return TransformedDistribution(uniform, [SigmoidTransform().inv, AffineTransform(mean, log_scale.exp())])


# ---- laws


@BOTH
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 2e-5)])
def test_the_256_levels_have_a_total_probability_of_one_however_extreme_mean_and_scale_are(
    likelihood, dtype, tolerance
):
    x = all_levels(dtype)
    for mean, log_scale in itertools.product(MEANS, LOG_SCALES):
        output = described(likelihood, mean, log_scale, dtype).expand(256, -1, 1, 1).clone().requires_grad_()
        log_prob = likelihood.log_prob(output, x)
        assert log_prob.isfinite().all(), (mean, log_scale)
        assert log_prob.max() <= 1e-6, (mean, log_scale)
        torch.testing.assert_close(log_prob.exp().sum().item(), 1.0, rtol=0, atol=tolerance)
        log_prob.sum().backward()
        assert output.grad.isfinite().all(), (mean, log_scale)


@BOTH
def test_log_probabilities_are_those_of_8_bit_pixels(likelihood):
    assert likelihood.discrete
    assert likelihood.parameters_per_value == (2 if isinstance(likelihood, DiscretizedLogistic) else 9)


@BOTH
def test_the_mean_is_the_expected_level_where_the_tails_hold_nothing(likelihood):
    for mean in (-0.4, 0.0, 0.31):
        output = described(likelihood, mean, -5.0, torch.float64).expand(256, -1, 1, 1)
        x = all_levels(torch.float64)
        expected = (likelihood.log_prob(output, x).exp() * x.flatten()).sum()
        torch.testing.assert_close(likelihood.mean(output)[0].squeeze(), expected, rtol=0, atol=1e-4)


# ---- values


def test_a_level_has_the_probability_of_its_interval_and_the_edges_that_of_the_tails():
    generator = torch.Generator().manual_seed(0)
    output = 0.5 * torch.randn(4, 6, 2, 64, generator=generator, dtype=torch.float64)
    output[:, 3:] -= 1  # further out, torch's cdf is no longer exact
    level = torch.randint(256, (4, 3, 2, 64), generator=generator)
    level[0] = torch.tensor([0, 255, 1, 254]).repeat(96).reshape(3, 2, 64)
    level = level.double()
    mean, log_scale = output[:, :3], soft_floor(output[:, 3:], -7.0)
    density = logistic(mean, log_scale)
    upper = torch.where(level == 255, 1.0, density.cdf((level + 0.5) / 127.5 - 1))
    lower = torch.where(level == 0, 0.0, density.cdf((level - 0.5) / 127.5 - 1))
    expected = (upper - lower).log().sum(dim=(1, 2, 3))
    torch.testing.assert_close(DiscretizedLogistic().log_prob(output, level / 127.5 - 1), expected)


def test_a_mixture_weighs_the_probabilities_of_its_components():
    generator = torch.Generator().manual_seed(0)
    output = torch.randn(4, 3 * 5 * 2, 3, 7, generator=generator, dtype=torch.float64)
    x = from_uint8(torch.randint(256, (4, 2, 3, 7), generator=generator)).double()
    numbers = output.reshape(4, 3, 5, 2, 3, 7)
    weights = numbers[:, 0].exp() / numbers[:, 0].exp().sum(dim=1, keepdim=True)
    components = level_log_prob(x[:, None], numbers[:, 1], soft_floor(numbers[:, 2], -7.0)).exp()
    expected = (weights * components).sum(dim=1).log().sum(dim=(1, 2, 3))
    likelihood = DiscretizedLogisticMixture(num_components=5)
    torch.testing.assert_close(likelihood.log_prob(output, x), expected)
    mean = (weights * numbers[:, 1].clamp(-1, 1)).sum(dim=1)
    torch.testing.assert_close(likelihood.mean(output), mean)


def test_a_mixture_of_one_is_no_mixture():
    output = torch.randn(3, 4, 2, 5, generator=torch.Generator().manual_seed(0))
    x = from_uint8(torch.arange(60, dtype=torch.uint8)).reshape(3, 2, 2, 5)
    mixture = DiscretizedLogisticMixture(num_components=1)
    with_weights = torch.cat([torch.full((3, 2, 2, 5), 7.0), output], dim=1)
    torch.testing.assert_close(mixture.log_prob(with_weights, x), DiscretizedLogistic().log_prob(output, x))
    torch.testing.assert_close(mixture.mean(with_weights), DiscretizedLogistic().mean(output))


def test_a_component_far_below_black_only_says_black():
    numbers = torch.tensor([0.0, 2.0, -50.0, 0.5, -3.0, -3.0])  # weights 0.12 and 0.88
    mean = DiscretizedLogisticMixture(num_components=2).mean(numbers.reshape(1, 6, 1, 1)).item()
    weight = torch.sigmoid(torch.tensor(2.0)).item()
    torch.testing.assert_close(mean, 0.5 * weight - (1 - weight))


def test_the_scale_stays_above_its_floor_and_keeps_a_gradient():
    x = all_levels(torch.float64)[100:101]
    output = torch.tensor([x.item(), -12.0], dtype=torch.float64).reshape(1, 2, 1, 1).requires_grad_()
    log_prob = DiscretizedLogistic(min_log_scale=-5.0).log_prob(output, x)
    expected = level_log_prob(x, x, torch.tensor(-5.0, dtype=torch.float64)).flatten()
    torch.testing.assert_close(log_prob, expected, rtol=0, atol=2e-3)
    log_prob.sum().backward()
    assert output.grad[0, 1] < 0


# ---- refusals


@BOTH
def test_images_that_are_no_8_bit_pixels_are_refused(likelihood):
    name = type(likelihood).__name__
    likelihood.check(all_levels(torch.float32))
    noisy = all_levels(torch.float32)
    noisy[100] += 0.5 / 127.5
    for bad in (noisy, all_levels(torch.float32) + 2 / 127.5, torch.full((1, 1, 2, 3), float("nan"))):
        with pytest.raises(ValueError, match=rf"{name}: images must hold the 256 levels .* got values from"):
            likelihood.check(bad)
    with pytest.raises(ValueError, match=r"from -1 to 1, up to 0\.5 levels from the nearest"):
        check_levels(likelihood, noisy)


@pytest.mark.parametrize("cls", [DiscretizedLogistic, DiscretizedLogisticMixture])
@pytest.mark.parametrize("floor", [-20.5, 0.5, float("nan")])
def test_a_floor_that_float32_cannot_bear_is_refused(cls, floor):
    with pytest.raises(ValueError, match=rf"{cls.__name__}: min_log_scale must be at least -20 and at most 0, got"):
        cls(min_log_scale=floor)


def test_a_mixture_of_nothing_is_refused():
    with pytest.raises(ValueError, match="DiscretizedLogisticMixture: num_components must be at least 1, got 0"):
        DiscretizedLogisticMixture(num_components=0)
