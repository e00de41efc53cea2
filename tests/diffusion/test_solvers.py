import itertools
import math

import pytest
import torch

from lit_generative.diffusion.continuous import CosineLogSNR, EDMSchedule, LinearLogSNR, RectifiedFlow
from lit_generative.diffusion.denoiser import Guess
from lit_generative.diffusion.samplers import DDIMSampler, Sampler, at_first_level
from lit_generative.diffusion.schedules import CosineSchedule, LinearSchedule, NoiseSchedule
from lit_generative.diffusion.solvers import DPMSolver2M, EulerSampler, HeunSampler
from lit_generative.diffusion.spacings import EvenLogSNR, Karras, Linspace, Trailing
from tests.diffusion.exact import Given, exact_denoiser, on_path

IN_RANGE = Karras(sigma_min=0.02, sigma_max=80.0)
SCHEDULES = {
    # Fine steps, so that walks of up to 129 steps are near the continuous one; as noisy as those of 1,000 steps.
    "linear": (LinearSchedule(16001, beta_start=1e-4 / 16, beta_end=0.02 / 16), IN_RANGE),
    "cosine": (CosineSchedule(16001), IN_RANGE),
    "cosine log SNR": (CosineLogSNR(), EvenLogSNR()),
    "linear log SNR": (LinearLogSNR(), Linspace()),
    "EDM": (EDMSchedule(), Karras()),
    "flow": (RectifiedFlow(), IN_RANGE),
    "shifted flow": (RectifiedFlow(shift=3.0), IN_RANGE),
}
START = torch.tensor([[1.0, -0.5]], dtype=torch.float64)


def refuse() -> torch.Tensor:
    raise AssertionError("noise was drawn")


def start(sampler: Sampler, schedule: NoiseSchedule) -> torch.Tensor:
    """Where a walk must be started that shall come to lie on the path of ``START`` at its first level."""
    first = sampler.levels(schedule)[0]
    return on_path(first, START) / at_first_level(torch.ones(1, 2, dtype=torch.float64), schedule, first)


def walk(sampler: Sampler, schedule: NoiseSchedule, noise=refuse) -> list[torch.Tensor]:
    return [x for x, _ in sampler.trajectory(exact_denoiser(schedule), start(sampler, schedule), noise)]


def error(sampler: Sampler, schedule: NoiseSchedule) -> float:
    """Distance from the ODE's own path before the last step, which no number of steps makes smaller."""
    return (walk(sampler, schedule)[-2] - on_path(sampler.levels(schedule)[-2], START)).abs().max().item()


# ---- what holds for all


@pytest.mark.parametrize("case", SCHEDULES)
@pytest.mark.parametrize(
    ("build", "order"),
    [
        (lambda n, spacing: DDIMSampler(n, spacing=spacing), 1),
        (lambda n, spacing: EulerSampler(n, spacing=spacing), 1),
        (lambda n, spacing: HeunSampler(n, spacing=spacing), 2),
        (lambda n, spacing: DPMSolver2M(n, lower_order_final=False, spacing=spacing), 2),
        (lambda n, spacing: DPMSolver2M(n, spacing=spacing), 2),
    ],
    ids=["DDIM", "Euler", "Heun", "2M", "2M, lower order"],
)
def test_errors_fall_with_the_order_of_the_solver(build, order, case):
    schedule, spacing = SCHEDULES[case]
    errors = [error(build(n, spacing), schedule) for n in (33, 65, 129)]
    assert math.log2(errors[0] / errors[2]) / 2 == pytest.approx(order, abs=0.1)
    assert errors[2] < 0.01 / 20 ** (order - 1)


@pytest.mark.parametrize("schedule", [RectifiedFlow(), CosineLogSNR(), LinearSchedule(16001, 1e-4 / 16, 0.02 / 16)])
def test_heuns_errors_fall_as_fast_on_even_times(schedule):
    errors = [error(HeunSampler(n), schedule) for n in (33, 65, 129)]
    assert math.log2(errors[0] / errors[2]) / 2 == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("sampler_class", [EulerSampler, HeunSampler, DPMSolver2M])
