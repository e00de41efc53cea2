import itertools
import subprocess
import sys

import diffusers
import jsonargparse
import pytest
import torch

from lit_generative.diffusion.diffusers_sampler import DiffusersSampler
from lit_generative.diffusion.guidance import ClassifierFree
from lit_generative.diffusion.objectives import Hybrid
from lit_generative.diffusion.samplers import DDIMSampler, DDPMSampler, Sampler
from lit_generative.diffusion.schedules import CosineSchedule, LinearSchedule
from lit_generative.diffusion.solvers import DPMSolver2M
from lit_generative.diffusion.spacings import Leading
from lit_generative.loading import load_module
from lit_generative.networks.diffusers_unet import DiffusersUNet
from lit_generative.recipe import describe
from lit_generative.tensor_ops import generators_of, randn, sample_generators
from tests.diffusion.exact import (
    MEAN,
    STD,
    Given,
    assert_samples_depend_on_their_generators_alone,
    exact_denoiser,
    walk,
)
from tests.tiny import ddpm, point_ddpm, trainer

# Each scheduler that takes betas, and the prediction types it knows.
THREE = ("epsilon", "sample", "v_prediction")
SCHEDULERS = {
    "DDIMParallelScheduler": THREE,
    "DDIMScheduler": THREE,
    "DDPMParallelScheduler": THREE,
    "DDPMScheduler": THREE,
    "DEISMultistepScheduler": THREE,
    "DPMSolverMultistepScheduler": THREE,
    "DPMSolverSinglestepScheduler": THREE,
    "EulerAncestralDiscreteScheduler": ("epsilon", "v_prediction"),
    "EulerDiscreteScheduler": THREE,
    "HeunDiscreteScheduler": THREE,
    "KDPM2AncestralDiscreteScheduler": ("epsilon",),
    "LCMScheduler": THREE,
    "LMSDiscreteScheduler": THREE,
    "PNDMScheduler": ("epsilon", "v_prediction"),
    "SASolverScheduler": THREE,
    "TCDScheduler": THREE,
    "UniPCMultistepScheduler": THREE,
}
STOCHASTIC = ["DDPMScheduler", "EulerAncestralDiscreteScheduler", "LCMScheduler", "SASolverScheduler", "TCDScheduler"]
every_scheduler = pytest.mark.parametrize("name", SCHEDULERS)
pytestmark = pytest.mark.filterwarnings("ignore:__array", "ignore:divide by zero")  # inside diffusers, of numpy


def build(name: str, **settings):
    return getattr(diffusers, name)(**settings)


# ---- what holds for all


@every_scheduler
def test_samples_of_a_gaussian_have_its_mean_and_deviation(name):
    # A consistency model starts anew from its guess at each step, and the guess of these tests varies less than data.
    rtol = 0.45 if name == "LCMScheduler" else 0.2
    for prediction in SCHEDULERS[name]:
        sample, _ = walk(DiffusersSampler(build(name, prediction_type=prediction), 45), LinearSchedule(), num=500)[-1]
        torch.testing.assert_close(sample.mean(), torch.tensor(MEAN), rtol=0, atol=0.03)
        torch.testing.assert_close(sample.std(), torch.tensor(STD), rtol=rtol, atol=0)


@every_scheduler
def test_a_walk_yields_what_the_network_saw_at_noise_levels_that_fall(name):
    sampler, schedule = DiffusersSampler(build(name), 12), CosineSchedule(200)
    levels, steps = sampler.levels(schedule), walk(sampler, schedule)
    assert len(steps) == len(levels) - 1 >= 12
    assert all(then.sigma <= now.sigma for now, then in itertools.pairwise(levels))
    assert levels[-1] == schedule.level(-1)
    for (x_t, _), (_, x0), level in zip(steps[:-1], steps[1:], levels[1:-1], strict=True):
        torch.testing.assert_close(x0, exact_denoiser(schedule)(x_t, level).x0)


@every_scheduler
def test_samples_do_not_depend_on_the_batch_they_are_drawn_in(name):
    assert_samples_depend_on_their_generators_alone(DiffusersSampler(build(name), 12), LinearSchedule(200))


@pytest.mark.parametrize("name", STOCHASTIC)
def test_noise_differs_between_the_samples(name):
    sampler, schedule = DiffusersSampler(build(name), 12), LinearSchedule()
    noise = iter([torch.tensor([[1.0], [2.0], [1.0]])])
    *_, (sample, _) = sampler.trajectory(exact_denoiser(schedule), torch.zeros(3, 1), lambda: next(noise))
    assert sample[0] == sample[2]
    assert (sample[0] - sample[1]).abs() > 1e-3


