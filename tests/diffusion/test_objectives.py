import math
from dataclasses import replace

import pytest
import torch

from lit_generative.diffusion.bounds import ContinuousGaussian, DiscretizedGaussian, vlb_term
from lit_generative.diffusion.continuous import CosineLogSNR
from lit_generative.diffusion.objectives import (
    DenoisingObjective,
    Hybrid,
    Prediction,
    Simple,
    VariationalBoundObjective,
)
from lit_generative.diffusion.parameterizations import Epsilon, Parameterization, Velocity
from lit_generative.diffusion.schedules import CosineSchedule, LinearSchedule, NoiseSchedule
from lit_generative.diffusion.times import LossSecondMoment
from lit_generative.diffusion.variances import training_variances
from lit_generative.diffusion.weightings import MinSNR
from lit_generative.networks.mlp import MLPDenoiser
from lit_generative.recipe import describe
from lit_generative.tensor_ops import from_uint8
from tests import tiny

OBJECTIVES = [cls for cls in DenoisingObjective.__subclasses__() if cls.__module__.startswith("lit_generative.")]
PARAMETERIZATIONS = [cls for cls in Parameterization.__subclasses__() if cls.__module__.startswith("lit_generative.")]
every_objective = pytest.mark.parametrize("objective", [cls() for cls in OBJECTIVES], ids=lambda o: type(o).__name__)
every_parameterization = pytest.mark.parametrize(
    "parameterization", [cls() for cls in PARAMETERIZATIONS], ids=lambda p: type(p).__name__
)
learning_the_variance = pytest.mark.parametrize(
    "objective", [cls() for cls in OBJECTIVES if cls.learns_variance], ids=lambda o: type(o).__name__
)


