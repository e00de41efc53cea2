"""Schedulers of diffusers on flows, on EDM's schedule, and on continuous schedules that preserve the variance."""

import itertools

import diffusers
import pytest
import torch
from diffusers.schedulers import scheduling_edm_euler

from lit_generative.diffusion.continuous import CosineLogSNR, EDMSchedule, LinearLogSNR, RectifiedFlow
from lit_generative.diffusion.diffusers_sampler import DiffusersSampler
from lit_generative.diffusion.parameterizations import EDMPreconditioning, FlowVelocity
from lit_generative.diffusion.schedules import LinearSchedule
from lit_generative.diffusion.solvers import DPMSolver2M, EulerSampler, HeunSampler
from lit_generative.diffusion.spacings import Karras
from lit_generative.loading import load_module
from lit_generative.recipe import describe
from lit_generative.tensor_ops import sample_generators
from tests.diffusion.exact import (
    MEAN,
    STD,
    Given,
    assert_samples_depend_on_their_generators_alone,
    exact_denoiser,
    walk,
)
from tests.tiny import point_ddpm, trainer

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
CASES = {
    "FlowMatchEuler": ("FlowMatchEulerDiscreteScheduler", {}, RectifiedFlow()),
    "FlowMatchEuler, shifted": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, RectifiedFlow(3.0)),
    "FlowMatchEuler, stochastic": ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, RectifiedFlow()),
    "FlowMatchHeun": ("FlowMatchHeunDiscreteScheduler", {}, RectifiedFlow()),
    "FlowMatchLCM": ("FlowMatchLCMScheduler", {}, RectifiedFlow()),
    "flow DEIS": ("DEISMultistepScheduler", FLOW, RectifiedFlow()),
    "flow DPM-Solver": ("DPMSolverMultistepScheduler", FLOW, RectifiedFlow()),
    "flow DPM-Solver, single": ("DPMSolverSinglestepScheduler", FLOW, RectifiedFlow()),
    "flow SA-Solver": ("SASolverScheduler", FLOW, RectifiedFlow()),
    "flow UniPC": ("UniPCMultistepScheduler", FLOW | {"flow_shift": 3.0}, RectifiedFlow()),
    "EDMEuler": ("EDMEulerScheduler", {}, EDMSchedule()),
    "EDMEuler, v": ("EDMEulerScheduler", {"prediction_type": "v_prediction", "sigma_data": 2.0}, EDMSchedule()),
    "EDM DPM-Solver": ("EDMDPMSolverMultistepScheduler", {"sigma_max": 70.0}, EDMSchedule()),
    "EDM DPM-Solver, SDE": ("EDMDPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, EDMSchedule()),
    "DDPM, continuous": ("DDPMScheduler", {}, CosineLogSNR()),
    "DDIM, continuous": ("DDIMScheduler", {"num_train_timesteps": 400}, LinearLogSNR(-10.0)),
    "DPM-Solver, continuous": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, LinearLogSNR(-10.0)),
}
STOCHASTIC = ["FlowMatchEuler, stochastic", "FlowMatchLCM", "flow SA-Solver", "EDM DPM-Solver, SDE", "DDPM, continuous"]
every_case = pytest.mark.parametrize("case", CASES)
pytestmark = pytest.mark.filterwarnings("ignore:__array", "ignore:divide by zero")  # inside diffusers, of numpy


def build(case: str, num_steps: int):
    name, settings, schedule = CASES[case]
    return DiffusersSampler(getattr(diffusers, name)(**settings), num_steps), schedule


# ---- what holds for all


@every_case
def test_samples_of_a_gaussian_have_its_mean_and_deviation(case):
    # A consistency model starts anew from its guess at each step, and the guess of these tests varies less than data.
    rtol = 0.45 if case in ("FlowMatchEuler, stochastic", "FlowMatchLCM") else 0.2
    sample, _ = walk(*build(case, 45), num=500)[-1]
    torch.testing.assert_close(sample.mean(), torch.tensor(MEAN), rtol=0, atol=0.03)
    torch.testing.assert_close(sample.std(), torch.tensor(STD), rtol=rtol, atol=0)


