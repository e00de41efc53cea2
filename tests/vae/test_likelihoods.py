import itertools

import pytest
import torch
from torch import distributions, nn

from lit_generative.networks.conv_vae import ConvDecoder
from lit_generative.recipe import describe
from lit_generative.tensor_ops import from_uint8
from lit_generative.vae.discretized import DiscretizedLogistic, DiscretizedLogisticMixture
from lit_generative.vae.gaussians import LearnedGaussian, OptimalGaussian, PixelwiseGaussian
from lit_generative.vae.likelihoods import Bernoulli, ContinuousBernoulli, Gaussian, Likelihood, check_first, with_state
from lit_generative.vae.priors import GaussianMixturePrior, StandardNormal

LIKELIHOODS = [cls for cls in Likelihood.__subclasses__() if cls.__module__.startswith("lit_generative.")]
ONE_NUMBER = [Bernoulli, ContinuousBernoulli, Gaussian, LearnedGaussian, OptimalGaussian]


def built(cls: type[Likelihood]) -> Likelihood:
    """In evaluation mode, where an example does not depend on its batch."""
    likelihood = cls()
    return likelihood.eval() if isinstance(likelihood, nn.Module) else likelihood


def each(classes: list[type[Likelihood]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("likelihood", [built(cls) for cls in classes], ids=[cls.__name__ for cls in classes])


every_likelihood = each(LIKELIHOODS)


def outputs_and_images(likelihood: Likelihood | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    num = 1 if likelihood is None else likelihood.parameters_per_value
    output = torch.randn(5, num * 3, 2, 4, generator=generator, dtype=torch.float64)
    return output, 2 * torch.rand(5, 3, 2, 4, generator=generator, dtype=torch.float64) - 1


# ---- laws


def test_the_laws_see_all_likelihoods():
    assert set(LIKELIHOODS) == {*ONE_NUMBER, PixelwiseGaussian, DiscretizedLogistic, DiscretizedLogisticMixture}


@every_likelihood
def test_log_prob_is_summed_over_pixels_and_not_over_examples(likelihood):
    output, x = outputs_and_images(likelihood)
    whole = likelihood.log_prob(output, x)
    halves = [likelihood.log_prob(output[..., part], x[..., part]) for part in (slice(0, 1), slice(1, 4))]
    assert whole.shape == (5,)
    torch.testing.assert_close(whole, halves[0] + halves[1])
    torch.testing.assert_close(likelihood.log_prob(output[2:3], x[2:3]), whole[2:3])
    twice = [torch.cat([values, values], dim=-1) for values in (output, x)]
    torch.testing.assert_close(likelihood.log_prob(*twice), 2 * whole)


@every_likelihood
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_number_of_the_decoder_gets_a_gradient(likelihood, dtype):
    output, x = outputs_and_images(likelihood)
    output = output.to(dtype).requires_grad_()
    log_prob = likelihood.log_prob(output, x.to(dtype))
    assert log_prob.dtype == dtype
    log_prob.sum().backward()
    assert output.grad.isfinite().all()
    assert (output.grad != 0).all()


@every_likelihood
def test_a_channel_of_the_image_is_described_by_its_own_numbers_alone(likelihood):
    output, x = outputs_and_images(likelihood)
    num = likelihood.parameters_per_value
    of_channel = output.unflatten(1, (num, 3))
    apart = [likelihood.log_prob(of_channel[:, :, c], x[:, c : c + 1]) for c in range(3)]
    torch.testing.assert_close(sum(apart), likelihood.log_prob(output, x))
    means = torch.cat([likelihood.mean(of_channel[:, :, c]) for c in range(3)], dim=1)
    torch.testing.assert_close(means, likelihood.mean(output))


@every_likelihood
def test_the_mean_is_an_image(likelihood):
    output, x = outputs_and_images(likelihood)
    mean = likelihood.mean(100 * output)
    assert mean.shape == x.shape
    assert mean.min() >= -1
    assert mean.max() <= 1
    assert mean.std() > 0.3


@every_likelihood
def test_an_output_for_another_number_of_parameters_is_refused(likelihood):
    output, x = outputs_and_images(likelihood)
    num, name = likelihood.parameters_per_value, type(likelihood).__name__
    wrong = torch.cat([output, output[:, :3]], dim=1)
    expected = rf"{name}: .* {num} numbers for each value.* \(5, {3 * num}, 2, 4\) for images \(5, 3, 2, 4\), "
    with pytest.raises(ValueError, match=rf"{expected}got \(5, {3 * num + 3}, 2, 4\).*parameters_per_value={num}"):
        likelihood.log_prob(wrong, x)
    for shape in ((5, 3 * num, 2, 1), (1, 3 * num, 2, 4)):  # would broadcast
        with pytest.raises(ValueError, match=expected):
            likelihood.log_prob(torch.zeros(shape, dtype=torch.float64), x)
    if num > 1:
        with pytest.raises(ValueError, match=rf"{num} numbers for each value of the image, got \(5, {3 * num - 1}, 2"):
            likelihood.mean(output[:, 1:])


@every_likelihood
def test_the_decoder_of_this_project_fits(likelihood):
    num = likelihood.parameters_per_value
    decoder = ConvDecoder(8, channels=2, latent_dim=3, width=4, num_stages=1, parameters_per_value=num)
    output = decoder(torch.zeros(5, 3))
    assert likelihood.log_prob(output, likelihood.mean(output)).shape == (5,)


@every_likelihood
def test_a_checkpoint_can_build_it_again(likelihood):
    arguments = describe(likelihood).get("init_args", {})
    assert type(likelihood)(**arguments).parameters_per_value == likelihood.parameters_per_value


@every_likelihood
def test_pixels_from_the_data_modules_can_be_scored_in_float32_and_bfloat16(likelihood):
    x = from_uint8(torch.arange(256, dtype=torch.uint8)).reshape(4, 1, 8, 8)
    likelihood.check(x)
    likelihood.check(x.bfloat16())


@each(ONE_NUMBER)
def test_no_other_output_explains_its_own_mean_better(likelihood):
    output, shift = outputs_and_images()
    output = 0.2 * output  # inside [-1, 1], where a Gaussian's mean is not clamped
    x = likelihood.mean(output)
    best = likelihood.log_prob(output, x)
    assert (likelihood.log_prob(output + 0.05 * shift, x) < best).all()
    assert (likelihood.log_prob(output - 0.05 * shift, x) < best).all()


@each(ONE_NUMBER)
def test_mean_lies_in_the_range_of_images_and_grows_with_the_output(likelihood):
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


# ---- the continuous Bernoulli

LOGITS = [-700.0, -30.0, -1.0, -0.201, -0.199, -1e-6, 0.0, 1e-3, 0.3, 5.0, 100.0]


def test_continuous_bernoulli_agrees_with_torch():
    output, x = outputs_and_images()
    for scale in (1e-3, 1.0, 10.0):
        theirs = distributions.ContinuousBernoulli(logits=scale * output)
        expected = theirs.log_prob(0.5 * (x + 1)).sum(dim=(1, 2, 3))
        # theirs is a shorter series around zero
        close = {"rtol": 1e-6, "atol": 1e-6}
        torch.testing.assert_close(ContinuousBernoulli().log_prob(scale * output, x), expected, **close)
        torch.testing.assert_close(ContinuousBernoulli().mean(scale * output), 2 * theirs.mean - 1, **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("logit", LOGITS)
def test_continuous_bernoulli_integrates_to_one_and_its_mean_is_the_first_moment(logit, dtype):
    pixel = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    x = (2 * pixel - 1).to(dtype)
    output = torch.full((len(x), 1, 1, 1), logit, dtype=dtype)
    density = ContinuousBernoulli().log_prob(output, x.reshape(-1, 1, 1, 1)).double().exp()
    torch.testing.assert_close(torch.trapezoid(density, pixel).item(), 1.0, rtol=0, atol=2e-5)
    moment = torch.trapezoid(density * x, pixel)
    mean = ContinuousBernoulli().mean(output[0]).double().flatten()[0]
    torch.testing.assert_close(mean, moment, rtol=0, atol=3e-5)


def test_the_series_of_the_continuous_bernoulli_is_exact_where_it_ends():
    logits = torch.tensor([-0.199, 0.199], dtype=torch.float64).reshape(2, 1, 1, 1)
    u = 0.5 * logits
    torch.testing.assert_close(ContinuousBernoulli().mean(logits), 1 / u.tanh() - 1 / u, rtol=1e-7, atol=0)
    middle = (2 * u / u.tanh()).log() - (2 * u.cosh()).log()  # the log-density of a grey pixel
    torch.testing.assert_close(ContinuousBernoulli().log_prob(logits, 0 * u), middle.flatten(), rtol=0, atol=1e-9)


def test_the_gradient_of_the_continuous_bernoulli_is_right_where_its_series_takes_over():
    logits = torch.tensor(LOGITS, dtype=torch.float64).reshape(-1, 1, 1, 1).requires_grad_()
    x = torch.full_like(logits, 0.3)
    ContinuousBernoulli().log_prob(logits, x).sum().backward()
    # an exponential family: the derivative is the pixel minus its expectation
    torch.testing.assert_close(logits.grad, 0.5 * (x - ContinuousBernoulli().mean(logits)).detach(), rtol=0, atol=1e-8)


# ---- images that cannot be scored


@pytest.mark.parametrize("cls", [Bernoulli, ContinuousBernoulli])
@pytest.mark.parametrize("value", [-1.001, 1.001, float("nan")])
def test_images_outside_the_unit_interval_are_refused_by_what_lives_there(cls, value):
    x = torch.zeros(2, 1, 3, 4)
    x[1, 0, 2, 1] = value
    with pytest.raises(ValueError, match=rf"{cls.__name__}: images must lie in \[-1, 1\].*got values from"):
        cls().check(x)
    x[1, 0, 2, 1] = 1 + 1e-4
    cls().check(x)
    Gaussian().check(torch.full((1, 1, 2, 3), 7.0))


class Watched(Gaussian):
    """Remembers what it was asked to check, and refuses images of one."""

    def __init__(self) -> None:
        super().__init__()
        self.checked = []

    def check(self, x):
        if len(x) == 1:
            raise ValueError("Watched")
        self.checked.append(len(x))


def test_the_first_batch_of_each_stage_is_checked_until_one_passes():
    likelihood, seen = Watched(), set()
    with pytest.raises(ValueError, match="Watched"):
        check_first(likelihood, torch.zeros(1, 2), "train", seen)
    for num, stage in ((2, "train"), (3, "train"), (4, "val"), (5, "train"), (6, "val")):
        check_first(likelihood, torch.zeros(num, 2), stage, seen)
    assert likelihood.checked == [2, 4]
    assert seen == {"train", "val"}


# ---- what they learn


def test_the_parts_with_parameters_or_buffers_are_named():
    model = nn.Module()
    model.likelihood, model.prior, model.other = Gaussian(), StandardNormal(), nn.BatchNorm2d(3, affine=False)
    assert with_state(model, "likelihood", "prior") == []
    assert with_state(model, "other", "prior") == ["other"]
    model.likelihood, model.prior = LearnedGaussian(), GaussianMixturePrior(3, 2)
    assert with_state(model, "likelihood", "prior") == ["likelihood", "prior"]
    with pytest.raises(AttributeError, match="prier"):
        with_state(model, "prier")
