"""Estimators of the likelihood agree with a Gaussian's own."""

import math

import pytest
import torch

from lit_generative.callbacks.density_evaluation import DensityEvaluation
from lit_generative.diffusion.bounds import prior_term
from lit_generative.diffusion.conditions import SuperResolution
from lit_generative.diffusion.guidance import ClassifierFree
from lit_generative.diffusion.likelihood import BoundEstimator, FlowEstimator
from lit_generative.diffusion.parameterizations import Epsilon
from lit_generative.diffusion.samplers import DDIMSampler
from lit_generative.diffusion.schedules import CosineSchedule
from lit_generative.diffusion.spacings import Leading, Linspace, Trailing
from lit_generative.diffusion.variances import BetaVariance
from lit_generative.networks.mlp import MLPDenoiser
from lit_generative.tensor_ops import from_uint8, sample_generators
from tests.diffusion.gaussian import MEAN, STD, gaussian_ddpm
from tests.tiny import ddpm, point_ddpm, ring, trainer, vae


def points(num=40, shape=(3,)):
    return MEAN + STD * torch.randn(num, *shape, generator=torch.Generator().manual_seed(0))


def images(num=20):
    return from_uint8((127.5 * (points(num, (1, 2, 3)) + 1)).round().clamp(0, 255))


def nll(x):
    return -torch.distributions.Normal(MEAN, STD).log_prob(x).flatten(start_dim=1).sum(dim=1)


def test_the_flow_gives_the_density_of_points():
    x = points()
    found = FlowEstimator(300, exact_divergence=True).estimate(
        gaussian_ddpm((3,), 1000), x, None, sample_generators(0, len(x))
    )
    assert set(found) == {"ode_nll", "ode_standard_error"}
    torch.testing.assert_close(found["ode_nll"], nll(x), rtol=0, atol=0.05)
    assert found["ode_standard_error"].abs().max() == 0


def test_the_flow_gives_the_bits_of_pixels():
    x = images()
    module = gaussian_ddpm((1, 2, 3), 1000)
    found = FlowEstimator(300, spacing=Linspace()).estimate(module, x, None, sample_generators(0, len(x)))
    low, high = (torch.distributions.Normal(MEAN, STD).cdf(x + sign / 255) for sign in (-1, 1))
    exact = -(high - low).log2().flatten(start_dim=1).mean()
    assert found["ode_bits_per_dim"].mean() == pytest.approx(exact.item(), abs=0.02)


def test_the_bound_lies_above_the_likelihood_and_near_it_with_many_steps():
    x = points(200)
    gaps = []
    for num_steps in (5, 100):
        found = BoundEstimator(num_steps).estimate(gaussian_ddpm((3,)), x, None, sample_generators(0, len(x)))
        assert "vlb_bits_per_dim" not in found
        gaps.append((found["vlb"].mean() - nll(x).mean()).item())
    assert gaps[0] > gaps[1] > 0


def test_the_parts_of_the_bound_add_up_and_bits_are_nats_by_dimension():
    x = images()
    found = BoundEstimator().estimate(gaussian_ddpm((1, 2, 3)), x, None, sample_generators(0, len(x)))
    parts = [found[name] for name in ("vlb_prior", "vlb_decoder", *(f"vlb_steps_{i}" for i in range(4)))]
    torch.testing.assert_close(sum(parts), found["vlb"])
    torch.testing.assert_close(found["vlb_bits_per_dim"], found["vlb"] / (6 * math.log(2)))
    assert len(parts) == 6


def test_another_variance_gives_another_bound():
    x, module = points(), gaussian_ddpm((3,))
    default, other = (
        BoundEstimator(20, variance).estimate(module, x, None, sample_generators(0, 40))["vlb"]
        for variance in (None, BetaVariance())
    )
    assert (default - other).abs().min() > 1e-3


@pytest.mark.parametrize("estimator", [BoundEstimator(4), FlowEstimator(4)])
def test_guidance_is_left_out_and_labels_are_used(estimator):
    torch.manual_seed(0)
    network = MLPDenoiser(hidden_dim=8, num_layers=1, num_classes=3)
    x, y = points(6, (2,)), torch.tensor([0, 1, 2, 0, 1, 2])
    plain, guided = (
        point_ddpm(network=network, label_dropout=0.5, sampler=DDIMSampler(3, guidance=guidance))
        for guidance in (None, ClassifierFree(5.0))
    )
    values = [
        estimator.estimate(m, x, labels, sample_generators(0, 6))
        for m, labels in ((plain, y), (guided, y), (plain, (y + 1) % 3))
    ]
    torch.testing.assert_close(values[0], values[1])
    name = next(iter(values[0]))
    assert not torch.allclose(values[0][name], values[2][name])


@pytest.mark.parametrize("estimator", [BoundEstimator(), FlowEstimator()])
def test_a_model_without_a_likelihood_is_refused_before_training(estimator, tmp_path):
    from tests.diffusion.test_latents import Scaled, latent_ddpm

    network = MLPDenoiser(hidden_dim=5, num_layers=1, extra_channels=2)
    for module, message in (
        (latent_ddpm(Scaled()), "likelihood of latents is not that of images"),
        (point_ddpm(network=network, self_conditioning=True), "with self_conditioning a step depends on the guesses"),
    ):
        run = trainer(tmp_path, callbacks=[DensityEvaluation([estimator])], max_steps=1)
        with pytest.raises(ValueError, match=f"{type(estimator).__name__}: .*{message}"):
            run.fit(module, ring())
        assert run.global_step == 0
    estimator.check(point_ddpm())
    with pytest.raises(TypeError, match=f"{type(estimator).__name__}: needs a DDPM, got a VAE"):
        estimator.check(vae())


def test_no_steps_are_refused():
    with pytest.raises(ValueError, match="BoundEstimator: num_steps must be at least 1, got 0"):
        BoundEstimator(0)
    for numbers in ((1, None, 2), (2, None, 0)):
        with pytest.raises(ValueError, match="FlowEstimator: num_steps must be at least 2 and num_probes at least 1"):
            FlowEstimator(*numbers)


@pytest.mark.parametrize("spacing", [Trailing(), Leading(), Linspace()])
def test_the_bound_of_any_times_lies_above_the_likelihood(spacing):
    module, x = gaussian_ddpm((3,), 1000), points(400)
    evenly, other = (
        BoundEstimator(50, spacing=each).estimate(module, x, None, sample_generators(0, len(x)))
        for each in (None, spacing)
    )
    assert other["vlb"].mean() > nll(x).mean()
    assert torch.equal(evenly["vlb"], other["vlb"]) == isinstance(spacing, Linspace)
    first = module.schedule.level(spacing.times(module.schedule, 50)[0])
    torch.testing.assert_close(other["vlb_prior"], prior_term(x, module.schedule, first))


def test_a_condition_is_made_of_the_image():
    from lit_generative.networks.diffusers_unet import DiffusersUNet

    torch.manual_seed(0)
    network = DiffusersUNet(8, 1, widths=(8,), layers_per_block=1, attention_levels=(), extra_channels=1)
    module = ddpm(network=network, condition=SuperResolution(2), schedule=CosineSchedule(5), parameterization=Epsilon())
    x = from_uint8(torch.randint(256, (2, 1, 8, 8), generator=torch.Generator().manual_seed(0)))
    assert BoundEstimator().estimate(module, x, None, sample_generators(0, 2))["vlb"].isfinite().all()