@every_scheduler
def test_a_checkpoint_builds_the_scheduler_again(name, tmp_path):
    sampler = DiffusersSampler(build(name, beta_start=0.003), num_steps=4)
    module = point_ddpm(schedule=LinearSchedule(100), sampler=sampler)
    fit = trainer(tmp_path)
    fit.strategy.connect(module)
    fit.save_checkpoint(tmp_path / "model.ckpt")
    loaded = load_module(tmp_path / "model.ckpt")
    assert describe(loaded.sampler) == describe(sampler)
    assert loaded.sampler.config["beta_start"] == 0.003
    samples = [m.sample(3, generator=sample_generators(1, 3)) for m in (module, loaded)]
    torch.testing.assert_close(*samples, rtol=0, atol=0)


# ---- agreement with what the scheduler does elsewhere


@pytest.mark.parametrize("schedule", [LinearSchedule(200), CosineSchedule(200)], ids=["linear", "cosine"])
def test_ddim_is_ours(schedule):
    ours = DDIMSampler(10, spacing=Leading())
    theirs = DiffusersSampler(build("DDIMScheduler", prediction_type="sample"), 10)
    for pairs in zip(walk(ours, schedule), walk(theirs, schedule), strict=True):
        for mine, other in zip(*pairs, strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=2e-5)


