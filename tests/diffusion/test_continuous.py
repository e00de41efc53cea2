import math

import pytest
import torch

from lit_generative.diffusion.continuous import (
    ContinuousSchedule,
    CosineLogSNR,
    EDMSchedule,
    LinearLogSNR,
    RectifiedFlow,
)
from lit_generative.diffusion.denoiser import Denoiser
from lit_generative.diffusion.parameterizations import CleanImage
from lit_generative.diffusion.samplers import DDIMSampler
from lit_generative.recipe import describe

LEAVES = [cls for cls in ContinuousSchedule.__subclasses__() if cls.__module__.startswith("lit_generative.")]
SCHEDULES = {
    **{cls.__name__: cls() for cls in LEAVES},
    "CosineLogSNR shifted": CosineLogSNR(log_snr_min=-12.0, log_snr_max=10.0, shift=-2.8),
    "LinearLogSNR longer": LinearLogSNR(log_snr_min=-10.0, log_snr_max=9.0),
    "RectifiedFlow shifted": RectifiedFlow(shift=3.0),
    "EDMSchedule shorter": EDMSchedule(sigma_min=0.02, sigma_max=10.0),
}
T_MIN = 2.0**-16
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


def even(num: int = 1001) -> list[float]:
    """From the least noisy time to the noisiest."""
    return [T_MIN + (1 - T_MIN) * i / (num - 1) for i in range(num)]


def log_snr(schedule: ContinuousSchedule, t: float) -> float:
    _, alpha, sigma = schedule.level(t)
    return 2 * math.log(alpha / sigma)


# ---- factors


@every_schedule
def test_the_signal_to_noise_ratio_falls_with_time(schedule):
    alpha, sigma = torch.tensor([schedule.level(t)[1:] for t in even()], dtype=torch.float64).T
    assert alpha.isfinite().all()
    assert sigma.isfinite().all()
    assert (sigma > 0).all()
    assert ((alpha / sigma).log().diff() < 0).all()


PRESERVED = {
    CosineLogSNR: lambda alpha, sigma: alpha**2 + sigma**2,
    LinearLogSNR: lambda alpha, sigma: alpha**2 + sigma**2,
    RectifiedFlow: lambda alpha, sigma: alpha + sigma,
    EDMSchedule: lambda alpha, sigma: alpha,
}


@every_schedule
def test_what_each_schedule_keeps_is_one_at_every_time(schedule):
    kept = PRESERVED[type(schedule)]
    for t in even(50):
        assert kept(*schedule.level(t)[1:]) == pytest.approx(1, abs=1e-15)
    alpha, sigma = schedule.alpha_sigma(torch.linspace(T_MIN, 1, 50))
    torch.testing.assert_close(kept(alpha, sigma), torch.ones(50))


@every_schedule
def test_time_zero_is_clean(schedule):
    assert schedule.clean == 0
    assert schedule.level(0.0) == (0.0, 1.0, 0.0)
    alpha, sigma = schedule.alpha_sigma(torch.tensor([0.0, 0.5]))
    assert (alpha[0], sigma[0]) == (1, 0)
    assert sigma[1] > 0


@every_schedule
def test_factors_have_the_shape_of_the_times_and_are_float32(schedule):
    for t in (torch.tensor(0.4), torch.full((2, 3), 0.4, dtype=torch.float64), torch.zeros(0)):
        for factor in schedule.alpha_sigma(t):
            assert factor.shape == t.shape
            assert factor.dtype == torch.float32


@every_schedule
def test_factors_are_those_of_double_precision_rounded(schedule):
    t = torch.cat([torch.rand(200, generator=torch.Generator().manual_seed(0)), torch.tensor([0.0, T_MIN, 1 - 2**-24])])
    exact = torch.tensor([schedule.level(time)[1:] for time in t.tolist()], dtype=torch.float64)
    torch.testing.assert_close(torch.stack(schedule.alpha_sigma(t), dim=1), exact.float(), rtol=4e-6, atol=0)
    last = [value.item() for value in schedule.alpha_sigma(torch.tensor(1.0))]
    assert last == pytest.approx(schedule.level(1.0)[1:], rel=4e-6)


@every_schedule
def test_samplers_start_from_the_noise_at_the_noisiest_time(schedule):
    # With data of unit variance; what LinearLogSNR leaves of the image is in its sigma of 0.997.
    assert schedule.level(1.0).sigma == pytest.approx(schedule.initial_scale, rel=0.005)