def predicted(
    schedule: NoiseSchedule | None = None,
    parameterization: Parameterization | None = None,
    t: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Prediction:
    """Five images of 8-bit pixels, and what an untrained network may say of them."""
    schedule, parameterization = schedule or CosineSchedule(20), parameterization or Epsilon()
    generator = torch.Generator().manual_seed(0)
    x0 = from_uint8(torch.randint(256, (5, 3, 2, 4), generator=generator)).to(dtype)
    eps, output, raw = torch.randn(3, 5, 3, 2, 4, generator=generator).to(dtype)
    t = torch.tensor([0, 1, 7, 12, 19]) if t is None else t
    alpha, sigma = (value.reshape(-1, 1, 1, 1).to(dtype) for value in schedule.alpha_sigma(t))
    x_t = alpha * x0 + sigma * eps
    output, raw = output.requires_grad_(), (0.5 * raw).requires_grad_()
    return Prediction(x0, eps, x_t, t, output, raw, schedule, parameterization)


def term(prediction: Prediction, decoder=None) -> torch.Tensor:
    """The bound's term at the times drawn, nats, with the learned variance written out."""
    log_beta, log_beta_tilde = (v.reshape(-1, 1, 1, 1) for v in training_variances(prediction.schedule, prediction.t))
    share = (prediction.variance + 1) / 2
    log_variance = share * log_beta + (1 - share) * log_beta_tilde
    alpha, sigma = (value.reshape(-1, 1, 1, 1) for value in prediction.schedule.alpha_sigma(prediction.t))
    x0_hat = prediction.parameterization.to_x0(prediction.output, prediction.x_t, alpha, sigma)
    decoder = decoder or DiscretizedGaussian()
    return vlb_term(prediction.x0, x0_hat, prediction.t, log_variance, prediction.schedule, decoder)


# ---- all of them


@every_objective
@every_parameterization
def test_a_loss_is_finite_one_for_each_example_and_has_finite_gradients(objective, parameterization):
    prediction = predicted(parameterization=parameterization, dtype=torch.float32)
    loss = objective.loss(prediction)
    assert loss.shape == (5,)
    assert loss.dtype == torch.float32
    loss.mean().backward()
    assert prediction.output.grad.isfinite().all()
    if objective.learns_variance:
        assert prediction.variance.grad.isfinite().all()
        assert (prediction.variance.grad != 0).any()
    for name, value in objective.terms(prediction).items():
        assert value.shape == (5,), name


@every_objective
@every_parameterization
def test_a_loss_is_finite_where_nothing_is_left_of_the_image(objective, parameterization):
    if isinstance(parameterization, Epsilon):
        return  # refuses such a schedule
    schedule = CosineSchedule(20, zero_terminal_snr=True)
    prediction = predicted(schedule, parameterization, torch.full((5,), 19), torch.float32)
    loss = objective.loss(prediction)
    assert loss.isfinite().all()
    loss.mean().backward()
    assert prediction.output.grad.isfinite().all()


@every_objective
def test_an_objective_is_written_down_with_its_parts(objective):
    assert describe(objective)["class_path"] == f"lit_generative.diffusion.objectives.{type(objective).__name__}"


def test_who_learns_the_variance_says_so():
    assert {cls.__name__: cls.learns_variance for cls in OBJECTIVES} == {
        "Simple": False,
        "Hybrid": True,
        "VariationalBoundObjective": True,
    }


# ---- the prediction


@every_parameterization
def test_a_prediction_knows_its_image_and_the_error_of_its_output(parameterization):
    prediction = predicted(parameterization=parameterization)
    alpha, sigma = (v.reshape(-1, 1, 1, 1) for v in prediction.schedule.alpha_sigma(prediction.t))
    target = parameterization.target(prediction.x0, prediction.eps, alpha, sigma)
    expected = (prediction.output - target).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(prediction.error, expected)
    scale = parameterization.output_scale(alpha, sigma)
    torch.testing.assert_close(
        (prediction.x0_hat - prediction.x0).abs(), (scale * (prediction.output - target)).abs(), rtol=1e-4, atol=1e-4
    )


def test_the_simple_loss_is_weighted():
    prediction = predicted(parameterization=Velocity())
    torch.testing.assert_close(Simple().loss(prediction), prediction.error)
    snr = prediction.schedule.alphas_cumprod[prediction.t]
    snr = snr / (1 - snr)
    expected = snr.clamp(max=2) / (snr + 1) * prediction.error
    torch.testing.assert_close(Simple(MinSNR(gamma=2.0)).loss(prediction), expected, rtol=1e-5, atol=1e-7)


# ---- the bound


def test_the_bound_is_the_term_times_the_number_of_levels_in_bits_per_dimension():
    prediction = predicted(LinearSchedule(50, beta_end=0.2), t=torch.tensor([0, 1, 2, 30, 49]))
    expected = 50 * term(prediction) / (24 * math.log(2))
    torch.testing.assert_close(VariationalBoundObjective().loss(prediction), expected)


@pytest.mark.parametrize("objective_class", [Hybrid, VariationalBoundObjective])
def test_the_decoder_scores_the_least_noisy_time(objective_class):
    prediction = predicted()
    default, continuous = (
        objective_class(decoder=decoder).loss(prediction) for decoder in (None, ContinuousGaussian())
    )
    assert default[0] != continuous[0]
    torch.testing.assert_close(default[1:], continuous[1:])


def test_a_bound_teaches_mean_and_variance():
    prediction = predicted()
    VariationalBoundObjective().loss(prediction).sum().backward()
    assert (prediction.output.grad.flatten(start_dim=1) != 0).any(dim=1).all()
    assert (prediction.variance.grad.flatten(start_dim=1) != 0).any(dim=1).all()


def test_the_variance_is_at_rest_where_it_makes_up_for_the_error_of_the_mean():
    schedule, t = LinearSchedule(30, beta_end=0.3), torch.full((5,), 12)
    prediction = predicted(schedule, t=t)
    (_, alpha, sigma), (_, alpha_next, _) = schedule.level(12), schedule.level(11)
    beta, beta_tilde = (v[0].double().exp() for v in training_variances(schedule, t))
    # The best variance is beta tilde and the square of the mean's error: here that is beta, which raw = 1 stands for.
    error = (beta - beta_tilde).sqrt() / (alpha_next * beta / sigma**2)
    raw = torch.ones_like(prediction.x0).requires_grad_()
    said = replace(prediction, output=prediction.eps + alpha / sigma * error, variance=raw)
    VariationalBoundObjective().loss(said).sum().backward()
    torch.testing.assert_close(raw.grad, torch.zeros_like(raw), rtol=0, atol=1e-6)
    smaller = replace(said, variance=torch.zeros_like(raw))
    assert (VariationalBoundObjective().loss(smaller) > VariationalBoundObjective().loss(said)).all()


# ---- the hybrid


@every_parameterization
def test_a_hybrid_adds_the_weighted_bound(parameterization):
    prediction = predicted(parameterization=parameterization)
    hybrid = Hybrid(vlb_weight=0.25, weighting=MinSNR(gamma=2.0))
    simple, bound = Simple(MinSNR(gamma=2.0)).loss(prediction), VariationalBoundObjective().loss(prediction)
    torch.testing.assert_close(hybrid.loss(prediction), simple + 0.25 * bound)
    torch.testing.assert_close(hybrid.terms(prediction), {"simple": simple, "vlb_bits_per_dim": bound})


@every_parameterization
def test_the_mean_of_a_hybrid_learns_from_the_simple_loss_alone(parameterization):
    hybrid, simple = (predicted(parameterization=parameterization) for _ in range(2))
    Hybrid(vlb_weight=0.5).loss(hybrid).sum().backward()
    Simple().loss(simple).sum().backward()
    torch.testing.assert_close(hybrid.output.grad, simple.output.grad)
    bound = predicted(parameterization=parameterization)
    VariationalBoundObjective().loss(bound).sum().backward()
    torch.testing.assert_close(hybrid.variance.grad, 0.5 * bound.variance.grad)


def test_the_papers_weight_gives_its_codes_factor():
    prediction = predicted(CosineSchedule(4000), t=torch.tensor([0, 1, 500, 3000, 3999]))
    in_bits = term(prediction) / (24 * math.log(2))
    expected = prediction.error + 4000 / 1000 * in_bits
    torch.testing.assert_close(Hybrid().loss(prediction), expected)


# ---- in training


@pytest.mark.parametrize("objective_class", [Hybrid, VariationalBoundObjective])
def test_a_network_of_points_learns_its_variance(objective_class, tmp_path):
    torch.manual_seed(0)
    module = tiny.point_ddpm(
        network=MLPDenoiser(hidden_dim=5, num_layers=1, learned_variance=True),
        objective=objective_class(decoder=ContinuousGaussian()),
        times=LossSecondMoment(history=1, num_timesteps=10),
    )
    last = module.network.layers[-1].weight
    before = last.detach().clone()
    run = tiny.train(tmp_path, module, tiny.ring())
    assert run.callback_metrics["train/loss"].isfinite()
    assert (last[2:] != before[2:]).all()
    assert ("train/vlb_bits_per_dim" in run.callback_metrics) == (objective_class is Hybrid)


# ---- refusals


@learning_the_variance
def test_a_continuous_schedule_has_no_sum_over_steps(objective):
    prediction = predicted(CosineLogSNR(), t=torch.linspace(0.1, 0.9, 5))
    with pytest.raises(ValueError, match="L_vlb: the bound is a sum over numbered steps, and CosineLogSNR has none"):
        objective.loss(prediction)


@learning_the_variance
def test_a_network_that_says_nothing_of_the_variance_is_refused(objective):
    full = predicted()
    with pytest.raises(ValueError, match="L_vlb: the network must say something of the variance"):
        objective.loss(replace(full, variance=None))


@pytest.mark.parametrize("objective_class", [Hybrid, VariationalBoundObjective])
def test_data_without_levels_is_refused_in_the_first_batch_alone(objective_class):
    full = predicted()
    latents = replace(full, x0=full.eps)
    with pytest.raises(ValueError, match="DiscretizedGaussian: data must hold the 256 levels"):
        objective_class().loss(latents)
    objective = objective_class()
    objective.loss(full)
    objective.loss(latents)  # to look again would make an accelerator wait
    objective_class(decoder=ContinuousGaussian()).loss(latents)


@pytest.mark.parametrize("weight", [0.0, -0.1, float("nan"), float("inf")])
def test_a_weight_that_teaches_no_variance_is_refused(weight):
    with pytest.raises(ValueError, match="Hybrid: vlb_weight must be positive and finite, got"):
        Hybrid(vlb_weight=weight)