def test_dpm_solver_is_ours():
    schedule, theirs = LinearSchedule(200), DiffusersSampler(build("DPMSolverMultistepScheduler"), 20)
    times = [level.t for level in theirs.levels(schedule)[:-1]]
    ours = DPMSolver2M(20, lower_order_final=False, spacing=Given(times))
    torch.testing.assert_close(walk(ours, schedule)[-1][0], walk(theirs, schedule)[-1][0], rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("EulerDiscreteScheduler", {}),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
        ("HeunDiscreteScheduler", {"timestep_spacing": "trailing"}),
        ("UniPCMultistepScheduler", {"use_karras_sigmas": True}),
        ("PNDMScheduler", {"skip_prk_steps": True}),
        ("DPMSolverMultistepScheduler", {"euler_at_final": True, "timestep_spacing": "leading"}),
    ],
)
def test_a_walk_is_that_of_a_pipeline(name, settings):
    # As diffusers' pipelines call a scheduler, with a network that knows the noise at any level.
    schedule, x_t = LinearSchedule(200), randn((3, 2), sample_generators(0, 3))
    scheduler = build(name, trained_betas=schedule.betas.tolist(), num_train_timesteps=200, **settings)
    scheduler.set_timesteps(12)
    sample = x_t * scheduler.init_noise_sigma
    sigmas = getattr(scheduler, "sigmas", (1 / schedule.alphas_cumprod - 1).sqrt()[scheduler.timesteps.long()])
    for t, ratio in zip(scheduler.timesteps, sigmas, strict=False):
        scaled = scheduler.scale_model_input(sample, t)
        alpha, sigma = (1 + ratio**2) ** -0.5, ratio * (1 + ratio**2) ** -0.5
        eps = sigma * (scaled - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
        sample = scheduler.step(eps.float(), t, sample).prev_sample

    class Between(torch.nn.Module):
        """Knows the image at the scheduler's own noise, though it is told the nearest step."""

        calls = iter(sigmas.tolist())

        def forward(self, x, t, y=None):
            alpha = (1 + (ratio := next(self.calls)) ** 2) ** -0.5
            return MEAN + STD**2 / (STD**2 + ratio**2) * (x / alpha - MEAN)

    denoise = exact_denoiser(schedule)
    denoise.network = Between()
    *_, (ours, _) = DiffusersSampler(build(name, **settings), 12).trajectory(denoise, x_t, lambda: x_t)
    torch.testing.assert_close(ours, sample, rtol=0, atol=2e-5)


def test_between_two_steps_the_network_is_asked_at_the_nearer_one():
    schedule, denoise = LinearSchedule(200), exact_denoiser(LinearSchedule(200))
    sampler = DiffusersSampler(build("EulerDiscreteScheduler"), 12)
    list(sampler.trajectory(denoise, torch.zeros(1, 1), lambda: torch.zeros(1, 1)))
    assert denoise.network.times == [round(199 - i * 199 / 11) for i in range(12)]
    level, near = sampler.levels(schedule)[1], schedule.level(181)  # 180.9
    assert level.t == 181
    assert level.sigma / level.alpha == pytest.approx(near.sigma / near.alpha, rel=0.02)
    assert level.sigma / level.alpha < near.sigma / near.alpha
    assert level.alpha**2 + level.sigma**2 == pytest.approx(1)


def test_the_models_own_clipping_is_the_only_one():
    schedule, scheduler = LinearSchedule(50), build("DDPMScheduler")  # clips by default
    samples = []
    for clip in (False, True):
        noise = lambda: randn((300, 1), sample_generators(3, 300))  # noqa: E731
        denoise = exact_denoiser(schedule, clip)
        samples.append(list(DiffusersSampler(scheduler, 50).trajectory(denoise, noise(), noise))[-1][0])
    assert samples[0].max() > 1.2
    assert samples[1].max() <= 1 + 1e-4


# ---- in a model


def test_a_learned_variance_goes_to_the_scheduler():
    network = DiffusersUNet(8, 1, widths=(8,), layers_per_block=1, attention_levels=(), learned_variance=True)
    torch.manual_seed(0)
    for p in network.parameters():  # the last layer starts at zero
        torch.nn.init.normal_(p, std=0.2)
    scheduler = build("DDPMScheduler", variance_type="learned_range", prediction_type="sample")
    sampler, schedule = DiffusersSampler(scheduler, 2), LinearSchedule(2, 0.3, 0.5)
    module = ddpm(network=network, sampler=sampler, schedule=schedule, objective=Hybrid())
    x_t = randn((2, 1, 8, 8), sample_generators(0, 2))
    with torch.no_grad():
        (after, _), _ = sampler.trajectory(module.denoiser(), x_t, lambda: x_t)
        guess, (now, then, _) = module.denoiser()(x_t, schedule.level(1)), sampler.levels(schedule)
    assert guess.variance.std() > 0.1
    drawn = torch.cat([torch.randn((1, 1, 8, 8), generator=g) for g in generators_of(x_t, "scheduler")])
    torch.testing.assert_close(after, DDPMSampler(2).step(guess, now, then, lambda: drawn), rtol=0, atol=1e-5)


def test_a_learned_variance_that_the_network_does_not_say_is_refused():
    sampler = DiffusersSampler(build("DDPMScheduler", variance_type="learned"), 5)
    with pytest.raises(ValueError, match="DDPMScheduler has variance_type=learned, and the network says nothing"):
        walk(sampler, LinearSchedule(20))


def test_guidance_reaches_the_network():
    module = point_ddpm(num_classes=2, label_dropout=0.1, sampler=DiffusersSampler(build("DDIMScheduler"), 3))
    plain = module.sample(4, torch.zeros(4, dtype=torch.int64), sample_generators(0, 4))
    module.sampler = DiffusersSampler(build("DDIMScheduler"), 3, ClassifierFree(5.0))
    guided = module.sample(4, torch.zeros(4, dtype=torch.int64), sample_generators(0, 4))
    assert not torch.allclose(plain, guided)


def test_a_config_builds_a_scheduler_by_its_class_path():
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--sampler", type=Sampler)
    scheduler = {"class_path": "diffusers.UniPCMultistepScheduler", "init_args": {"solver_order": 3}}
    arguments = {"scheduler": scheduler, "num_steps": 7}
    path = "lit_generative.diffusion.diffusers_sampler.DiffusersSampler"
    config = parser.parse_object({"sampler": {"class_path": path, "init_args": arguments}})
    sampler = parser.instantiate(config).sampler
    assert (sampler.scheduler_class, sampler.num_steps) == (diffusers.UniPCMultistepScheduler, 7)
    assert sampler.config["solver_order"] == 3


def test_the_module_imports_without_diffusers():
    code = "import sys, lit_generative.diffusion.diffusers_sampler; sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- what is refused


def test_more_steps_than_the_schedule_has_are_refused():
    with pytest.raises(ValueError, match="EulerDiscreteScheduler: num_steps=11 is more than the schedule's 10"):
        DiffusersSampler(build("EulerDiscreteScheduler"), 11).levels(LinearSchedule(10))


@pytest.mark.parametrize(
    ("name", "settings"),
    [("IPNDMScheduler", {}), ("DDIMScheduler", {"rescale_betas_zero_snr": True})],
)
def test_a_scheduler_with_betas_of_its_own_is_refused(name, settings):
    with pytest.raises(ValueError, match=f"{name} does not keep to the betas it is given"):
        DiffusersSampler(build(name, **settings), 5).levels(LinearSchedule())


def test_a_scheduler_that_walks_to_noise_is_refused():
    with pytest.raises(ValueError, match="DDIMInverseScheduler walks from data to noise"):
        DiffusersSampler(build("DDIMInverseScheduler"), 5).levels(LinearSchedule())


def test_a_scheduler_that_hides_its_noise_levels_is_refused():
    with pytest.raises(ValueError, match="KDPM2DiscreteScheduler does not say at which noise levels"):
        DiffusersSampler(build("KDPM2DiscreteScheduler"), 5).levels(LinearSchedule())


def test_pure_noise_takes_a_scheduler_that_does_not_divide_by_alpha():
    schedule = LinearSchedule(50, zero_terminal_snr=True)
    settings = {"timestep_spacing": "trailing"}
    for prediction in ("sample", "v_prediction"):
        sampler = DiffusersSampler(build("DDIMScheduler", prediction_type=prediction, **settings), 25)
        *_, (sample, _) = walk(sampler, schedule, num=1000)
        torch.testing.assert_close(sample.std(), torch.tensor(STD), rtol=0.2, atol=0)
    for scheduler in (build("DDIMScheduler", **settings), build("EulerDiscreteScheduler", prediction_type="sample")):
        with pytest.raises(ValueError, match="divides by alpha, which is 0"):
            DiffusersSampler(scheduler, 25).levels(schedule)
