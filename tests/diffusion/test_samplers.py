import itertools

import jsonargparse
import pytest
import torch

from lit_generative.diffusion import solvers
from lit_generative.diffusion.continuous import CosineLogSNR, EDMSchedule, RectifiedFlow
from lit_generative.diffusion.denoiser import Guess
from lit_generative.diffusion.diffusers_sampler import DiffusersSampler
from lit_generative.diffusion.samplers import DDIMSampler, DDPMSampler, Sampler, at_first_level, step_up_variance
from lit_generative.diffusion.schedules import CosineSchedule, Level, LinearSchedule, NoiseSchedule
from lit_generative.diffusion.spacings import EvenLogSNR, Karras, Leading, Trailing
from lit_generative.diffusion.variances import BetaVariance, LearnedVariance, PosteriorVariance
from lit_generative.recipe import describe
from lit_generative.tensor_ops import randn, sample_generators
from tests.diffusion.exact import MEAN, STD, Given, exact_denoiser

# A scheduler of diffusers has no settings in common with ours: see test_diffusers_sampler.py.
SAMPLERS = [
    cls
    for cls in Sampler.__subclasses__()
    if cls.__module__.startswith("lit_generative.") and cls is not DiffusersSampler
]
every_sampler = pytest.mark.parametrize("sampler_class", SAMPLERS)
every_single_step = pytest.mark.parametrize("sampler_class", [cls for cls in SAMPLERS if cls.single_step])
every_schedule = pytest.mark.parametrize("schedule", [LinearSchedule(), CosineSchedule()], ids=["linear", "cosine"])
LEVELS = [
    *[(LinearSchedule(), *times) for times in [(999, 998), (999, 700), (400, 20), (1, 0)]],
    *[(CosineSchedule(), *times) for times in [(999, 998), (400, 20), (1, 0)]],
    (LinearSchedule(zero_terminal_snr=True), 999, 700),
    (RectifiedFlow(), 1.0, 0.9),
    (RectifiedFlow(shift=3.0), 0.5, 0.001),
    (EDMSchedule(), 0.9, 0.2),
    (CosineLogSNR(shift=1.0), 0.9, 0.2),
]
every_level = pytest.mark.parametrize(
    ("schedule", "t", "t_next"), LEVELS, ids=lambda v: type(v).__name__ if isinstance(v, NoiseSchedule) else None
)


def guesses() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(torch.randn(3, 5, 3, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64))


def walk(sampler: Sampler, schedule: NoiseSchedule, num: int = 1, clip: bool = False) -> list[tuple]:
    generator = torch.Generator().manual_seed(0)
    noise = lambda: torch.randn(num, 1, generator=generator)  # noqa: E731
    return list(sampler.trajectory(exact_denoiser(schedule, clip), schedule.initial_scale * noise(), noise))


# ---- times


@every_sampler
def test_a_sampler_visits_the_times_of_its_spacing_and_clean_data(sampler_class):
    for spacing, times in ((None, [100, 75, 50, 25, 0, -1]), (Trailing(), [100, 80, 60, 39, 19, -1])):
        sampler, schedule = sampler_class(num_steps=5, spacing=spacing), LinearSchedule(101)
        assert sampler.levels(schedule) == [schedule.level(t) for t in times]
        denoise = exact_denoiser(schedule)
        list(sampler.trajectory(denoise, torch.zeros(1, 1), lambda: torch.zeros(1, 1)))
        assert list(dict.fromkeys(denoise.network.times)) == times[:-1]


@every_sampler
def test_more_steps_than_levels_are_refused(sampler_class):
    match = f"{sampler_class.__name__}: num_steps=11 is more than the schedule's 10 noise levels"
    with pytest.raises(ValueError, match=match):
        sampler_class(num_steps=11).levels(LinearSchedule(10))


@every_sampler
def test_a_walk_without_steps_is_refused(sampler_class):
    with pytest.raises(ValueError, match=f"{sampler_class.__name__}: num_steps must be at least 1, got 0"):
        sampler_class(num_steps=0)


@pytest.mark.parametrize("eta", [-0.1, 1.1])
def test_an_eta_outside_the_unit_interval_is_refused(eta):
    with pytest.raises(ValueError, match=r"DDIMSampler: eta must lie in \[0, 1\]"):
        DDIMSampler(eta=eta)


# ---- one step


