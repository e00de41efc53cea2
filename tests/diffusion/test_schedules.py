import math

import pytest
import torch

from lit_generative.diffusion.schedules import (
    CosineSchedule,
    DiscreteSchedule,
    LinearSchedule,
    ScaledLinearSchedule,
    SigmoidSchedule,
)
from lit_generative.recipe import describe

SCHEDULES = [cls for cls in DiscreteSchedule.__subclasses__() if cls.__module__.startswith("lit_generative.")]
DIFFUSERS = {
    LinearSchedule: {"beta_schedule": "linear"},
    ScaledLinearSchedule: {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    CosineSchedule: {"beta_schedule": "squaredcos_cap_v2"},
}
every_schedule = pytest.mark.parametrize("schedule_class", SCHEDULES)
every_terminal = pytest.mark.parametrize("zero", [False, True], ids=["", "zero terminal SNR"])
every_diffusers = pytest.mark.parametrize("schedule_class", DIFFUSERS)


def diffusers_scheduler(schedule: DiscreteSchedule, zero: bool):
    from diffusers import DDPMScheduler

    return DDPMScheduler(schedule.num_timesteps, rescale_betas_zero_snr=zero, **DIFFUSERS[type(schedule)])


@every_schedule
@every_terminal
def test_alpha_and_sigma_preserve_the_variance(schedule_class, zero):
    schedule = schedule_class(zero_terminal_snr=zero)
    alpha, sigma = schedule.alpha_sigma(torch.arange(-1, schedule.num_timesteps))
    torch.testing.assert_close(alpha.square() + sigma.square(), torch.ones(1001))


@every_schedule
@every_terminal
def test_the_signal_to_noise_ratio_falls_at_every_step(schedule_class, zero):
    schedule = schedule_class(zero_terminal_snr=zero)
    levels = torch.tensor([schedule.level(t)[1:] for t in range(1000)], dtype=torch.float64)
    alpha, sigma = levels.T
    assert (alpha.diff() < 0).all()
    assert ((alpha / sigma).log().diff() < 0).all()
    assert 0.9995 < alpha[0] < 1


@pytest.mark.parametrize(
    ("schedule_class", "last"),
    [(LinearSchedule, 0.0064), (ScaledLinearSchedule, 0.0683), (CosineSchedule, 0.0), (SigmoidSchedule, 0.0005)],
)
def test_little_of_the_image_is_left_at_the_end(schedule_class, last):
    assert schedule_class().level(999).alpha == pytest.approx(last, abs=1e-4)


@every_schedule
def test_time_minus_one_is_clean(schedule_class):
    alpha, sigma = schedule_class().alpha_sigma(torch.tensor([-1, 3]))
    assert alpha[0] == 1
    assert sigma[0] == 0
    assert sigma[1] > 0


@every_schedule
def test_factors_have_the_shape_of_the_times_and_are_float32(schedule_class):
    for t in (torch.tensor(4), torch.zeros(2, 3, dtype=torch.int64)):
        for factor in schedule_class(num_timesteps=5).alpha_sigma(t):
            assert factor.shape == t.shape
            assert factor.dtype == torch.float32


@every_schedule
def test_sigma_of_the_first_steps_keeps_its_digits(schedule_class):
    schedule = schedule_class()
    _, sigma = schedule.alpha_sigma(torch.tensor(0))
    assert sigma.item() == pytest.approx((1 - schedule.alphas_cumprod[0].item()) ** 0.5, rel=1e-7)


@every_schedule
@every_terminal
def test_exact_factors_are_those_of_the_schedule_in_double_precision(schedule_class, zero):
    schedule = schedule_class(zero_terminal_snr=zero)
    exact = torch.tensor([schedule.level(t)[1:] for t in range(-1, 1000)], dtype=torch.float64)
    torch.testing.assert_close(exact.square().sum(dim=1), torch.ones(1001, dtype=torch.float64), rtol=0, atol=1e-15)
    torch.testing.assert_close(exact[1:, 0], schedule.alphas_cumprod.sqrt(), rtol=1e-15, atol=0)
    rounded = torch.stack(schedule.alpha_sigma(torch.arange(-1, 1000)), dim=1)
    torch.testing.assert_close(exact.float(), rounded, rtol=1e-6, atol=0)
    assert exact[0].tolist() == [1.0, 0.0]


@every_schedule
def test_exact_factors_survive_a_change_of_dtype(schedule_class):
    cast = schedule_class().to(torch.bfloat16)
    assert cast.level(0) == schedule_class().level(0)


@every_schedule
def test_a_schedule_has_as_many_levels_as_asked_for_and_nothing_to_save(schedule_class):
    schedule = schedule_class(num_timesteps=7)
    assert schedule.num_timesteps == 7
    assert schedule.state_dict() == {}


# ---- times


@every_schedule
@every_terminal
def test_the_nearest_time_finds_each_level_again(schedule_class, zero):
    schedule = schedule_class(num_timesteps=60, zero_terminal_snr=zero)
    for t in range(60):
        _, alpha, sigma = schedule.level(t)
        ratio = sigma / alpha if alpha > 0 else math.inf
        assert schedule.nearest_time(ratio) == t
        if alpha > 0:
            near = schedule.nearest_time(ratio * (1 + 1e-6))
            assert (near, type(near)) == (t, int)


@every_schedule
@every_terminal
def test_the_nearest_time_to_more_noise_than_there_is_is_the_noisiest(schedule_class, zero):
    schedule = schedule_class(num_timesteps=60, zero_terminal_snr=zero)
    assert schedule.nearest_time(math.inf) == 59
    assert schedule.nearest_time(1e-9) == 0
    assert LinearSchedule(60).nearest_time(1e9) == 59


def test_the_nearest_time_is_nearest_in_the_logarithm():
    schedule = LinearSchedule(num_timesteps=2, beta_start=0.1, beta_end=0.9)  # sigma / alpha: 1 / 3 and 3.18
    geometric = (1 / 3 * (0.91 / 0.09) ** 0.5) ** 0.5  # 1.03; the arithmetic mean is 1.76
    assert [schedule.nearest_time(geometric * factor) for factor in (0.99, 1.01)] == [0, 1]


@every_schedule
def test_spread_numbers_fall_on_each_time_equally_often_and_in_order(schedule_class):
    times = schedule_class(num_timesteps=5).spread((torch.arange(100) + 0.5) / 100)
    assert times.tolist() == [t for t in range(5) for _ in range(20)]
    assert schedule_class(num_timesteps=5).spread(torch.tensor([1.0])).tolist() == [4]


@every_schedule
def test_random_times_are_steps_of_the_schedule(schedule_class):
    torch.manual_seed(0)
    times = schedule_class(num_timesteps=4).random_times(1000, "cpu")
    assert times.dtype == torch.int64
    assert times.unique().tolist() == [0, 1, 2, 3]


def test_even_times_by_hand():
    assert LinearSchedule(101).even_times(5) == [100, 75, 50, 25, 0]
    assert LinearSchedule(101).even_times(1) == [100]


@every_schedule
@pytest.mark.parametrize("t", [-2, 5, 0.5, math.nan])
def test_a_level_outside_the_schedule_is_refused(schedule_class, t):
    with pytest.raises(ValueError, match=rf"{schedule_class.__name__}: times must be integers in \[0, 5\), or -1"):
        schedule_class(num_timesteps=5).level(t)


@every_schedule
@pytest.mark.parametrize("t", [-2, 5])
def test_times_outside_the_schedule_are_refused(schedule_class, t):
    with pytest.raises(ValueError, match=rf"{schedule_class.__name__}: times must be .* got {t}"):
        schedule_class(num_timesteps=5).alpha_sigma(torch.tensor([[0, t], [4, -1]]))


def test_times_between_steps_are_refused():
    with pytest.raises(ValueError, match=r"LinearSchedule: times must be integers in \[0, 5\), .* got 3\.0"):
        LinearSchedule(num_timesteps=5).alpha_sigma(torch.tensor([3.0, 4.0]))


# ---- zero terminal SNR


@every_schedule
def test_zero_terminal_snr_leaves_nothing_of_the_image_at_the_end_and_the_first_level_as_it_was(schedule_class):
    before, after = schedule_class(), schedule_class(zero_terminal_snr=True)
    assert after.level(999)[1:] == (0.0, 1.0)
    assert [value.item() for value in after.alpha_sigma(torch.tensor(999))] == [0.0, 1.0]
    assert after.betas[-1] == 1
    assert after.level(0).alpha == pytest.approx(before.level(0).alpha, rel=1e-14)


def test_zero_terminal_snr_by_hand():
    # sqrt(alphas_cumprod) of 0.8, 0.6, 0.3 is shifted to 0.5, 0.3, 0 and stretched by 0.8 / 0.5.
    alphas_cumprod = torch.tensor([0.8, 0.6, 0.3], dtype=torch.float64).square()
    betas = 1 - alphas_cumprod / torch.tensor([1.0, 0.64, 0.36], dtype=torch.float64)
    expected = torch.tensor([0.8, 0.48, 0.0], dtype=torch.float64)
    torch.testing.assert_close(DiscreteSchedule(betas, zero_terminal_snr=True).alphas_cumprod.sqrt(), expected)


@every_schedule
def test_zero_terminal_snr_agrees_with_diffusers(schedule_class):
    from diffusers.schedulers.scheduling_ddpm import rescale_zero_terminal_snr

    expected = rescale_zero_terminal_snr(schedule_class().betas)
    torch.testing.assert_close(schedule_class(zero_terminal_snr=True).betas, expected, rtol=0, atol=1e-12)


@every_schedule
def test_zero_terminal_snr_of_a_single_level_is_refused(schedule_class):
    with pytest.raises(ValueError, match=f"{schedule_class.__name__}: zero_terminal_snr .* at least 2, got 1"):
        schedule_class(num_timesteps=1, zero_terminal_snr=True)


@every_schedule
def test_a_recipe_says_how_a_schedule_ends(schedule_class):
    arguments = describe(schedule_class(num_timesteps=3, zero_terminal_snr=True))["init_args"]
    assert schedule_class(**arguments).level(2).alpha == 0
    assert describe(schedule_class())["init_args"]["zero_terminal_snr"] is False


# ---- each schedule


@every_diffusers
@every_terminal
@pytest.mark.parametrize("num_timesteps", [1000, 70])
def test_schedules_agree_with_diffusers(schedule_class, zero, num_timesteps):
    schedule = schedule_class(num_timesteps, zero_terminal_snr=zero)
    expected = diffusers_scheduler(schedule, zero).alphas_cumprod
    torch.testing.assert_close(schedule.alphas_cumprod.float(), expected, rtol=0, atol=1e-6)


@every_diffusers
@every_terminal
def test_noise_is_added_as_in_diffusers(schedule_class, zero):
    schedule = schedule_class(zero_terminal_snr=zero)
    scheduler = diffusers_scheduler(schedule, zero)
    scheduler.alphas_cumprod = schedule.alphas_cumprod  # diffusers keeps float32, whose sigma is 1e-5 off near t = 0
    x0, eps = torch.randn(2, 5, 3, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.tensor([0, 10, 200, 700, 999])
    alpha, sigma = (value.reshape(5, 1, 1, 1) for value in schedule.alpha_sigma(t))
    torch.testing.assert_close(alpha * x0 + sigma * eps, scheduler.add_noise(x0, eps, t), rtol=1e-6, atol=1e-6)


def test_linear_schedule_by_hand():
    schedule = LinearSchedule(num_timesteps=3, beta_start=0.1, beta_end=0.3)
    expected = torch.tensor([0.9, 0.9 * 0.8, 0.9 * 0.8 * 0.7], dtype=torch.float64)
    torch.testing.assert_close(schedule.alphas_cumprod, expected)
    alpha, sigma = schedule.alpha_sigma(torch.tensor([0, 2]))
    torch.testing.assert_close(alpha, torch.tensor([0.9, 0.504]).sqrt())
    torch.testing.assert_close(sigma, torch.tensor([0.1, 0.496]).sqrt())


def test_scaled_linear_schedule_by_hand():
    schedule = ScaledLinearSchedule(num_timesteps=3, beta_start=0.01, beta_end=0.09)
    torch.testing.assert_close(schedule.betas, torch.tensor([0.01, 0.04, 0.09], dtype=torch.float64))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_sigmoid_schedule_by_hand():
    schedule = SigmoidSchedule(num_timesteps=3, start=-1.0, end=2.0, tau=0.5)
    first, last = sigmoid(-2), sigmoid(4)  # and 0 and 2 between them
    gamma = [(last - sigmoid(x)) / (last - first) for x in (0, 2)]
    expected = torch.tensor([*gamma, gamma[-1] * 0.001], dtype=torch.float64)
    torch.testing.assert_close(schedule.alphas_cumprod, expected)


def test_the_sigmoid_goes_from_minus_three_to_three():
    alphas_cumprod = SigmoidSchedule().alphas_cumprod
    assert alphas_cumprod[499].item() == pytest.approx(0.5)
    expected = (sigmoid(3) - sigmoid(-1.5)) / (sigmoid(3) - sigmoid(-3))
    assert alphas_cumprod[249].item() == pytest.approx(expected)


def test_a_sharp_sigmoid_keeps_its_digits():
    # In double precision the sigmoids of 36 and 40 are 1 less a handful of ulps, whose difference has no digits left.
    schedule = SigmoidSchedule(num_timesteps=1000, start=0.0, end=40.0)
    assert schedule.alphas_cumprod[899].item() == pytest.approx(2 * (sigmoid(-36) - sigmoid(-40)), rel=1e-9)


def test_cosine_schedule_by_hand():
    # cos(0)**2 = 1, cos(pi / 4)**2 = 1 / 2, cos(pi / 2)**2 = 0: the last beta is 1, lowered to 0.999.
    expected = torch.tensor([0.5, 0.5 * 0.001], dtype=torch.float64)
    torch.testing.assert_close(CosineSchedule(num_timesteps=2, offset=0.0).alphas_cumprod, expected)


def test_a_larger_offset_makes_the_first_beta_of_the_cosine_larger():
    small, large = (CosineSchedule(offset=offset).alphas_cumprod[0] for offset in (0.001, 0.1))
    assert large < small


@pytest.mark.parametrize("offset", [-0.1, math.inf, math.nan])
def test_an_offset_of_the_cosine_that_is_none_is_refused(offset):
    with pytest.raises(ValueError, match="CosineSchedule: offset must be at least 0 and finite, got"):
        CosineSchedule(offset=offset)


@pytest.mark.parametrize("schedule_class", [LinearSchedule, ScaledLinearSchedule])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("betas", [{"beta_start": 0.0}, {"beta_end": 1.0}, {"beta_start": -0.1}, {"beta_end": -0.1}])
def test_betas_outside_the_unit_interval_are_refused(schedule_class, betas, zero):
    with pytest.raises(ValueError, match=rf"^{schedule_class.__name__}: betas must lie in \(0, 1\)"):
        schedule_class(**betas, zero_terminal_snr=zero)


@pytest.mark.parametrize("piece", [{"start": 3.0}, {"end": -4.0}, {"tau": 0.0}, {"tau": -1.0}])
def test_a_sigmoid_that_does_not_fall_is_refused(piece):
    with pytest.raises(ValueError, match="SigmoidSchedule: start must be below end and tau positive"):
        SigmoidSchedule(**piece)


@every_schedule
def test_a_schedule_without_levels_is_refused(schedule_class):
    with pytest.raises(ValueError, match=f"{schedule_class.__name__}: num_timesteps must be at least 1, got 0"):
        schedule_class(num_timesteps=0)
