import pytest
import torch

from lit_generative.diffusion.schedules import CosineSchedule, LinearSchedule, NoiseSchedule

SCHEDULES = [cls for cls in NoiseSchedule.__subclasses__() if cls.__module__.startswith("lit_generative.")]
every_schedule = pytest.mark.parametrize("schedule_class", SCHEDULES)


@every_schedule
def test_alpha_and_sigma_preserve_the_variance(schedule_class):
    schedule = schedule_class()
    alpha, sigma = schedule.alpha_sigma(torch.arange(-1, schedule.num_timesteps))
    torch.testing.assert_close(alpha.square() + sigma.square(), torch.ones(1001))


@every_schedule
def test_alpha_falls_and_sigma_rises_with_time(schedule_class):
    schedule = schedule_class()
    alpha, sigma = schedule.alpha_sigma(torch.arange(-1, schedule.num_timesteps))
    assert (alpha.diff() < 0).all()
    assert (sigma.diff() > 0).all()
    assert alpha[-1] < 0.01


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
def test_exact_factors_are_those_of_the_schedule_in_double_precision(schedule_class):
    schedule = schedule_class()
    exact = torch.tensor([schedule.exact_alpha_sigma(t) for t in range(-1, 1000)], dtype=torch.float64)
    torch.testing.assert_close(exact.square().sum(dim=1), torch.ones(1001, dtype=torch.float64), rtol=0, atol=1e-15)
    torch.testing.assert_close(exact[1:, 0], schedule.alphas_cumprod.sqrt(), rtol=1e-15, atol=0)
    rounded = torch.stack(schedule.alpha_sigma(torch.arange(-1, 1000)), dim=1)
    torch.testing.assert_close(exact.float(), rounded, rtol=1e-6, atol=0)
    assert exact[0].tolist() == [1.0, 0.0]


@every_schedule
def test_exact_factors_survive_a_change_of_dtype(schedule_class):
    cast = schedule_class().to(torch.bfloat16)
    assert cast.exact_alpha_sigma(0) == schedule_class().exact_alpha_sigma(0)


@every_schedule
def test_a_schedule_has_as_many_levels_as_asked_for_and_nothing_to_save(schedule_class):
    schedule = schedule_class(num_timesteps=7)
    assert schedule.num_timesteps == 7
    assert schedule.state_dict() == {}


@pytest.mark.parametrize(("schedule", "name"), [(LinearSchedule(), "linear"), (CosineSchedule(), "squaredcos_cap_v2")])
def test_schedules_agree_with_diffusers(schedule, name):
    from diffusers import DDPMScheduler

    expected = DDPMScheduler(num_train_timesteps=1000, beta_schedule=name).alphas_cumprod
    torch.testing.assert_close(schedule.alphas_cumprod.float(), expected, rtol=1e-4, atol=1e-7)


def test_linear_schedule_by_hand():
    schedule = LinearSchedule(num_timesteps=3, beta_start=0.1, beta_end=0.3)
    expected = torch.tensor([0.9, 0.9 * 0.8, 0.9 * 0.8 * 0.7], dtype=torch.float64)
    torch.testing.assert_close(schedule.alphas_cumprod, expected)
    alpha, sigma = schedule.alpha_sigma(torch.tensor([0, 2]))
    torch.testing.assert_close(alpha, torch.tensor([0.9, 0.504]).sqrt())
    torch.testing.assert_close(sigma, torch.tensor([0.1, 0.496]).sqrt())


def test_cosine_schedule_by_hand():
    # cos(0)**2 = 1, cos(pi / 4)**2 = 1 / 2, cos(pi / 2)**2 = 0: the last beta is 1, lowered to 0.999.
    expected = torch.tensor([0.5, 0.5 * 0.001], dtype=torch.float64)
    torch.testing.assert_close(CosineSchedule(num_timesteps=2, offset=0.0).alphas_cumprod, expected)


def test_a_larger_offset_makes_the_first_beta_of_the_cosine_larger():
    small, large = (CosineSchedule(offset=offset).alphas_cumprod[0] for offset in (0.001, 0.1))
    assert large < small


@pytest.mark.parametrize("betas", [{"beta_start": 0.0}, {"beta_end": 1.0}])
def test_betas_outside_the_unit_interval_are_refused(betas):
    with pytest.raises(ValueError, match=r"LinearSchedule: every beta must lie in \(0, 1\)"):
        LinearSchedule(**betas)


@every_schedule
def test_a_schedule_without_levels_is_refused(schedule_class):
    with pytest.raises(ValueError, match=f"{schedule_class.__name__}: num_timesteps must be at least 1, got 0"):
        schedule_class(num_timesteps=0)