@every_level
@every_single_step
def test_a_step_keeps_the_marginal_of_the_next_time(sampler_class, schedule, t, t_next):
    # With the true x0, x_next must be N(alpha_next * x0, sigma_next**2); here as its two moments, by the step's
    # being linear: mean at eps = noise = 0, variance as the sum of the squared weights of eps and noise.
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    now, then = schedule.level(t), schedule.level(t_next)
    for sampler in (sampler_class(), *([DDIMSampler(eta=0.5)] if sampler_class is DDIMSampler else [])):
        mean = sampler.step(Guess(one, zero), now, then, lambda: zero)
        from_eps = sampler.step(Guess(zero, one), now, then, lambda: zero)
        from_noise = sampler.step(Guess(zero, zero), now, then, lambda: one)
        torch.testing.assert_close(mean, then.alpha * one)
        torch.testing.assert_close(from_eps.square() + from_noise.square(), then.sigma**2 * one)


@pytest.mark.parametrize("sampler_class", [cls for cls in SAMPLERS if not cls.single_step])
def test_what_is_more_than_single_steps_has_none(sampler_class):
    x0, eps, noise = guesses()
    with pytest.raises(TypeError, match=f"{sampler_class.__name__}: a step needs more than the guess at one level"):
        sampler_class().step(Guess(x0, eps), Level(2, 0.6, 0.8), Level(1, 0.8, 0.6), lambda: noise)


@every_level
def test_ddim_with_eta_one_is_ddpm(schedule, t, t_next):
    x0, eps, noise = guesses()
    now = schedule.level(t)
    for then in (schedule.level(t_next), schedule.level(schedule.clean)):
        steps = [s.step(Guess(x0, eps), now, then, lambda: noise) for s in (DDPMSampler(), DDIMSampler(eta=1.0))]
        torch.testing.assert_close(*steps)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_step_by_hand(eta):
    x0, eps, noise = guesses()
    # sigma_fresh = eta * sqrt((1 - .64) / (1 - .36)) * sqrt(1 - .36 / .64), Song et al. 2021, eq. 16
    fresh = eta * 0.6 / 0.8 * (1 - 0.5625) ** 0.5
    expected = 0.8 * x0 + (0.36 - fresh**2) ** 0.5 * eps + fresh * noise
    step = DDIMSampler(eta=eta).step(Guess(x0, eps), Level(2, 0.6, 0.8), Level(1, 0.8, 0.6), lambda: noise)
    torch.testing.assert_close(step, expected)


def test_ddpm_step_by_hand_where_the_variance_is_not_preserved():
    x0, eps, noise = guesses()
    # From 1 * x0 + 2 * eps to 1 * x0 + 1 * eps': beta = 3, weights 3 / 4 on x0 and 1 / 4 on x_t, beta tilde = 3 / 4.
    now, then = Level(2, 1.0, 2.0), Level(1, 1.0, 1.0)
    mean = 0.75 * x0 + 0.25 * (x0 + 2 * eps)
    for variance, number in ((None, 0.75), (PosteriorVariance(), 0.75), (BetaVariance(), 3.0)):
        step = DDPMSampler(variance=variance).step(Guess(x0, eps), now, then, lambda: noise)
        torch.testing.assert_close(step, mean + number**0.5 * noise)


def test_ddpm_takes_the_learned_variance_if_there_is_one_and_no_other_is_asked_for():
    x0, eps, noise = guesses()
    now, then = Level(2, 1.0, 2.0), Level(1, 1.0, 1.0)
    raw = torch.linspace(-1, 1, x0.numel(), dtype=torch.float64).reshape(x0.shape)
    guess, mean = Guess(x0, eps, raw), 0.75 * x0 + 0.25 * (x0 + 2 * eps)
    learned = 3.0 ** ((raw + 1) / 2) * 0.75 ** ((1 - raw) / 2)  # between 3 and 3 / 4
    for variance, expected in (
        (None, learned),
        (LearnedVariance(), learned),
        (PosteriorVariance(), torch.tensor(0.75)),
    ):
        step = DDPMSampler(variance=variance).step(guess, now, then, lambda: noise)
        torch.testing.assert_close(step, mean + expected.sqrt() * noise)


def test_a_learned_variance_needs_a_network_that_says_one():
    x0, eps, noise = guesses()
    sampler = DDPMSampler(variance=LearnedVariance())
    with pytest.raises(ValueError, match="LearnedVariance: the network must say something"):
        sampler.step(Guess(x0, eps), Level(2, 0.6, 0.8), Level(1, 0.8, 0.6), lambda: noise)


def refuse() -> torch.Tensor:
    raise AssertionError("noise was drawn")


def test_ddim_is_deterministic_by_default():
    x0, eps, _ = guesses()
    torch.testing.assert_close(
        DDIMSampler().step(Guess(x0, eps), Level(2, 0.6, 0.8), Level(1, 0.8, 0.6), refuse), 0.8 * x0 + 0.6 * eps
    )


