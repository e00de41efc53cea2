import math

import pytest
import torch

from lit_generative.diffusion.continuous import ContinuousSchedule, CosineLogSNR, EDMSchedule, RectifiedFlow
from lit_generative.diffusion.parameterizations import (
    CleanImage,
    EDMPreconditioning,
    Epsilon,
    FlowVelocity,
    Parameterization,
    Velocity,
)
from lit_generative.diffusion.schedules import (
    CosineSchedule,
    DiscreteSchedule,
    LinearSchedule,
    NoiseSchedule,
    ScaledLinearSchedule,
)
from lit_generative.recipe import describe
from lit_generative.tensor_ops import expand_like


def leaves(base: type) -> list[type]:
    return [cls for cls in base.__subclasses__() if cls.__module__.startswith("lit_generative.")]


PARAMETERIZATIONS = [*(cls() for cls in leaves(Parameterization)), EDMPreconditioning(sigma_data=2.0)]
SCHEDULES = {
    **{cls.__name__: cls() for cls in leaves(DiscreteSchedule) + leaves(ContinuousSchedule)},
    **{f"{cls.__name__} zero": cls(zero_terminal_snr=True) for cls in leaves(DiscreteSchedule)},
    "RectifiedFlow shifted": RectifiedFlow(shift=3.0),
    "CosineLogSNR shifted": CosineLogSNR(shift=-2.8),
}
every_parameterization = pytest.mark.parametrize("parameterization", PARAMETERIZATIONS, ids=lambda p: type(p).__name__)
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
zero_terminal = pytest.mark.parametrize(
    "schedule", [LinearSchedule(zero_terminal_snr=True), RectifiedFlow(), RectifiedFlow(shift=3.0)]
)


def images() -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.randn(2, 5, 3, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64))


def factors(schedule: NoiseSchedule, parameterization: Parameterization) -> tuple[torch.Tensor, torch.Tensor]:
    """At 5 times from the noisiest to the least noisy, without one that the parameterization refuses: ``(5,)`` each."""
    levels = [schedule.level(t) for t in schedule.even_times(6)]
    if isinstance(parameterization, Epsilon) and levels[0].alpha == 0:
        levels = levels[1:]
    return tuple(torch.tensor([level[1:] for level in levels[:4] + levels[-1:]], dtype=torch.float64).T)


# ---- all of them


@every_schedule
@every_parameterization
def test_the_target_means_the_image_it_was_made_from_and_back(parameterization, schedule):
    x0, eps = images()
    alpha, sigma = (expand_like(value, x0) for value in factors(schedule, parameterization))
    x_t = alpha * x0 + sigma * eps
    target = parameterization.target(x0, eps, alpha, sigma)
    assert target.shape == x0.shape
    image = parameterization.to_x0(target, x_t, alpha, sigma)
    torch.testing.assert_close(image, x0, rtol=1e-9, atol=1e-9)
    # Nothing else means it, or the factor of the output would be 0.
    again = parameterization.target(image, (x_t - alpha * image) / sigma, alpha, sigma)
    torch.testing.assert_close(again, target, rtol=1e-6, atol=1e-6)


@every_schedule
@every_parameterization
def test_the_output_scale_is_the_derivative_of_the_image(parameterization, schedule):
    output, x_t = images()
    alpha, sigma = factors(schedule, parameterization)
    ends = [
        parameterization.to_x0(output + step, x_t, expand_like(alpha, x_t), expand_like(sigma, x_t))
        for step in (-0.5, 0.5)
    ]
    scale = parameterization.output_scale(alpha, sigma)
    assert scale.shape == alpha.shape
    torch.testing.assert_close((ends[1] - ends[0]).abs(), expand_like(scale, x_t).expand_as(x_t), rtol=1e-6, atol=1e-12)


@every_schedule
@every_parameterization
def test_everything_is_finite_in_float32(parameterization, schedule):
    x0, eps = (value.float() for value in images())
    factors_of_each = (value.float() for value in factors(schedule, parameterization))
    alpha, sigma = (expand_like(value, x0) for value in factors_of_each)
    x_t = alpha * x0 + sigma * eps
    results = {
        "target": parameterization.target(x0, eps, alpha, sigma),
        "image": parameterization.to_x0(eps, x_t, alpha, sigma),
        "scale": parameterization.output_scale(alpha, sigma),
        "input": parameterization.scale_input(x_t, alpha, sigma),
    }
    assert [name for name, value in results.items() if not value.isfinite().all()] == []