@every_case
def test_a_walk_yields_what_the_network_saw_at_noise_levels_that_fall(case):
    sampler, schedule = build(case, 12)
    levels, steps = sampler.levels(schedule), walk(sampler, schedule)
    assert len(steps) == len(levels) - 1 >= 12
    assert all(then.sigma / then.alpha <= now.sigma / max(now.alpha, 1e-9) for now, then in itertools.pairwise(levels))
    for level in levels[:-1]:
        near = schedule.level(level.t)
        assert (level.alpha, level.sigma) == pytest.approx((near.alpha, near.sigma), rel=1e-4, abs=1e-4)
    for (x_t, _), (_, x0), level in zip(steps[:-1], steps[1:], levels[1:-1], strict=True):
        torch.testing.assert_close(x0, exact_denoiser(schedule)(x_t, level).x0)


@every_case
def test_samples_do_not_depend_on_the_batch_they_are_drawn_in(case):
    assert_samples_depend_on_their_generators_alone(*build(case, 12))


@every_case
def test_noise_is_drawn_for_each_sample_or_not_at_all(case):
    sampler, schedule = build(case, 12)
    noise = iter([torch.tensor([[1.0], [2.0], [1.0]])])
    *_, (sample, _) = sampler.trajectory(exact_denoiser(schedule), torch.zeros(3, 1), lambda: next(noise))
    assert sample[0] == sample[2]
    assert ((sample[0] - sample[1]).abs() > 1e-3) == (case in STOCHASTIC)


@pytest.mark.parametrize(
    ("case", "parameterization"), [("flow UniPC", FlowVelocity()), ("EDMEuler, v", EDMPreconditioning())]
)
def test_a_checkpoint_builds_the_scheduler_again(case, parameterization, tmp_path):
    sampler, schedule = build(case, 4)
    module = point_ddpm(schedule=schedule, parameterization=parameterization, sampler=sampler)
    fit = trainer(tmp_path)
    fit.strategy.connect(module)
    fit.save_checkpoint(tmp_path / "model.ckpt")
    loaded = load_module(tmp_path / "model.ckpt")
    assert describe(loaded.sampler) == describe(sampler)
    samples = [m.sample(3, generator=sample_generators(1, 3)) for m in (module, loaded)]
    torch.testing.assert_close(*samples, rtol=0, atol=0)


def test_noise_whose_digits_a_scheduler_has_lost_is_no_other_noise():
    scheduler = diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True)
    sampler, schedule = DiffusersSampler(scheduler, 20), LinearLogSNR()  # alphas_cumprod of 1 - 2e-6, in float32
    least = schedule.level(schedule.t_min)
    assert sampler.levels(schedule)[-2].sigma == pytest.approx(least.sigma, rel=0.05)


def test_edms_scheduler_does_not_complain_of_inputs_that_it_did_not_scale(monkeypatch):
    def refuse(message):
        raise AssertionError(message)

    monkeypatch.setattr(scheduling_edm_euler.logger, "warning", refuse)
    walk(*build("EDMEuler", 3))


# ---- agreement with ours


def given(sampler: DiffusersSampler, schedule) -> Given:
    return Given([level.t for level in sampler.levels(schedule)[:-1]])


@pytest.mark.parametrize("case", ["FlowMatchEuler", "FlowMatchEuler, shifted"])
def test_eulers_method_on_a_flow_is_ours(case):
    sampler, schedule = build(case, 12)
    ours = walk(EulerSampler(12, spacing=given(sampler, schedule)), schedule)
    for pairs in zip(ours, walk(sampler, schedule), strict=True):
        for mine, other in zip(*pairs, strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=2e-5)


