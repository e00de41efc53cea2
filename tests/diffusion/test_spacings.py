import itertools

import pytest
import torch

from lit_generative.diffusion.continuous import CosineLogSNR, EDMSchedule, LinearLogSNR, RectifiedFlow
from lit_generative.diffusion.schedules import CosineSchedule, LinearSchedule, NoiseSchedule, Time
from lit_generative.diffusion.spacings import EvenLogSNR, Karras, Leading, Linspace, Spacing, Trailing

SPACINGS = [cls for cls in Spacing.__subclasses__() if cls.__module__.startswith("lit_generative.")]
SHORT = [LinearSchedule(40), CosineSchedule(7), LinearSchedule(1)]
CONTINUOUS = [CosineLogSNR(), LinearLogSNR(), EDMSchedule()]
every_spacing = pytest.mark.parametrize("spacing_class", SPACINGS)
by_ratio = pytest.mark.parametrize("spacing_class", [Karras, EvenLogSNR])


def ratio(schedule: NoiseSchedule, t: Time) -> float:
    _, alpha, sigma = schedule.level(t)
    return sigma / alpha


@every_spacing
def test_times_fall_within_the_schedule_as_many_as_asked_for(spacing_class):
    schedules = [LinearSchedule(), *([] if spacing_class is Leading else CONTINUOUS)]
    if spacing_class not in (Karras, EvenLogSNR):  # these find too few times where there are few
        schedules += SHORT
    for schedule in schedules:
        for num_steps in range(1, min(getattr(schedule, "num_timesteps", 30), 30) + 1):
            times = spacing_class().times(schedule, num_steps)
            assert len(times) == num_steps
            assert all(then < now for now, then in itertools.pairwise(times))
            assert times[-1] > schedule.clean
            assert [schedule.level(t).t for t in times] == times
            assert all(isinstance(t, type(schedule.clean)) for t in times)
            if spacing_class is not Leading:
                assert times[0] == schedule.even_times(1)[0]


@every_spacing
def test_more_steps_than_levels_are_refused(spacing_class):
    with pytest.raises(ValueError, match="num_steps=11 is more than the schedule's 10 noise levels"):
        spacing_class().times(LinearSchedule(10), 11)


def test_linspace_by_hand():
    assert Linspace().times(LinearSchedule(101), 5) == [100, 75, 50, 25, 0]
    assert Linspace().times(LinearSchedule(8), 4) == [7, 5, 2, 0]  # 7, 4.67, 2.33, 0


def test_linspace_visits_all_times_if_it_may():
    assert Linspace().times(LinearSchedule(40), 40) == list(range(39, -1, -1))


def test_linspace_does_not_depend_on_the_default_dtype():
    torch.set_default_dtype(torch.bfloat16)  # as Lightning does around a step with precision "bf16-true"
    try:
        assert Linspace().times(LinearSchedule(), 5) == [999, 749, 500, 250, 0]
    finally:
        torch.set_default_dtype(torch.float32)


# ---- leading and trailing


@pytest.mark.parametrize("num_steps", [1, 3, 7, 30, 50, 999, 1000])
@pytest.mark.parametrize(
    ("spacing", "settings"),
    [
        (Leading(), {"timestep_spacing": "leading"}),
        (Leading(1), {"timestep_spacing": "leading", "steps_offset": 1}),
        (Trailing(), {"timestep_spacing": "trailing"}),
    ],
    ids=["leading", "leading, offset", "trailing"],
)
def test_times_agree_with_diffusers(spacing, settings, num_steps):
    from diffusers import DDIMScheduler

    if (num_steps, settings.get("steps_offset")) == (1000, 1):
        return  # diffusers would visit time 1000
    scheduler = DDIMScheduler(**settings)
    scheduler.set_timesteps(num_steps)
    assert spacing.times(LinearSchedule(), num_steps) == scheduler.timesteps.tolist()


def test_leading_and_trailing_by_hand():
    assert Leading().times(LinearSchedule(10), 3) == [6, 3, 0]
    assert Leading(offset=2).times(LinearSchedule(10), 3) == [8, 5, 2]
    assert Trailing().times(LinearSchedule(10), 3) == [9, 6, 2]  # 10, 6.67, 3.33, less 1


def test_trailing_steps_of_a_flow_are_all_alike():
    assert Trailing().times(RectifiedFlow(), 4) == [1, 0.75, 0.5, 0.25]


def test_an_offset_beyond_the_schedule_is_refused():
    assert Leading(offset=3).times(LinearSchedule(10), 3) == [9, 6, 3]
    with pytest.raises(ValueError, match="Leading: offset=4 goes beyond the schedule's 10 noise levels"):
        Leading(offset=4).times(LinearSchedule(10), 3)
    with pytest.raises(ValueError, match="Leading: offset must be at least 0, got -1"):
        Leading(offset=-1)


