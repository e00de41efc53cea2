"""Terms of the variational bound: by torch.distributions, and against densities that are known."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

from lit_generative.diffusion.bounds import (
    ContinuousGaussian,
    Decoder,
    DiscretizedGaussian,
    evaluate_bound,
    prior_term,
    vlb_term,
)
from lit_generative.diffusion.denoiser import Denoiser
from lit_generative.diffusion.parameterizations import CleanImage, Epsilon
from lit_generative.diffusion.schedules import CosineSchedule, DiscreteSchedule, LinearSchedule
from lit_generative.diffusion.variances import (
    BetaVariance,
    LearnedVariance,
    PosteriorVariance,
    ReverseVariance,
    training_variances,
)
from lit_generative.tensor_ops import from_uint8, sample_generators

DECODERS = [cls for cls in Decoder.__subclasses__() if cls.__module__.startswith("lit_generative.")]
every_schedule = pytest.mark.parametrize(
    "schedule", [LinearSchedule(50, beta_end=0.2), CosineSchedule(30)], ids=["linear", "cosine"]
)
F64 = torch.float64


class GaussianData(nn.Module):
    """The best guess of the noise in data from ``N(mean, std**2)``; raw numbers for the variance, if asked for."""

    def __init__(self, schedule: DiscreteSchedule, mean: float, std: float, raw: float | None = None) -> None:
        super().__init__()
        self.schedule, self.mean, self.std, self.raw = schedule, mean, std, raw
        self.modes: list[bool] = []

    def forward(self, x_t, t, y=None):
        self.modes.append(self.training)
        _, alpha, sigma = self.schedule.level(int(t[0]))
        eps = sigma * (x_t - alpha * self.mean) / (alpha**2 * self.std**2 + sigma**2)
        return eps if self.raw is None else torch.cat([eps, torch.full_like(eps, self.raw)], dim=1)


def denoiser(schedule: DiscreteSchedule, mean: float = 0.0, std: float = 1.0, raw: float | None = None) -> Denoiser:
    return Denoiser(GaussianData(schedule, mean, std, raw), schedule, Epsilon(), clip=False)


def exact_bound(
    x0: torch.Tensor, schedule: DiscreteSchedule, mean: float, std: float, log_variances: list[float]
) -> torch.Tensor:
    """The expected bound of points ``(N, 1)``: the terms are quadratic in eps, so -1 and 1 stand for all of it."""
    total, denoise = prior_term(x0, schedule), denoiser(schedule, mean, std)
    for t, log_variance in enumerate(log_variances):
        _, alpha, sigma = schedule.level(t)
        for eps in (-1.0, 1.0):
            guess = denoise(alpha * x0 + sigma * eps, schedule.level(t))
            numbers = torch.full((len(x0),), t), torch.tensor(log_variance, dtype=F64)
            total = total + 0.5 * vlb_term(x0, guess.x0, *numbers, schedule, ContinuousGaussian())
    return total


def fixed(schedule: DiscreteSchedule, variance: ReverseVariance) -> list[float]:
    """Logarithms of the variance at all times."""
    numbers = training_variances(schedule, torch.arange(schedule.num_timesteps))
    return variance.choose(*numbers, None).tolist()


def optimal(schedule: DiscreteSchedule, std: float) -> list[float]:
    """Those of ``q(x_{t-1}|x_t)`` for data of this deviation."""
    found = []
    for t in range(schedule.num_timesteps):
        (_, alpha, sigma), (_, alpha_next, sigma_next) = schedule.level(t), schedule.level(t - 1)
        beta = sigma**2 - (alpha / alpha_next * sigma_next) ** 2
        of_x0 = std**2 * sigma**2 / (alpha**2 * std**2 + sigma**2)  # its variance, given x_t
        variance = beta * sigma_next**2 / sigma**2 + (alpha_next * beta / sigma**2) ** 2 * of_x0
        found.append(math.log(variance))
    return found


def points(num: int = 5) -> torch.Tensor:
    return torch.linspace(-2, 1.5, num, dtype=F64)[:, None]


# ---- terms


@every_schedule
def test_a_term_is_the_divergence_of_the_posterior_from_the_step(schedule):
    generator = torch.Generator().manual_seed(0)
    x0, eps, x0_hat, raw = torch.randn(4, 6, 3, 2, 4, generator=generator, dtype=F64)
    t = torch.tensor([1, 2, 7, 15, 28, 29])
    log_variance = -2 + 0.3 * raw
    cumprod, before = (schedule.alphas_cumprod[i].reshape(6, 1, 1, 1) for i in (t, t - 1))
    beta = 1 - cumprod / before
    x_t = cumprod.sqrt() * x0 + (1 - cumprod).sqrt() * eps
    # Ho et al. 2020, eq. 7
    mean, mean_hat = (
        before.sqrt() * beta / (1 - cumprod) * x + (1 - beta).sqrt() * (1 - before) / (1 - cumprod) * x_t
        for x in (x0, x0_hat)
    )
    q = Normal(mean, (beta * (1 - before) / (1 - cumprod)).sqrt())
    expected = kl_divergence(q, Normal(mean_hat, (0.5 * log_variance).exp())).sum(dim=(1, 2, 3))
    term = vlb_term(x0, x0_hat, t, log_variance, schedule, DiscretizedGaussian())
    assert term.shape == (6,)
    torch.testing.assert_close(term, expected, rtol=1e-5, atol=1e-5)


@every_schedule
@pytest.mark.parametrize("decoder", [cls() for cls in DECODERS], ids=lambda d: type(d).__name__)
def test_the_term_at_time_zero_is_the_decoders(schedule, decoder):
    x0, x0_hat = torch.rand(2, 4, 3, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    t, log_variance = torch.tensor([0, 3, 0, 1]), torch.full((4, 1, 1), -1.0, dtype=F64)
    term = vlb_term(x0, x0_hat, t, log_variance, schedule, decoder)
    expected = -decoder.log_prob(x0, x0_hat, log_variance)
    torch.testing.assert_close(term[t == 0], expected[t == 0])
    assert (term[t > 0] != expected[t > 0]).all()


@pytest.mark.parametrize("decoder", [cls() for cls in DECODERS], ids=lambda d: type(d).__name__)
def test_a_guess_that_is_far_off_has_a_gradient(decoder):
    """What a network says in its first updates: it ended in NaN, in bfloat16, at the twelfth."""
    x0, x0_hat = -torch.ones(4, 1, 8, 8), torch.full((4, 1, 8, 8), 30.0)
    log_variance = torch.tensor([-12.0, -24.0, -60.0, -40.0]).reshape(4, 1, 1, 1).requires_grad_()
    term = vlb_term(x0, x0_hat, torch.tensor([0, 0, 1, 5]), log_variance, CosineSchedule(10), decoder)
    (gradient,) = torch.autograd.grad(term[:2].sum(), log_variance)
    squares = 64 * 31**2 * torch.tensor([12.0, 24.0]).exp()
    torch.testing.assert_close(gradient[:2].flatten(), 0.5 * (64 - squares), rtol=1e-3, atol=0)
    assert torch.equal(gradient[2:], torch.zeros(2, 1, 1, 1))


def test_a_perfect_guess_with_the_posteriors_variance_costs_nothing():
    schedule, x0 = CosineSchedule(20), torch.randn(19, 3, 2, generator=torch.Generator().manual_seed(0))
    t = torch.arange(1, 20)
    _, log_beta_tilde = training_variances(schedule, t)
    term = vlb_term(x0, x0, t, log_beta_tilde.reshape(-1, 1, 1), schedule, DiscretizedGaussian())
    torch.testing.assert_close(term, torch.zeros(19), rtol=0, atol=1e-6)


@every_schedule
def test_the_priors_term_is_a_divergence_from_the_standard_normal(schedule):
    x0 = 3 * torch.randn(4, 3, 2, 5, generator=torch.Generator().manual_seed(0), dtype=F64)
    cumprod = schedule.alphas_cumprod[-1]
    q = Normal(cumprod.sqrt() * x0, (1 - cumprod).sqrt())
    expected = kl_divergence(q, Normal(torch.zeros((), dtype=F64), 1.0)).sum(dim=(1, 2, 3))
    torch.testing.assert_close(prior_term(x0, schedule), expected, rtol=1e-6, atol=1e-12)


def test_the_priors_term_knows_the_scale_that_samplers_start_from():
    schedule, x0 = LinearSchedule(5, beta_end=0.5), torch.randn(3, 2, dtype=F64)
    schedule.initial_scale = 4.0
    cumprod = schedule.alphas_cumprod[-1]
    q = Normal(cumprod.sqrt() * x0, (1 - cumprod).sqrt())
    expected = kl_divergence(q, Normal(torch.zeros((), dtype=F64), 4.0)).sum(dim=1)
    torch.testing.assert_close(prior_term(x0, schedule), expected)


# ---- decoders


MEANS = [-40.0, -1.0, -0.7512, 0.0, 1 / 255, 1.002, 3.0]


@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-9), (torch.float32, 1e-4)])
def test_the_256_levels_have_a_total_probability_of_one(dtype, tolerance):
    x0 = from_uint8(torch.arange(256, dtype=torch.uint8)).reshape(256, 1, 1, 1).to(dtype)
    for mean in MEANS:
        for log_variance in (-14.0, -9.0, -4.0, 0.0, 3.0):
            numbers = torch.tensor([mean, log_variance], dtype=dtype).requires_grad_()
            log_prob = DiscretizedGaussian().log_prob(x0, numbers[0].expand_as(x0), numbers[1].expand_as(x0))
            assert log_prob.isfinite().all(), (mean, log_variance)
            torch.testing.assert_close(log_prob.exp().sum().item(), 1.0, rtol=0, atol=tolerance)
            log_prob.sum().backward()
            assert numbers.grad.isfinite().all(), (mean, log_variance)


def test_a_level_has_the_probability_of_its_interval_and_the_edges_that_of_the_tails():
    generator = torch.Generator().manual_seed(0)
    mean, log_variance = 0.4 * torch.randn(2, 4, 3, 2, 64, generator=generator, dtype=F64)
    level = torch.randint(256, (4, 3, 2, 64), generator=generator)
    level[0] = torch.tensor([0, 255, 1, 254]).repeat(96).reshape(3, 2, 64)
    level, density = level.double(), Normal(mean, (0.5 * log_variance).exp())
    upper = torch.where(level == 255, 1.0, density.cdf((level + 0.5) / 127.5 - 1))
    lower = torch.where(level == 0, 0.0, density.cdf((level - 0.5) / 127.5 - 1))
    expected = (upper - lower).log().sum(dim=(1, 2, 3))
    torch.testing.assert_close(
        DiscretizedGaussian().log_prob(level / 127.5 - 1, mean, log_variance), expected, rtol=1e-6, atol=0
    )


def test_a_level_far_from_the_mean_keeps_its_digits():
    x0 = from_uint8(torch.tensor([250], dtype=torch.uint8)).reshape(1, 1).double()
    log_prob = DiscretizedGaussian().log_prob(x0, torch.full_like(x0, -0.9), torch.full_like(x0, math.log(1e-4)))
    lower_edge = (249.5 / 127.5 - 1 + 0.9) / 0.01
    # The first terms of Mills' ratio; the interval's other edge is out of sight.
    expected = -0.5 * lower_edge**2 - math.log(lower_edge * math.sqrt(2 * math.pi)) + math.log1p(-(lower_edge**-2))
    assert log_prob.item() == pytest.approx(expected, rel=1e-8)


def test_the_continuous_decoder_is_a_density():
    x0, mean, log_variance = torch.randn(3, 4, 3, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    expected = Normal(mean, (0.5 * log_variance).exp()).log_prob(x0).sum(dim=(1, 2))
    torch.testing.assert_close(ContinuousGaussian().log_prob(x0, mean, log_variance), expected)
    broadcast = ContinuousGaussian().log_prob(x0, mean, torch.tensor(-1.0, dtype=F64))
    torch.testing.assert_close(broadcast, Normal(mean, math.exp(-0.5)).log_prob(x0).sum(dim=(1, 2)))


# ---- the whole bound, where all of it is known


@every_schedule
def test_the_bound_of_standard_normal_data_is_its_likelihood(schedule):
    """With the best guess and variance beta the steps down undo the steps up, and noise is noise: nothing is lost."""
    x0 = points()
    bound = exact_bound(x0, schedule, 0.0, 1.0, fixed(schedule, BetaVariance()))
    torch.testing.assert_close(bound, -Normal(0.0, 1.0).log_prob(x0)[:, 0], rtol=0, atol=2e-5)


@pytest.mark.parametrize(("mean", "std"), [(0.4, 0.5), (-1.0, 2.0)])
def test_with_the_best_variance_the_bound_is_the_likelihood_but_for_what_the_end_remembers(mean, std):
    schedule, x0 = LinearSchedule(60, beta_end=0.3), points()
    _, alpha, sigma = schedule.level(59)
    bound = exact_bound(x0, schedule, mean, std, optimal(schedule, std))
    # What is lost: p(x_T) is the standard normal, not the marginal of the data.
    x_t = Normal(alpha * x0, sigma)
    end = Normal(torch.tensor(alpha * mean, dtype=F64), math.sqrt(alpha**2 * std**2 + sigma**2))
    lost = kl_divergence(x_t, Normal(torch.zeros((), dtype=F64), 1.0)) - kl_divergence(x_t, end)
    nll = -Normal(mean, std).log_prob(x0)
    torch.testing.assert_close(bound, (nll + lost)[:, 0], rtol=0, atol=2e-5)


@pytest.mark.parametrize("variance", [BetaVariance(), PosteriorVariance()])
@pytest.mark.parametrize("num_timesteps", [10, 80])
def test_the_expected_bound_lies_above_the_negative_log_likelihood(variance, num_timesteps):
    schedule, std = LinearSchedule(num_timesteps, beta_end=0.3), 0.5
    draws = 0.4 + std * torch.tensor([-1.0, 1.0], dtype=F64)[:, None]  # quadratic here, too: the mean over the data
    bound = exact_bound(draws, schedule, 0.4, std, fixed(schedule, variance)).mean()
    entropy = 0.5 * math.log(2 * math.pi * math.e * std**2)
    assert bound > entropy + 0.01


# ---- the estimate


@pytest.mark.parametrize(("num_steps", "expected_terms"), [(None, 13), (12, 13), (5, 6), (1, 2)])
def test_the_estimate_has_the_terms_of_its_steps_and_estimates_the_likelihood(num_steps, expected_terms):
    schedule = LinearSchedule(12, beta_end=0.5)
    x0 = points(3).repeat(4_000, 1)
    bound = evaluate_bound(
        denoiser(schedule), x0, BetaVariance(), ContinuousGaussian(), num_steps, torch.Generator().manual_seed(0)
    )
    assert bound.shape == (expected_terms, len(x0))
    total = bound.sum(dim=0).reshape(-1, 3)
    expected = -Normal(0.0, 1.0).log_prob(points(3))[:, 0]
    error = total.std(dim=0).max() / math.sqrt(len(total))
    torch.testing.assert_close(total.mean(dim=0), expected, rtol=0, atol=float(5 * error))


def test_terms_are_those_of_single_times():
    schedule = CosineSchedule(6)
    x0 = from_uint8(torch.randint(256, (4, 3, 2, 5), generator=torch.Generator().manual_seed(0))).double()
    denoise, generator = denoiser(schedule, 0.1, 0.5, raw=0.3), torch.Generator().manual_seed(7)
    terms = evaluate_bound(denoise, x0, LearnedVariance(), generator=generator)
    generator.manual_seed(7)
    for t in reversed(range(6)):
        times = torch.full((4,), t)
        _, alpha, sigma = schedule.level(t)
        guess = denoise(alpha * x0 + sigma * torch.randn(4, 3, 2, 5, generator=generator), schedule.level(t))
        log_beta, log_beta_tilde = (v.double()[0] for v in training_variances(schedule, times))
        log_variance = LearnedVariance().choose(log_beta, log_beta_tilde, guess.variance)
        expected = vlb_term(x0, guess.x0, times, log_variance, schedule, DiscretizedGaussian())
        torch.testing.assert_close(terms[t], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(terms[6], prior_term(x0, schedule))


def test_figures_depend_on_neither_the_batch_nor_the_number_of_processes():
    schedule = LinearSchedule(8, beta_end=0.5)
    x0 = from_uint8(torch.randint(256, (6, 3, 2, 5), generator=torch.Generator().manual_seed(0)))
    denoise = denoiser(schedule, 0.0, 0.5)
    together = evaluate_bound(denoise, x0, PosteriorVariance(), generator=sample_generators(3, 6))
    apart = [
        evaluate_bound(denoise, x0[part], PosteriorVariance(), generator=sample_generators(3, 2, part.start))
        for part in (slice(0, 2), slice(2, 4), slice(4, 6))
    ]
    torch.testing.assert_close(together, torch.cat(apart, dim=1))
    assert together.dtype == torch.float32


def test_the_network_is_asked_in_evaluation_mode_and_without_a_gradient():
    schedule = LinearSchedule(4, beta_end=0.5)
    denoise = denoiser(schedule)
    denoise.network.mean = nn.Parameter(torch.zeros(()))
    bound = evaluate_bound(denoise, torch.zeros(2, 3), BetaVariance(), ContinuousGaussian())
    assert denoise.network.modes == [False] * 4
    assert denoise.network.training
    assert not bound.requires_grad


def test_a_schedule_that_ends_in_noise_alone_has_a_finite_bound():
    schedule = LinearSchedule(6, beta_end=0.5, zero_terminal_snr=True)
    x0, level = points(), schedule.level(5)
    assert level.alpha == 0
    denoise = Denoiser(GaussianData(schedule, 0.0, 1.0), schedule, CleanImage())
    terms = evaluate_bound(denoise, x0, PosteriorVariance(), ContinuousGaussian())
    assert terms.isfinite().all()
    assert terms[-1].tolist() == [0.0] * 5


# ---- refusals


@pytest.mark.parametrize(
    ("x0", "message"),
    [
        (torch.zeros(1, 3), r"up to 0\.5 levels from the nearest"),
        (torch.full((1, 3), -1 - 2 / 127.5), r"got values from -1\.016 to -1\.016"),
        (torch.full((1, 3), 1 + 2 / 127.5), r"got values from 1\.016 to 1\.016"),
        (torch.full((1, 3), float("nan")), "got values from nan"),
    ],
)
def test_data_without_levels_is_refused(x0, message):
    with pytest.raises(ValueError, match=f"DiscretizedGaussian: data must hold the 256 levels .*{message}"):
        evaluate_bound(denoiser(LinearSchedule(4)), x0, BetaVariance())


def test_a_network_that_remembers_is_refused():
    schedule = LinearSchedule(4)
    denoise = Denoiser(GaussianData(schedule, 0.0, 1.0), schedule, Epsilon(), self_conditioning=True)
    with pytest.raises(ValueError, match="evaluate_bound: with self_conditioning a step depends on the guesses"):
        evaluate_bound(denoise, torch.zeros(2, 3), BetaVariance(), ContinuousGaussian())


def test_more_steps_than_levels_are_refused():
    with pytest.raises(ValueError, match="num_steps=5 is more than the schedule's 4 noise levels"):
        evaluate_bound(denoiser(LinearSchedule(4)), torch.zeros(2, 3), BetaVariance(), ContinuousGaussian(), 5)