@every_schedule
def test_a_walk_from_noise_ends_at_the_data(schedule):
    mean, std, seen = 0.7, 0.3, []

    class Best(torch.nn.Module):
        """The best guess of data ``N(mean, std**2)``."""

        def forward(self, x_t, t, y=None):
            seen.append(t)
            alpha, sigma = (value[:, None] for value in schedule.alpha_sigma(t))
            return mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x_t - alpha * mean)

    x_t = schedule.initial_scale * torch.randn(5000, 1, generator=torch.Generator().manual_seed(0))
    denoise = Denoiser(Best(), schedule, CleanImage(), clip=False)
    sample, _ = list(DDIMSampler(num_steps=200).trajectory(denoise, x_t, torch.empty))[-1]
    # The noise that the walk starts from knows nothing of the mean, 7 % of the shorter schedule's last sigma.
    torch.testing.assert_close(sample.mean(), torch.tensor(mean), rtol=0, atol=0.03)
    torch.testing.assert_close(sample.std(), torch.tensor(std), rtol=0.06, atol=0)
    assert {(t.dtype, t.shape) for t in seen} == {(torch.float32, (5000,))}


# ---- times


@every_schedule
def test_the_nearest_time_finds_each_level_again(schedule):
    for t in even(101):
        _, alpha, sigma = schedule.level(t)
        assert schedule.nearest_time(sigma / alpha if alpha > 0 else math.inf) == pytest.approx(t, rel=1e-9)


@every_schedule
def test_a_ratio_beyond_the_schedule_is_nearest_to_its_ends(schedule):
    assert [schedule.nearest_time(ratio) for ratio in (1e-20, 1e20, math.inf)] == [T_MIN, 1.0, 1.0]


@every_schedule
def test_even_times_go_from_the_noisiest_to_the_least_noisy(schedule):
    times = schedule.even_times(5)
    torch.testing.assert_close(times, even(5)[::-1], rtol=1e-15, atol=0)
    assert (times[0], times[-1]) == (1.0, T_MIN)
    assert schedule.even_times(1) == [1.0]
    assert len(schedule.even_times(5000)) == 5000


@every_schedule
def test_even_times_do_not_depend_on_the_default_dtype(schedule):
    expected = schedule.even_times(7), schedule.level(0.3)
    torch.set_default_dtype(torch.bfloat16)  # as Lightning does around a step with precision "bf16-true"
    try:
        assert (schedule.even_times(7), schedule.level(0.3)) == expected
        times = schedule.random_times(1000, "cpu")
        assert times.dtype == torch.float32
        assert len(times.unique()) > 900  # bf16 has 256 of them at most
        assert schedule.alpha_sigma(torch.tensor([0.0, 0.3], dtype=torch.float32))[1].dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


@every_schedule
def test_spread_numbers_keep_their_order_and_reach_both_ends(schedule):
    times = schedule.spread(torch.linspace(0, 1, 1001))
    assert times.dtype == torch.float32
    assert (times.diff() > 0).all()
    assert (times[0], times[-1]) == (T_MIN, 1)
    torch.testing.assert_close(times[500].item(), (1 + T_MIN) / 2)
    assert schedule.spread(torch.zeros(1, dtype=torch.float64)).dtype == torch.float32


@every_schedule
def test_random_times_are_uniform(schedule):
    torch.manual_seed(0)
    times = schedule.random_times(20_000, "cpu")
    assert times.dtype == torch.float32
    assert (times >= T_MIN).all()
    assert (times <= 1).all()
    torch.testing.assert_close(times.sort().values, torch.linspace(0, 1, 20_000), rtol=0, atol=0.02)


@every_schedule
def test_a_time_for_the_network_is_float32(schedule):
    for t in (schedule.level(1).t, schedule.level(0).t, schedule.nearest_time(0.5)):
        assert type(t) is float
        assert schedule.as_tensor(t, 2, "cpu").dtype == torch.float32


@every_schedule
@pytest.mark.parametrize("t", [-0.1, T_MIN / 2, 1.01, 500, math.nan])
def test_times_outside_the_schedule_are_refused(schedule, t):
    message = rf"{type(schedule).__name__}: times must lie in \[1\.52588e-05, 1\], or be 0 for clean data, got {t:g}\."
    with pytest.raises(ValueError, match=message):
        schedule.level(t)
    with pytest.raises(ValueError, match=message):
        schedule.alpha_sigma(torch.tensor([[0.0, 0.5], [t, 1.0]]))


@every_schedule
def test_a_schedule_has_nothing_to_save_and_can_be_built_again(schedule):
    assert schedule.state_dict() == {}
    again = type(schedule)(**describe(schedule)["init_args"])
    assert [again.level(t) for t in even(5)] == [schedule.level(t) for t in even(5)]


# ---- each schedule


def test_log_snr_of_the_cosine_by_hand():
    schedule = CosineLogSNR(log_snr_min=-6.0, log_snr_max=4.0)
    first, last = math.atan(math.exp(-2)), math.atan(math.exp(3))
    for share in (0.0, 0.25, 0.5, 1.0):
        expected = -2 * math.log(math.tan(first + share * (last - first)))
        assert log_snr(schedule, T_MIN + share * (1 - T_MIN)) == pytest.approx(expected, abs=1e-12)
    assert log_snr(schedule, T_MIN) == pytest.approx(4)
    assert log_snr(schedule, 1.0) == pytest.approx(-6)
    assert [log_snr(CosineLogSNR(), t) for t in (T_MIN, 1.0)] == pytest.approx([15.0, -15.0])


