import pytest
import torch

from lit_generative.diffusion.denoiser import Denoiser
from lit_generative.diffusion.parameterizations import Epsilon
from lit_generative.diffusion.samplers import DDIMSampler, DDPMSampler, Sampler
from lit_generative.diffusion.schedules import CosineSchedule, LinearSchedule, NoiseSchedule

SAMPLERS = [cls for cls in Sampler.__subclasses__() if cls.__module__.startswith("lit_generative.")]
every_sampler = pytest.mark.parametrize("sampler_class", SAMPLERS)
every_schedule = pytest.mark.parametrize("schedule", [LinearSchedule(), CosineSchedule()], ids=["linear", "cosine"])


class GaussianDenoiser(torch.nn.Module):
    """The best guess of the noise when the data is ``N(m, s**2)`` in every pixel."""

    m, s = 0.7, 0.3

    def __init__(self, schedule: NoiseSchedule) -> None:
        super().__init__()
        self.schedule = schedule

    def forward(self, x_t, t, y=None):
        alpha, sigma = (value[:, None] for value in self.schedule.alpha_sigma(t))
        return sigma * (x_t - alpha * self.m) / (alpha**2 * self.s**2 + sigma**2)


def guesses() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(torch.randn(3, 5, 3, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64))


def walk(sampler: Sampler, schedule: NoiseSchedule, num: int = 1, clip: bool = False) -> list[tuple]:
    generator = torch.Generator().manual_seed(0)
    denoise = Denoiser(GaussianDenoiser(schedule), schedule, Epsilon(), clip=clip)
    noise = lambda: torch.randn(num, 1, generator=generator)  # noqa: E731
    return list(sampler.trajectory(denoise, noise(), noise))


# ---- times


@every_sampler
def test_times_fall_from_the_noisiest_to_clean_data(sampler_class):
    for num_timesteps in (1, 2, 7, 40, 1000):
        for num_steps in range(1, num_timesteps + 1):
            times = torch.tensor(sampler_class(num_steps=num_steps).times(num_timesteps))
            assert len(times) == num_steps + 1
            assert times[0] == num_timesteps - 1
            assert times[-1] == -1
            assert (times.diff() < 0).all()


@every_sampler
def test_times_are_evenly_spaced(sampler_class):
    assert sampler_class(num_steps=5).times(101) == [100, 75, 50, 25, 0, -1]
    assert sampler_class(num_steps=4).times(4) == [3, 2, 1, 0, -1]
    assert sampler_class(num_steps=4).times(8) == [7, 5, 2, 0, -1]  # 7, 4.67, 2.33, 0


@every_sampler
def test_times_do_not_depend_on_the_default_dtype(sampler_class):
    torch.set_default_dtype(torch.bfloat16)  # as Lightning does around a step with precision "bf16-true"
    try:
        assert sampler_class(num_steps=5).times(1000) == [999, 749, 500, 250, 0, -1]
    finally:
        torch.set_default_dtype(torch.float32)


@every_sampler
def test_more_steps_than_levels_are_refused(sampler_class):
    with pytest.raises(ValueError, match="num_steps=11 is more than the schedule's 10 noise levels"):
        sampler_class(num_steps=11).times(10)


@every_sampler
def test_a_walk_without_steps_is_refused(sampler_class):
    with pytest.raises(ValueError, match=f"{sampler_class.__name__}: num_steps must be at least 1, got 0"):
        sampler_class(num_steps=0)


@pytest.mark.parametrize("eta", [-0.1, 1.1])
def test_an_eta_outside_the_unit_interval_is_refused(eta):
    with pytest.raises(ValueError, match=r"DDIMSampler: eta must lie in \[0, 1\]"):
        DDIMSampler(eta=eta)


# ---- one step


@every_schedule
@every_sampler
@pytest.mark.parametrize(("t", "t_next"), [(999, 998), (999, 700), (400, 20), (1, 0)])
def test_a_step_keeps_the_marginal_of_the_next_time(sampler_class, schedule, t, t_next):
    # With the true x0, x_next must be N(alpha_next * x0, sigma_next**2); here as its two moments, by the step's
    # being linear: mean at eps = noise = 0, variance as the sum of the squared weights of eps and noise.
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    current, following = schedule.exact_alpha_sigma(t), schedule.exact_alpha_sigma(t_next)
    sampler = sampler_class()
    mean = sampler.step(one, zero, current, following, lambda: zero)
    from_eps = sampler.step(zero, one, current, following, lambda: zero)
    from_noise = sampler.step(zero, zero, current, following, lambda: one)
    torch.testing.assert_close(mean, following[0] * one)
    torch.testing.assert_close(from_eps.square() + from_noise.square(), following[1] ** 2 * one)


@every_schedule
@pytest.mark.parametrize(("t", "t_next"), [(999, 998), (999, 0), (400, 20), (1, 0), (300, -1), (0, -1)])
def test_ddim_with_eta_one_is_ddpm(schedule, t, t_next):
    x0, eps, noise = guesses()
    current, following = schedule.exact_alpha_sigma(t), schedule.exact_alpha_sigma(t_next)
    steps = [s.step(x0, eps, current, following, lambda: noise) for s in (DDPMSampler(), DDIMSampler(eta=1.0))]
    torch.testing.assert_close(*steps)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_step_by_hand(eta):
    x0, eps, noise = guesses()
    # sigma_fresh = eta * sqrt((1 - .64) / (1 - .36)) * sqrt(1 - .36 / .64), Song et al. 2021, eq. 16
    fresh = eta * 0.6 / 0.8 * (1 - 0.5625) ** 0.5
    expected = 0.8 * x0 + (0.36 - fresh**2) ** 0.5 * eps + fresh * noise
    step = DDIMSampler(eta=eta).step(x0, eps, (0.6, 0.8), (0.8, 0.6), lambda: noise)
    torch.testing.assert_close(step, expected)