@pytest.mark.parametrize("schedule", [RectifiedFlow(), LinearSchedule(zero_terminal_snr=True)], ids=["flow", "linear"])
def test_a_solver_starts_at_pure_noise(sampler_class, schedule):
    sampler = sampler_class(200, spacing=Trailing())
    assert sampler.levels(schedule)[0].alpha == 0
    expected = on_path(schedule.level(schedule.clean), START)
    torch.testing.assert_close(walk(sampler, schedule)[-1], expected, rtol=0, atol=0.01)


@pytest.mark.parametrize("sampler", [EulerSampler(7), HeunSampler(7), DPMSolver2M(7)], ids=lambda s: type(s).__name__)
def test_solvers_draw_no_noise_unless_told_to(sampler):
    assert len(walk(sampler, EDMSchedule(), refuse)) == 7


@pytest.mark.parametrize(("sampler", "calls"), [(EulerSampler(7), 7), (HeunSampler(7), 13), (DPMSolver2M(7), 7)])
def test_the_network_is_called_as_often_as_said(sampler, calls):
    denoise = exact_denoiser(EDMSchedule())
    list(sampler.trajectory(denoise, torch.zeros(1, 2), refuse))
    assert len(denoise.network.times) == calls


@pytest.mark.parametrize("sampler", [EulerSampler(7), HeunSampler(7), DPMSolver2M(7)], ids=lambda s: type(s).__name__)
def test_a_walk_also_gives_the_guess_at_each_step(sampler):
    schedule = EDMSchedule()
    denoise = exact_denoiser(schedule)
    here = at_first_level(start(sampler, schedule), schedule, sampler.levels(schedule)[0])
    for level, (x_t, x0) in zip(
        sampler.levels(schedule), sampler.trajectory(denoise, start(sampler, schedule), refuse), strict=False
    ):
        torch.testing.assert_close(x0, denoise(here, level).x0)
        here = x_t


# ---- Euler


@pytest.mark.parametrize("case", SCHEDULES)
def test_eulers_method_is_ddim_without_noise(case):
    schedule, spacing = SCHEDULES[case]
    torch.testing.assert_close(*(walk(cls(9, spacing=spacing), schedule) for cls in (EulerSampler, DDIMSampler)))


def test_eulers_step_of_a_flow_goes_along_its_velocity():
    x0, eps = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    schedule = RectifiedFlow()
    for t, t_next in [(1.0, 0.7), (0.7, 0.25), (0.25, 0.0)]:
        x_t = (1 - t) * x0 + t * eps
        step = EulerSampler().step(Guess(x0, eps), schedule.level(t), schedule.level(t_next), refuse)
        torch.testing.assert_close(step, x_t + (t_next - t) * (eps - x0))


# ---- Heun


def algorithm_2(sigmas: list[float], s_churn=0.0, s_min=0.0, s_max=math.inf, s_noise=1.0, noise=None) -> torch.Tensor:
    """Karras et al. 2022, line by line, on the data of these tests; sigmas end at 0."""
    schedule = EDMSchedule()
    image = exact_denoiser(schedule).network
    denoise = lambda x, s: image(x, torch.full((1,), schedule.nearest_time(s), dtype=torch.float64))  # noqa: E731
    x = on_path(schedule.level(1.0), START)
    for sigma, sigma_next in itertools.pairwise(sigmas):
        gamma = min(s_churn / (len(sigmas) - 1), 2**0.5 - 1) if s_min <= sigma <= s_max else 0.0
        sigma_hat = sigma + gamma * sigma
        x_hat = x + (sigma_hat**2 - sigma**2) ** 0.5 * s_noise * next(noise) if gamma > 0 else x
        slope = (x_hat - denoise(x_hat, sigma_hat)) / sigma_hat
        x = x_hat + (sigma_next - sigma_hat) * slope
        if sigma_next != 0:
            slope_next = (x - denoise(x, sigma_next)) / sigma_next
            x = x_hat + (sigma_next - sigma_hat) * (slope + slope_next) / 2
    return x