@every_parameterization
def test_the_network_sees_the_noisy_batch_itself_unless_it_is_preconditioned(parameterization):
    x_t, _ = images()
    seen = parameterization.scale_input(x_t, torch.tensor(0.8), torch.tensor(0.6))
    assert (seen is x_t) != isinstance(parameterization, EDMPreconditioning)


@zero_terminal
def test_noise_is_no_target_where_nothing_is_left_of_the_image(schedule):
    message = f"Epsilon: this {type(schedule).__name__} leaves nothing of the image at its noisiest time"
    with pytest.raises(ValueError, match=message):
        Epsilon().check(schedule)


@every_schedule
@every_parameterization
def test_every_other_pair_is_taken(parameterization, schedule):
    if schedule.level(schedule.even_times(1)[0]).alpha > 0 or not isinstance(parameterization, Epsilon):
        parameterization.check(schedule)


# ---- each of them


def test_epsilon_by_hand():
    x0, eps, alpha, sigma = (torch.tensor([value]) for value in (2.0, -1.0, 0.8, 0.6))
    torch.testing.assert_close(Epsilon().target(x0, eps, alpha, sigma), eps)
    # x_t = 0.8 * 2 - 0.6 * 1 = 1; a guessed noise of 0.5 leaves (1 - 0.6 * 0.5) / 0.8
    torch.testing.assert_close(Epsilon().to_x0(torch.tensor([0.5]), torch.tensor([1.0]), alpha, sigma), x0 * 0.4375)


def test_velocity_by_hand():
    x0, eps, alpha, sigma = (torch.tensor([value]) for value in (2.0, -1.0, 0.8, 0.6))
    torch.testing.assert_close(Velocity().target(x0, eps, alpha, sigma), torch.tensor([0.8 * -1 - 0.6 * 2]))
    guess = Velocity().to_x0(torch.tensor([0.5]), torch.tensor([1.0]), alpha, sigma)
    torch.testing.assert_close(guess, torch.tensor([0.8 * 1 - 0.6 * 0.5]))


@pytest.mark.parametrize(
    ("schedule", "name", "betas"),
    [
        (LinearSchedule, "linear", {}),
        (ScaledLinearSchedule, "scaled_linear", {"beta_start": 0.00085, "beta_end": 0.012}),
        (CosineSchedule, "squaredcos_cap_v2", {}),
    ],
)
@pytest.mark.parametrize("zero", [False, True])
def test_velocity_agrees_with_diffusers(schedule, name, betas, zero):
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(beta_schedule=name, rescale_betas_zero_snr=zero, **betas)
    own = schedule(zero_terminal_snr=zero)
    scheduler.alphas_cumprod = own.alphas_cumprod  # diffusers keeps float32, whose sigma is 1e-5 off near t = 0
    (x0, eps), t = images(), torch.tensor([0, 10, 200, 700, 999])
    alpha, sigma = (expand_like(value, x0) for value in own.alpha_sigma(t))
    expected = scheduler.get_velocity(x0, eps, t)
    torch.testing.assert_close(Velocity().target(x0, eps, alpha, sigma), expected, rtol=1e-6, atol=1e-6)


def test_clean_image_by_hand():
    x0, eps, alpha, sigma = (torch.tensor([value]) for value in (2.0, -1.0, 0.8, 0.6))
    assert CleanImage().target(x0, eps, alpha, sigma) is x0
    assert CleanImage().to_x0(x0, eps, alpha, sigma) is x0
    assert CleanImage().output_scale(alpha, sigma) == 1


def test_flow_velocity_by_hand():
    x0, eps, alpha, sigma = (torch.tensor([value]) for value in (2.0, -1.0, 0.7, 0.3))
    torch.testing.assert_close(FlowVelocity().target(x0, eps, alpha, sigma), torch.tensor([-3.0]))
    guess = FlowVelocity().to_x0(torch.tensor([0.5]), torch.tensor([1.1]), alpha, sigma)
    torch.testing.assert_close(guess, torch.tensor([1.1 - 0.3 * 0.5]))
    # Under factors that do not add up to 1 the line is stretched.
    guess = FlowVelocity().to_x0(torch.tensor([0.5]), torch.tensor([1.1]), alpha * 2, sigma)
    torch.testing.assert_close(guess, torch.tensor([0.95 / 1.7]))