def test_far_from_its_ends_the_cosine_is_a_cosine():
    assert CosineLogSNR(-40.0, 40.0).level(0.3)[1:] == pytest.approx(
        (math.cos(0.15 * math.pi), math.sin(0.15 * math.pi)), rel=1e-4
    )


def test_the_shift_of_the_cosine_is_added_to_its_log_snr():
    plain, shifted = CosineLogSNR(), CosineLogSNR(shift=2 * math.log(64 / 256))
    for t in even(9):
        assert log_snr(shifted, t) == pytest.approx(log_snr(plain, t) - 2.772588722, abs=1e-8)


def test_log_snr_of_the_line_by_hand():
    schedule = LinearLogSNR(log_snr_min=-4.0, log_snr_max=8.0)
    for share, expected in [(0.0, 8.0), (0.25, 5.0), (0.5, 2.0), (1.0, -4.0)]:
        assert log_snr(schedule, T_MIN + share * (1 - T_MIN)) == pytest.approx(expected, abs=1e-11)
    assert [log_snr(LinearLogSNR(), t) for t in (T_MIN, 1.0)] == pytest.approx([13.3, -5.0])


def test_rectified_flow_by_hand():
    assert RectifiedFlow().level(0.25) == (0.25, 0.75, 0.25)
    assert RectifiedFlow().level(1.0) == (1.0, 0.0, 1.0)
    # 3 * 0.25 / (1 + 2 * 0.25)
    assert RectifiedFlow(shift=3.0).level(0.25) == (0.25, 0.5, 0.5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_noise_is_added_along_the_flow_as_in_diffusers(shift):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    x0, eps = torch.randn(2, 3, 3, 2, 4, generator=torch.Generator().manual_seed(0))
    steps = torch.tensor([0, 400, 998])
    alpha, sigma = (v.reshape(3, 1, 1, 1) for v in RectifiedFlow(shift).alpha_sigma((1000 - steps) / 1000))
    expected = scheduler.scale_noise(x0, scheduler.timesteps[steps], eps)
    torch.testing.assert_close(alpha * x0 + sigma * eps, expected, rtol=1e-6, atol=1e-6)


def test_edm_schedule_by_hand():
    schedule = EDMSchedule(sigma_min=0.01, sigma_max=100.0)
    assert schedule.initial_scale == 100
    for share, expected in [(0.0, 0.01), (0.25, 0.1), (0.5, 1.0), (1.0, 100.0)]:
        assert schedule.level(T_MIN + share * (1 - T_MIN)).sigma == pytest.approx(expected, rel=1e-12)


def test_even_times_of_edm_are_the_exponential_sigmas_of_diffusers():
    from diffusers import EDMEulerScheduler

    scheduler = EDMEulerScheduler(sigma_schedule="exponential")
    scheduler.set_timesteps(12)
    schedule = EDMSchedule()
    sigmas = [schedule.level(t).sigma for t in [*schedule.even_times(12), schedule.clean]]
    torch.testing.assert_close(torch.tensor(sigmas), scheduler.sigmas, rtol=2e-6, atol=0)


# ---- refusals


@pytest.mark.parametrize("schedule_class", [CosineLogSNR, LinearLogSNR])
@pytest.mark.parametrize("ends", [(3.0, 3.0), (-math.inf, 3.0), (-3.0, math.inf), (math.nan, 3.0)])
def test_ends_that_do_not_fall_are_refused(schedule_class, ends):
    with pytest.raises(ValueError, match=f"{schedule_class.__name__}: log_snr_min must be below log_snr_max"):
        schedule_class(*ends)


def test_an_endless_shift_of_the_cosine_is_refused():
    with pytest.raises(ValueError, match="CosineLogSNR: shift must be finite, got inf"):
        CosineLogSNR(shift=math.inf)


@pytest.mark.parametrize("shift", [0.0, -1.0, math.inf, math.nan])
def test_a_shift_of_times_that_is_not_positive_is_refused(shift):
    with pytest.raises(ValueError, match="RectifiedFlow: shift must be positive and finite"):
        RectifiedFlow(shift=shift)


@pytest.mark.parametrize("sigmas", [{"sigma_min": 0.0}, {"sigma_min": 80.0}, {"sigma_max": math.inf}])
def test_sigmas_that_do_not_grow_are_refused(sigmas):
    with pytest.raises(ValueError, match="EDMSchedule: needs 0 < sigma_min < sigma_max < inf"):
        EDMSchedule(**sigmas)