@pytest.mark.parametrize(
    "churn",
    [
        {},
        {"s_churn": 3.0, "s_max": 70.0},
        {"s_churn": 1e3, "s_max": 50.0},
        {"s_churn": 3.0, "s_min": 0.05, "s_max": 50.0, "s_noise": 1.5},
    ],
    ids=["deterministic", "churned", "churned at most by sqrt 2", "all settings"],
)
def test_heun_on_edms_schedule_is_the_papers_algorithm(churn):
    schedule, sampler = EDMSchedule(), HeunSampler(9, spacing=Karras(), **churn)
    drawn = torch.randn(9, 1, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise, theirs = iter(drawn), iter(drawn)
    expected = algorithm_2([level.sigma for level in sampler.levels(schedule)], **churn, noise=theirs)
    torch.testing.assert_close(walk(sampler, schedule, lambda: next(noise))[-1], expected, rtol=1e-6, atol=1e-6)
    assert len(list(noise)) == len(list(theirs))  # both drew as often


def test_heun_on_a_flow_is_heuns_method_in_t():
    schedule, sampler = RectifiedFlow(), HeunSampler(6, spacing=Trailing())
    image = exact_denoiser(schedule).network
    velocity = lambda x, t: (x - image(x, torch.tensor([t], dtype=torch.float64))) / t  # noqa: E731
    x, times = on_path(schedule.level(1.0), START), torch.linspace(1, 0, 7, dtype=torch.float64).tolist()
    for t, t_next in itertools.pairwise(times):
        u = velocity(x, t)
        ahead = x + (t_next - t) * u
        x = ahead if t_next == 0 else x + (t_next - t) * (u + velocity(ahead, t_next)) / 2
    torch.testing.assert_close(walk(sampler, schedule)[-1], x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("schedule", [LinearSchedule(), CosineLogSNR(), EDMSchedule()], ids=lambda s: type(s).__name__)
def test_churning_adds_noise_up_to_a_level_of_the_schedule(schedule):
    sampler = HeunSampler(20, s_churn=4.0)
    denoise, one = exact_denoiser(schedule), torch.ones(1, 2, dtype=torch.float64)
    now = schedule.level(schedule.even_times(9)[4])
    x_t, up = sampler._churn(torch.zeros_like(one), now, denoise.schedule, lambda: one)
    assert up == schedule.level(up.t)
    assert up.sigma / up.alpha == pytest.approx(1.2 * now.sigma / now.alpha, rel=0.02)
    # Noise of x_t and that which is added make up the level's.
    torch.testing.assert_close((up.alpha / now.alpha * now.sigma) ** 2 + x_t.square(), up.sigma**2 * one)


def test_nothing_is_churned_where_no_level_is_nearer():
    schedule, few, noiseless = EDMSchedule(), LinearSchedule(5), LinearSchedule(10, 0.2, 0.9, zero_terminal_snr=True)
    assert noiseless.level(9).alpha == 0
    for sampler, where, now in [
        (HeunSampler(20), schedule, schedule.level(0.5)),
        (HeunSampler(20, s_churn=4.0, s_min=2.0), schedule, schedule.level(schedule.nearest_time(1.9))),
        (HeunSampler(20, s_churn=4.0, s_max=2.0), schedule, schedule.level(schedule.nearest_time(2.1))),
        (HeunSampler(20, s_churn=4.0), schedule, schedule.level(1.0)),
        (HeunSampler(20, s_churn=0.2), few, few.level(2)),
        (HeunSampler(20, s_churn=4.0), RectifiedFlow(), RectifiedFlow().level(1.0)),
        (HeunSampler(2, s_churn=4.0), noiseless, noiseless.level(8)),
    ]:
        x_t = torch.zeros(1, 2)
        assert sampler._churn(x_t, now, where, refuse) == (x_t, now)


@pytest.mark.parametrize(
    "settings",
    [
        {"s_churn": -1.0},
        {"s_churn": math.inf},
        {"s_min": -0.1},
        {"s_noise": -1.0},
        {"s_noise": math.inf},
        {"s_min": 2.0, "s_max": 1.0},
    ],
)
def test_heuns_settings_out_of_range_are_refused(settings):
    HeunSampler(s_min=2.0, s_max=2.0)
    with pytest.raises(ValueError, match="HeunSampler: s_churn and s_noise must be at least 0 and finite"):
        HeunSampler(**settings)


# ---- DPM-Solver++(2M)


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # inside diffusers, of numpy
@pytest.mark.parametrize("num_steps", [3, 10, 20])
@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
@pytest.mark.parametrize("schedule", [LinearSchedule(), CosineSchedule()], ids=["linear", "cosine"])
def test_a_walk_of_2m_agrees_with_diffusers(schedule, spacing, num_steps):
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(
        trained_betas=schedule.betas.tolist(), prediction_type="sample", timestep_spacing=spacing
    )
    scheduler.set_timesteps(num_steps)
    x_t = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    sampler = DPMSolver2M(num_steps, lower_order_final=False, spacing=Given(scheduler.timesteps.tolist()))
    denoise, theirs = exact_denoiser(schedule), x_t
    for t, (ours, _) in zip(scheduler.timesteps, sampler.trajectory(denoise, x_t, refuse), strict=True):
        theirs = scheduler.step(denoise(theirs, schedule.level(int(t))).x0, t, theirs).prev_sample
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_2m_by_hand():
    # sigma 8, 2, 1 with alpha 1: log(alpha / sigma) rises by log 4, then log 2: half of the last change is added.
    schedule = EDMSchedule(sigma_min=1.0, sigma_max=8.0)
    times = [1.0, schedule.nearest_time(2.0), schedule.nearest_time(1.0)]
    guesses = iter([torch.tensor([[v]], dtype=torch.float64) for v in (3.0, 5.0, 11.0)])
    denoise = lambda x, level: Guess(next(guesses), x)  # noqa: E731
    denoise.schedule = schedule
    x = torch.full((1, 1), 16.0, dtype=torch.float64)
    walked = DPMSolver2M(3, lower_order_final=False, spacing=Given(times)).trajectory(denoise, x, refuse)
    first = 2 / 8 * 16 + (1 - 2 / 8) * 3
    second = 1 / 2 * first + (1 - 1 / 2) * (5 + (5 - 3) / 4)
    assert [x_t.item() for x_t, _ in walked] == pytest.approx([first, second, 11.0])


def test_a_lower_order_at_the_end_is_nearer_where_the_last_level_has_hardly_any_noise():
    for schedule in (LinearSchedule(), CosineSchedule(), RectifiedFlow(), CosineLogSNR()):
        lower, as_ever = (error(DPMSolver2M(20, lower_order_final=flag), schedule) for flag in (True, False))
        assert lower < 0.6 * as_ever


def test_after_pure_noise_2m_takes_the_guess_as_it_is():
    schedule = RectifiedFlow()
    levels = DPMSolver2M(4, lower_order_final=False).levels(schedule)
    assert levels[0].alpha == 0
    walks = [
        [x for x, _ in sampler.trajectory(exact_denoiser(schedule), START, refuse)]
        for sampler in (DPMSolver2M(4, lower_order_final=False), EulerSampler(4))
    ]
    torch.testing.assert_close(walks[0][:2], walks[1][:2])
    assert (walks[0][2] - walks[1][2]).abs().max() > 1e-3