def test_flow_velocity_is_the_derivative_of_the_rectified_flow():
    x0, eps = images()
    (_, alpha, sigma), (_, alpha_later, sigma_later) = (RectifiedFlow().level(t) for t in (0.25, 0.75))
    change = (alpha_later - alpha) * x0 + (sigma_later - sigma) * eps
    torch.testing.assert_close(FlowVelocity().target(x0, eps, torch.tensor(0.5), torch.tensor(0.5)), change / 0.5)


@pytest.mark.parametrize("sigma", [0.01, 0.5, 3.0, 70.0])
@pytest.mark.parametrize("alpha", [1.0, 0.25])
def test_edm_preconditioning_agrees_with_diffusers(sigma, alpha):
    from diffusers import EDMEulerScheduler

    scheduler, (x, output) = EDMEulerScheduler(sigma_data=0.7), images()  # with x = x0 + sigma * eps
    one, noise = torch.tensor(alpha, dtype=torch.float64), torch.tensor(alpha * sigma, dtype=torch.float64)
    edm = EDMPreconditioning(sigma_data=0.7)
    torch.testing.assert_close(edm.scale_input(alpha * x, one, noise), scheduler.precondition_inputs(x, sigma))
    expected = scheduler.precondition_outputs(x, output, sigma)
    torch.testing.assert_close(edm.to_x0(output, alpha * x, one, noise), expected)


def test_edm_preconditioning_by_hand():
    x0, eps, alpha, sigma = (torch.tensor([value]) for value in (2.0, -1.0, 1.0, 0.75))
    edm = EDMPreconditioning(sigma_data=1.0)
    # The standard deviation of x_t is 1.25; c_skip = 0.64, c_out = 0.6, c_in = 0.8; x_t = 1.25.
    torch.testing.assert_close(edm.scale_input(torch.tensor([1.25]), alpha, sigma), torch.tensor([1.0]))
    torch.testing.assert_close(edm.output_scale(alpha, sigma), torch.tensor([0.6]))
    torch.testing.assert_close(edm.target(x0, eps, alpha, sigma), torch.tensor([(2 - 0.64 * 1.25) / 0.6]))
    guess = edm.to_x0(torch.tensor([0.5]), torch.tensor([1.25]), alpha, sigma)
    torch.testing.assert_close(guess, torch.tensor([0.64 * 1.25 + 0.6 * 0.5]))


@every_schedule
@pytest.mark.parametrize("sigma_data", [0.5, 2.0])
def test_input_and_target_of_edm_have_unit_variance(sigma_data, schedule):
    edm = EDMPreconditioning(sigma_data)
    alpha, sigma = factors(schedule, edm)
    one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)
    # Both are linear in independent image and noise of variances sigma_data**2 and 1.
    of_input = [edm.scale_input(x_t, alpha, sigma) for x_t in (alpha, sigma)]
    of_target = [edm.target(one, zero, alpha, sigma), edm.target(zero, one, alpha, sigma)]
    for from_image, from_noise in (of_input, of_target):
        torch.testing.assert_close((sigma_data * from_image).square() + from_noise.square(), one)


def test_edm_with_unit_data_and_preserved_variance_predicts_the_negative_velocity():
    x0, eps = images()
    alpha, sigma = (expand_like(value, x0) for value in factors(CosineSchedule(), Velocity()))
    edm = EDMPreconditioning(sigma_data=1.0)
    torch.testing.assert_close(edm.target(x0, eps, alpha, sigma), -Velocity().target(x0, eps, alpha, sigma))


def test_the_target_of_edm_keeps_its_digits_where_there_is_little_noise():
    # As a difference of images, float32 would leave it 5 digits less: c_out is 0.0005 here.
    edm, (x0, eps) = EDMPreconditioning(), images()
    alpha, sigma = (torch.tensor(v, dtype=torch.float64) for v in EDMSchedule().level(2.0**-16)[1:])
    rounded = edm.target(x0.float(), eps.float(), alpha.float(), sigma.float())
    torch.testing.assert_close(rounded, edm.target(x0, eps, alpha, sigma).float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sigma_data", [0.0, -1.0, math.nan, math.inf])
def test_a_deviation_of_the_data_that_is_not_positive_is_refused(sigma_data):
    with pytest.raises(ValueError, match="EDMPreconditioning: sigma_data must be positive and finite, got"):
        EDMPreconditioning(sigma_data)


def test_a_recipe_holds_the_deviation_of_the_data():
    assert describe(EDMPreconditioning(0.7))["init_args"] == {"sigma_data": 0.7}
    assert describe(EDMPreconditioning())["init_args"] == {"sigma_data": 0.5}
