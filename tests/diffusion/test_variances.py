import pytest
import torch

from lit_generative.diffusion.continuous import EDMSchedule, RectifiedFlow
from lit_generative.diffusion.schedules import CosineSchedule, Level, LinearSchedule
from lit_generative.diffusion.variances import (
    BetaVariance,
    LearnedVariance,
    PosteriorVariance,
    ReverseVariance,
    between,
    step_variances,
    training_variances,
)

VARIANCES = [cls for cls in ReverseVariance.__subclasses__() if cls.__module__.startswith("lit_generative.")]
SCHEDULES = [LinearSchedule(50), CosineSchedule(50, zero_terminal_snr=True), RectifiedFlow(), EDMSchedule()]
RAW = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(2, 3, 1, 4)


def doubles(*values: float) -> list[torch.Tensor]:
    return [torch.tensor(v, dtype=torch.float64) for v in values]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_variances_are_those_of_the_gaussians_that_the_levels_make(schedule):
    # x_next = a x0 + s eps, x = ratio x_next + sqrt(beta) eps': beta from x's variance, beta tilde by conditioning.
    now, then = (schedule.level(t) for t in (schedule.even_times(5)[0], schedule.even_times(5)[2]))
    beta, beta_tilde = (v.exp() for v in step_variances(*doubles(now.alpha, now.sigma, then.alpha, then.sigma)))
    ratio = now.alpha / then.alpha
    torch.testing.assert_close(beta + (ratio * then.sigma) ** 2, *doubles(now.sigma**2))
    # given x0: cov(x_next, x) = ratio * s**2, var(x) = sigma**2
    covariance = ratio * then.sigma**2
    torch.testing.assert_close(beta_tilde, *doubles(then.sigma**2 - covariance**2 / now.sigma**2))


def test_variances_by_hand():
    # beta = .64 - (.6 / .8)**2 * .36 = .4375, beta tilde = .4375 * .36 / .64
    beta, beta_tilde = (v.exp() for v in step_variances(*doubles(0.6, 0.8, 0.8, 0.6)))
    torch.testing.assert_close(beta, *doubles(0.4375))
    torch.testing.assert_close(beta_tilde, *doubles(0.4375 * 0.36 / 0.64))


def test_the_last_step_has_no_variance_left_but_beta():
    beta, beta_tilde = (v.exp() for v in step_variances(*doubles(0.6, 0.8, 1.0, 0.0)))
    assert (beta.item(), beta_tilde.item()) == (pytest.approx(0.64), 0.0)


@pytest.mark.parametrize("schedule", [LinearSchedule(), CosineSchedule(50)], ids=["linear", "cosine"])
def test_training_variances_are_the_schedules_betas_and_finite(schedule):
    t = torch.arange(schedule.num_timesteps)
    log_beta, log_beta_tilde = training_variances(schedule, t)
    cumprod = schedule.alphas_cumprod
    torch.testing.assert_close(log_beta.double(), schedule.betas.log(), rtol=1e-6, atol=1e-6)
    expected = schedule.betas[1:] * (1 - cumprod[:-1]) / (1 - cumprod[1:])  # Ho et al. 2020, eq. 7
    torch.testing.assert_close(log_beta_tilde[1:].double(), expected.log(), rtol=1e-6, atol=1e-6)
    assert log_beta_tilde[0] == log_beta_tilde[1]
    assert log_beta.dtype == log_beta_tilde.dtype == torch.float32


def test_training_variances_come_in_the_order_of_the_times():
    schedule, t = LinearSchedule(10), torch.tensor([4, 0, 9, 4])
    for some, all_of_them in zip(
        training_variances(schedule, t), training_variances(schedule, torch.arange(10)), strict=True
    ):
        torch.testing.assert_close(some, all_of_them[t], rtol=0, atol=0)


def test_a_schedule_of_one_level_has_no_training_variances():
    with pytest.raises(ValueError, match=r"LinearSchedule: .* got num_timesteps=1"):
        training_variances(LinearSchedule(1), torch.tensor([0]))


def test_a_learned_variance_lies_between_the_two_by_its_raw_value():
    log_beta, log_beta_tilde = doubles(-1.0, -3.0)
    torch.testing.assert_close(between(RAW, log_beta, log_beta_tilde), -2 + RAW)


@pytest.mark.parametrize("variance_class", VARIANCES)
def test_every_variance_of_a_step_lies_between_beta_tilde_and_beta(variance_class):
    for schedule in SCHEDULES:
        now, then = (schedule.level(t) for t in schedule.even_times(5)[1:3])
        log_beta, log_beta_tilde = step_variances(*doubles(now.alpha, now.sigma, then.alpha, then.sigma))
        chosen = variance_class().log_variance(now, then, RAW)
        assert ((chosen <= log_beta + 1e-12) & (chosen >= log_beta_tilde - 1e-12)).all()


@pytest.mark.parametrize(
    ("variance", "expected"),
    [(PosteriorVariance(), 0.4375 * 0.36 / 0.64), (BetaVariance(), 0.4375)],
    ids=["posterior", "beta"],
)
def test_fixed_variances_by_hand(variance, expected):
    chosen = variance.log_variance(Level(2, 0.6, 0.8), Level(1, 0.8, 0.6))
    torch.testing.assert_close(chosen.exp(), *doubles(expected))


@pytest.mark.parametrize(
    ("variance", "name"),
    [(PosteriorVariance(), "fixed_small"), (BetaVariance(), "fixed_large"), (LearnedVariance(), "learned_range")],
    ids=["posterior", "beta", "learned"],
)
def test_variances_agree_with_diffusers(variance, name):
    from diffusers import DDPMScheduler

    schedule, scheduler = LinearSchedule(), DDPMScheduler(variance_type=name)
    scheduler.alphas_cumprod = schedule.alphas_cumprod  # diffusers keeps float32
    expected = scheduler._get_variance(400, predicted_variance=RAW)  # the learned one as a logarithm
    expected = expected if name == "learned_range" else expected.log()
    chosen = variance.log_variance(schedule.level(400), schedule.level(399), RAW)
    torch.testing.assert_close(chosen, expected)


def test_a_learned_variance_without_the_networks_word_is_refused():
    with pytest.raises(ValueError, match="LearnedVariance: the network must say something of the variance"):
        LearnedVariance().log_variance(Level(2, 0.6, 0.8), Level(1, 0.8, 0.6))