def refuse() -> torch.Tensor:
    raise AssertionError("noise was drawn")


def test_ddim_is_deterministic_by_default():
    x0, eps, _ = guesses()
    torch.testing.assert_close(DDIMSampler().step(x0, eps, (0.6, 0.8), (0.8, 0.6), refuse), 0.8 * x0 + 0.6 * eps)


@pytest.mark.parametrize("sampler", [DDPMSampler(), DDIMSampler(eta=1.0)], ids=["DDPM", "DDIM eta 1"])
def test_the_last_step_draws_no_noise(sampler):
    x0, eps, _ = guesses()
    torch.testing.assert_close(sampler.step(x0, eps, (0.6, 0.8), (1.0, 0.0), refuse), x0)


def exact_in_float64(scheduler, schedule: NoiseSchedule):
    """diffusers keeps its schedule in float32, too coarse to compare single steps with."""
    scheduler.alphas_cumprod = schedule.alphas_cumprod
    return scheduler


@pytest.mark.parametrize("num_steps", [1000, 50])
@pytest.mark.parametrize("index", [0, 1, 25, -2, -1])
def test_a_ddpm_step_agrees_with_diffusers(num_steps, index):
    from diffusers import DDPMScheduler

    schedule, (x0, eps, _) = LinearSchedule(), guesses()
    scheduler = exact_in_float64(DDPMScheduler(clip_sample=False), schedule)
    scheduler.set_timesteps(num_steps)
    t = int(scheduler.timesteps[index])
    t_next = int(scheduler.previous_timestep(t))
    (alpha, sigma), following = schedule.exact_alpha_sigma(t), schedule.exact_alpha_sigma(t_next)
    expected = scheduler.step(eps, t, alpha * x0 + sigma * eps, generator=torch.Generator().manual_seed(3))
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    step = DDPMSampler().step(x0, eps, (alpha, sigma), following, lambda: noise)
    torch.testing.assert_close(step, expected.prev_sample)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("num_steps", "t"), [(1000, 999), (1000, 1), (1000, 0), (50, 980), (50, 20), (50, 0)])
def test_a_ddim_step_agrees_with_diffusers(num_steps, t, eta):
    from diffusers import DDIMScheduler

    schedule, (x0, eps, noise) = LinearSchedule(), guesses()
    scheduler = exact_in_float64(DDIMScheduler(clip_sample=False), schedule)
    scheduler.set_timesteps(num_steps)
    alpha, sigma = schedule.exact_alpha_sigma(t)
    following = schedule.exact_alpha_sigma(max(t - 1000 // num_steps, -1))
    expected = scheduler.step(eps, t, alpha * x0 + sigma * eps, eta=eta, variance_noise=noise if eta else None)
    step = DDIMSampler(eta=eta).step(x0, eps, (alpha, sigma), following, lambda: noise)
    torch.testing.assert_close(step, expected.prev_sample)


# ---- the whole walk


@every_schedule
@every_sampler
def test_the_walk_ends_at_the_last_guess_of_the_image(sampler_class, schedule):
    for clip in (True, False):
        sample, guess = walk(sampler_class(num_steps=5), schedule, num=50, clip=clip)[-1]
        torch.testing.assert_close(sample, guess)


@every_schedule
@every_sampler
def test_a_clipped_walk_ends_in_the_range_of_images(sampler_class, schedule):
    # Data around 0.7 with a standard deviation of 0.3: many guesses are clipped to 1.
    sample, _ = walk(sampler_class(num_steps=20), schedule, num=200, clip=True)[-1]
    assert sample.abs().max() <= 1


@every_sampler
def test_a_walk_yields_each_batch_and_the_guess_it_was_made_from(sampler_class):
    schedule, sampler = LinearSchedule(), sampler_class(num_steps=6)
    steps = walk(sampler, schedule, num=3)
    assert len(steps) == 6
    denoise = Denoiser(GaussianDenoiser(schedule), schedule, Epsilon(), clip=False)
    for (x_t, _), (_, x0), t in zip(steps[:-1], steps[1:], sampler.times(1000)[1:-1], strict=True):
        torch.testing.assert_close(x0, denoise(x_t, t)[0])


@every_schedule
@pytest.mark.parametrize(("num_steps", "rtol"), [(50, 0.17), (500, 0.035)])
@pytest.mark.parametrize("eta", [0.0, 1.0, None], ids=["DDIM", "DDIM eta 1", "DDPM"])
def test_samples_of_a_gaussian_have_its_mean_and_with_more_steps_its_deviation(eta, num_steps, rtol, schedule):
    sampler = DDPMSampler(num_steps) if eta is None else DDIMSampler(num_steps, eta)
    sample, _ = walk(sampler, schedule, num=20_000)[-1]
    torch.testing.assert_close(sample.mean(), torch.tensor(GaussianDenoiser.m), rtol=0, atol=0.01)
    torch.testing.assert_close(sample.std(), torch.tensor(GaussianDenoiser.s), rtol=rtol, atol=0)