def test_heuns_method_on_a_flow_is_ours():
    sampler, schedule = build("FlowMatchHeun", 12)
    times = list(dict.fromkeys(given(sampler, schedule).given))
    ours = walk(HeunSampler(12, spacing=Given(times)), schedule)[-1][0]
    torch.testing.assert_close(walk(sampler, schedule)[-1][0], ours, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("case", "ours"),
    [
        ("EDMEuler", EulerSampler(12, spacing=Karras())),
        ("EDMEuler, v", EulerSampler(12, spacing=Karras())),
        ("EDM DPM-Solver", DPMSolver2M(12, lower_order_final=False, spacing=Karras())),
    ],
)
def test_a_walk_on_edms_schedule_is_ours(case, ours):
    name, settings, schedule = CASES[case]
    sampler = DiffusersSampler(getattr(diffusers, name)(**settings | {"sigma_max": 80.0}), 12)
    torch.testing.assert_close(walk(sampler, schedule)[-1][0], walk(ours, schedule)[-1][0], rtol=0, atol=2e-4)


def test_dpm_solver_on_a_continuous_schedule_is_ours():
    sampler, schedule = build("DPM-Solver, continuous", 20)
    ours = DPMSolver2M(20, lower_order_final=False, spacing=given(sampler, schedule))
    torch.testing.assert_close(walk(sampler, schedule)[-1][0], walk(ours, schedule)[-1][0], rtol=0, atol=1e-4)


# ---- what is refused


@pytest.mark.parametrize(
    ("name", "schedule", "told"),
    [
        ("DDIMScheduler", RectifiedFlow(), r"keeps the variance, .* and RectifiedFlow does not"),
        ("DDIMScheduler", EDMSchedule(), r"keeps the variance, .* and EDMSchedule does not"),
        (
            "FlowMatchEulerDiscreteScheduler",
            LinearSchedule(2, zero_terminal_snr=True),
            "straight line, .* and LinearSchedule is none",
        ),
        ("EDMEulerScheduler", CosineLogSNR(), "leaves the image as it is, .* and CosineLogSNR does not"),
        ("EDMEulerScheduler", LinearSchedule(1), "leaves the image as it is, .* and LinearSchedule does not"),
        (
            "EDMEulerScheduler",
            EDMSchedule(sigma_max=60.0),
            r"must lie in the schedule's 0\.002 to 60, got 0\.002 and 80",
        ),
        (
            "EDMEulerScheduler",
            EDMSchedule(sigma_min=0.01),
            r"must lie in the schedule's 0\.01 to 80, got 0\.002 and 80",
        ),
    ],
)
def test_a_schedule_of_another_kind_is_refused(name, schedule, told):
    with pytest.raises(ValueError, match=f"DiffusersSampler: {name}.* {told}"):
        DiffusersSampler(getattr(diffusers, name)(), 5).levels(schedule)


def test_a_flow_that_walks_to_noise_is_refused():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler walks from data to noise"):
        DiffusersSampler(scheduler, 5).levels(RectifiedFlow())


def test_a_scheduler_of_another_kind_is_refused():
    with pytest.raises(
        ValueError, match="CMStochasticIterativeScheduler takes no trained_betas, and is none for flows"
    ):
        DiffusersSampler(diffusers.CMStochasticIterativeScheduler())


@pytest.mark.parametrize(
    ("settings", "accepted"),
    [
        ({"prediction_type": "flow_prediction"}, "epsilon, sample, v_prediction, got 'flow_prediction'"),
        ({"use_flow_sigmas": True}, "flow_prediction, got 'epsilon'"),
    ],
)
def test_another_prediction_is_refused(settings, accepted):
    with pytest.raises(ValueError, match=f"DPMSolverMultistepScheduler's prediction_type must be one of {accepted}"):
        DiffusersSampler(diffusers.DPMSolverMultistepScheduler(**settings))