def test_leading_refuses_a_continuous_schedule():
    with pytest.raises(ValueError, match="Leading counts the steps of a discrete schedule, and a EDMSchedule has none"):
        Leading().times(EDMSchedule(), 3)


# ---- in sigma / alpha


@pytest.mark.parametrize("rho", [1.0, 7.0])
def test_karras_agrees_with_diffusers(rho):
    from diffusers import EDMEulerScheduler

    scheduler = EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, rho=rho)
    scheduler.set_timesteps(18)
    schedule = EDMSchedule(sigma_min=0.002, sigma_max=80.0)
    sigmas = torch.tensor([ratio(schedule, t) for t in Karras(rho).times(schedule, 18)])
    torch.testing.assert_close(sigmas, scheduler.sigmas[:-1], rtol=1e-4, atol=1e-6)


def test_karras_by_hand():
    # sqrt(sigma) evenly from 4 to 1: 4, 3, 2, 1
    schedule = EDMSchedule(sigma_min=1.0, sigma_max=16.0)
    assert [ratio(schedule, t) for t in Karras(rho=2).times(schedule, 4)] == pytest.approx([16, 9, 4, 1])


def test_even_log_snr_by_hand():
    schedule = EDMSchedule(sigma_min=0.5, sigma_max=32.0)
    assert [ratio(schedule, t) for t in EvenLogSNR().times(schedule, 4)] == pytest.approx([32, 8, 2, 0.5])


@by_ratio
def test_ends_may_be_chosen(spacing_class):
    spacing = spacing_class(sigma_min=0.1, sigma_max=10.0)
    for schedule in (RectifiedFlow(), CosineLogSNR(), EDMSchedule()):
        times = spacing.times(schedule, 5)
        assert [ratio(schedule, t) for t in (times[0], times[-1])] == pytest.approx([10, 0.1])
        assert ratio(schedule, times[2]) < 5.05  # more steps where there is little noise than with even ones
    schedule = LinearSchedule()
    times = spacing.times(schedule, 5)
    assert [times[0], times[-1]] == [schedule.nearest_time(10), schedule.nearest_time(0.1)]


@by_ratio
def test_a_single_step_starts_at_the_noisiest_time_or_the_chosen_one(spacing_class):
    assert spacing_class().times(EDMSchedule(), 1) == [1.0]
    (t,) = spacing_class(sigma_min=0.1, sigma_max=10.0).times(EDMSchedule(), 1)
    assert ratio(EDMSchedule(), t) == pytest.approx(10)


@by_ratio
def test_times_that_coincide_are_refused(spacing_class):
    with pytest.raises(
        ValueError, match=rf"{spacing_class.__name__}: num_steps=300 are too many, as they fall on 2\d\d"
    ):
        spacing_class().times(LinearSchedule(), 300)


@by_ratio
@pytest.mark.parametrize("schedule", [RectifiedFlow(), LinearSchedule(zero_terminal_snr=True)], ids=["flow", "linear"])
def test_pure_noise_has_no_place_among_ratios(spacing_class, schedule):
    with pytest.raises(ValueError, match=rf"{spacing_class.__name__}: the .* starts at pure noise"):
        spacing_class().times(schedule, 5)
    assert len(spacing_class(sigma_max=80.0).times(schedule, 5)) == 5


@by_ratio
@pytest.mark.parametrize("ends", [{"sigma_min": 0.001}, {"sigma_max": 81.0}])
@pytest.mark.parametrize("schedule", [EDMSchedule(), LinearSchedule(beta_end=0.0172)], ids=["EDM", "linear"])
def test_ends_beyond_the_schedule_are_refused(spacing_class, schedule, ends):
    with pytest.raises(ValueError, match=rf"{spacing_class.__name__}: sigma / alpha of the .* lies in \[0.0\d+, [78]"):
        spacing_class(**ends).times(schedule, 5)


@by_ratio
@pytest.mark.parametrize(
    "ends", [{"sigma_min": 0.0}, {"sigma_min": -1.0}, {"sigma_min": 2.0, "sigma_max": 2.0}, {"sigma_max": 0.0}]
)
def test_ends_in_the_wrong_order_are_refused(spacing_class, ends):
    with pytest.raises(ValueError, match=f"{spacing_class.__name__}: needs 0 < sigma_min < sigma_max, got"):
        spacing_class(**ends)


def test_a_rho_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match="Karras: rho must be positive, got 0"):
        Karras(rho=0)


def test_a_large_rho_is_even_in_log_snr():
    schedule = EDMSchedule()
    steep, even = ([ratio(schedule, t) for t in s.times(schedule, 9)] for s in (Karras(rho=1e5), EvenLogSNR()))
    assert steep == pytest.approx(even, rel=1e-3)