@pytest.mark.parametrize(
    "sampler",
    [DDPMSampler(), DDPMSampler(variance=LearnedVariance()), DDIMSampler(eta=1.0)],
    ids=["DDPM", "DDPM learned", "DDIM eta 1"],
)
def test_the_last_step_draws_no_noise(sampler):
    x0, eps, _ = guesses()
    torch.testing.assert_close(sampler.step(Guess(x0, eps), Level(0, 0.6, 0.8), Level(-1, 1.0, 0.0), refuse), x0)


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
    now, then = schedule.level(t), schedule.level(int(scheduler.previous_timestep(t)))
    x_t = now.alpha * x0 + now.sigma * eps
    expected = scheduler.step(eps, t, x_t, generator=torch.Generator().manual_seed(3))
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    step = DDPMSampler().step(Guess(x0, eps), now, then, lambda: noise)
    torch.testing.assert_close(step, expected.prev_sample)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("num_steps", "t"), [(1000, 999), (1000, 1), (1000, 0), (50, 980), (50, 20), (50, 0)])
def test_a_ddim_step_agrees_with_diffusers(num_steps, t, eta):
    from diffusers import DDIMScheduler

    schedule, (x0, eps, noise) = LinearSchedule(), guesses()
    scheduler = exact_in_float64(DDIMScheduler(clip_sample=False), schedule)
    scheduler.set_timesteps(num_steps)
    now, then = schedule.level(t), schedule.level(max(t - 1000 // num_steps, -1))
    x_t = now.alpha * x0 + now.sigma * eps
    expected = scheduler.step(eps, t, x_t, eta=eta, variance_noise=noise if eta else None)
    step = DDIMSampler(eta=eta).step(Guess(x0, eps), now, then, lambda: noise)
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
    denoise = exact_denoiser(schedule)
    for (x_t, _), (_, x0), level in zip(steps[:-1], steps[1:], sampler.levels(schedule)[1:-1], strict=True):
        torch.testing.assert_close(x0, denoise(x_t, level).x0)


@pytest.mark.parametrize(
    "sampler",
    [
        *[cls(num_steps=5) for cls in SAMPLERS],
        DDIMSampler(num_steps=5, eta=0.5),
        DDPMSampler(num_steps=5, variance=BetaVariance()),
        solvers.HeunSampler(num_steps=5, s_churn=5.0),
    ],
    ids=lambda s: type(s).__name__,
)
def test_a_sample_does_not_depend_on_the_batch_it_is_drawn_in(sampler):
    schedule, shape = LinearSchedule(), (3, 2, 4)
    samples = []
    for chunk in ([0, 1, 2, 3, 4], [3], [0, 1]):
        generators = [sample_generators(7, 5)[i] for i in chunk]
        noise = lambda g=generators: randn((len(g), *shape), g)  # noqa: E731
        *_, (sample, _) = sampler.trajectory(exact_denoiser(schedule), noise(), noise)
        samples.append(sample)
    torch.testing.assert_close(torch.cat(samples[1:]), samples[0][[3, 0, 1]], rtol=0, atol=1e-6)
    assert samples[0].flatten(start_dim=1).diff(dim=0).abs().max(dim=1).values.min() > 0.1


@every_schedule
@pytest.mark.parametrize(("num_steps", "rtol"), [(50, 0.17), (500, 0.035)])
@pytest.mark.parametrize(
    "build",
    [
        DDIMSampler,
        lambda n: DDIMSampler(n, eta=1.0),
        DDPMSampler,
        solvers.EulerSampler,
        solvers.DPMSolver2M,
        solvers.HeunSampler,
        lambda n: solvers.HeunSampler(n, s_churn=n / 10),
    ],
    ids=["DDIM", "DDIM eta 1", "DDPM", "Euler", "2M", "Heun", "Heun churned"],
)
def test_samples_of_a_gaussian_have_its_mean_and_with_more_steps_its_deviation(build, num_steps, rtol, schedule):
    sample, _ = walk(build(num_steps), schedule, num=20_000)[-1]
    torch.testing.assert_close(sample.mean(), torch.tensor(MEAN), rtol=0, atol=0.01)
    torch.testing.assert_close(sample.std(), torch.tensor(STD), rtol=rtol, atol=0)


@every_sampler
def test_a_walk_may_start_at_pure_noise(sampler_class):
    for schedule in (RectifiedFlow(), LinearSchedule(zero_terminal_snr=True)):
        sample, _ = walk(sampler_class(num_steps=200, spacing=Trailing()), schedule, num=5000)[-1]
        torch.testing.assert_close(sample.mean(), torch.tensor(MEAN), rtol=0, atol=0.02)
        torch.testing.assert_close(sample.std(), torch.tensor(STD), rtol=0.12, atol=0)


@every_sampler
def test_a_walk_that_starts_below_the_noisiest_level_starts_with_less_noise(sampler_class):
    sampler = sampler_class(num_steps=100, spacing=Karras(sigma_max=20.0))
    sample, _ = walk(sampler, EDMSchedule(sigma_max=200.0), num=5000)[-1]
    torch.testing.assert_close(sample.std(), torch.tensor(STD), rtol=0.12, atol=0)


def test_noise_is_scaled_to_the_first_level_as_if_data_had_unit_variance():
    noise, schedule = torch.linspace(-2, 2, 12).reshape(3, 4), EDMSchedule()
    for first, scale in ((schedule.level(1.0), 1.0), (Level(0.5, 1.0, 3.0), 10**0.5 / (1 + 80**2) ** 0.5)):
        torch.testing.assert_close(at_first_level(noise, schedule, first), scale * noise)
    schedule = LinearSchedule()
    torch.testing.assert_close(at_first_level(noise, schedule, schedule.level(500)), noise, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["fixed_small", "fixed_large", "learned_range"])
@every_schedule
def test_a_ddpm_walk_agrees_with_diffusers(schedule, name):
    from diffusers import DDPMScheduler

    scheduler = exact_in_float64(DDPMScheduler(variance_type=name, prediction_type="sample"), schedule)
    scheduler.config.clip_sample = False
    scheduler.set_timesteps(20)
    variance = {"fixed_small": PosteriorVariance(), "fixed_large": BetaVariance(), "learned_range": LearnedVariance()}
    sampler = DDPMSampler(20, variance[name], Given(scheduler.timesteps.tolist()))
    x_t = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    raw = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3) if name == "learned_range" else None
    image, theirs, generator = exact_denoiser(schedule), x_t, torch.Generator().manual_seed(1)
    denoise = lambda x, level: image(x, level)._replace(variance=raw)  # noqa: E731
    denoise.schedule = schedule
    noise = lambda: torch.randn(4, 3, dtype=torch.float64, generator=generator)  # noqa: E731
    *_, (ours, _) = sampler.trajectory(denoise, x_t, noise)
    generator.manual_seed(1)
    for t in scheduler.timesteps:
        x0 = image(theirs, schedule.level(int(t))).x0
        output = x0 if raw is None else torch.cat([x0, raw], dim=1)
        theirs = scheduler.step(output, int(t), theirs, generator=generator).prev_sample
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 0.5])
@every_schedule
def test_a_ddim_walk_agrees_with_diffusers(schedule, eta):
    from diffusers import DDIMScheduler

    scheduler = exact_in_float64(DDIMScheduler(clip_sample=False, timestep_spacing="trailing"), schedule)
    scheduler.set_timesteps(20)
    x_t = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drawn = torch.randn(20, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    denoise, theirs, fresh = exact_denoiser(schedule), x_t, iter(drawn)
    *_, (ours, _) = DDIMSampler(20, eta, Trailing()).trajectory(denoise, x_t, lambda: next(fresh))
    for t, noise in zip(scheduler.timesteps.tolist(), drawn, strict=True):
        eps = denoise(theirs, schedule.level(t)).eps
        theirs = scheduler.step(eps, t, theirs, eta=eta, variance_noise=noise if eta else None).prev_sample
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "sampler",
    [
        DDPMSampler(5, variance=LearnedVariance(), spacing=Karras(5.0, 0.1, 10.0)),
        DDIMSampler(5, eta=0.5, spacing=Trailing()),
        solvers.EulerSampler(3),
        solvers.HeunSampler(3, s_churn=1.0, s_noise=1.1, spacing=EvenLogSNR(sigma_max=80.0)),
        solvers.DPMSolver2M(3, lower_order_final=False, spacing=Leading(1)),
    ],
    ids=lambda s: type(s).__name__,
)
def test_a_sampler_can_be_written_down_and_built_again(sampler):
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--sampler", type=Sampler)
    again = parser.instantiate(parser.parse_object({"sampler": describe(sampler)})).sampler
    assert type(again) is type(sampler)
    assert describe(again) == describe(sampler)
    assert again.levels(LinearSchedule()) == sampler.levels(LinearSchedule())


def test_the_variance_of_a_step_up_is_never_negative():
    assert step_up_variance(Level(2, 0.6, 0.8), Level(1, 0.8, 0.6)) == pytest.approx(0.4375)
    assert step_up_variance(Level(1, 0.8, 0.6), Level(2, 0.6, 0.8)) == 0


def test_levels_are_neighbours_of_one_walk():
    levels = DDIMSampler(5).levels(EDMSchedule())
    assert all(then.sigma < now.sigma for now, then in itertools.pairwise(levels))
    assert levels[-1] == (0.0, 1.0, 0.0)
