"""Parts that do not fit each other are refused when the model is built."""

import pytest
import torch

from lit_generative.diffusion.conditions import SuperResolution
from lit_generative.diffusion.continuous import CosineLogSNR, RectifiedFlow
from lit_generative.diffusion.guidance import ClassifierFree
from lit_generative.diffusion.objectives import Hybrid, Simple, VariationalBoundObjective
from lit_generative.diffusion.parameterizations import Epsilon, FlowVelocity, Velocity
from lit_generative.diffusion.samplers import DDIMSampler, DDPMSampler
from lit_generative.diffusion.schedules import CosineSchedule, LinearSchedule
from lit_generative.diffusion.times import LossSecondMoment
from lit_generative.diffusion.variances import BetaVariance, LearnedVariance
from lit_generative.networks.diffusers_unet import DiffusersUNet
from lit_generative.networks.mlp import MLPDenoiser
from tests.tiny import ddpm, point_ddpm, vae


def network(**options) -> MLPDenoiser:
    torch.manual_seed(0)
    return MLPDenoiser(hidden_dim=5, num_layers=1, **options)


def test_a_model_of_plain_parts_is_accepted():
    module = point_ddpm()
    assert isinstance(module.objective, Simple)
    assert module.clip_samples


@pytest.mark.parametrize("schedule", [CosineSchedule(10, zero_terminal_snr=True), RectifiedFlow()])
def test_epsilon_is_refused_where_no_image_is_left_at_the_noisiest_time(schedule):
    with pytest.raises(ValueError, match="Epsilon"):
        point_ddpm(schedule=schedule, parameterization=Epsilon())
    point_ddpm(schedule=schedule, parameterization=FlowVelocity())


def test_more_steps_than_noise_levels_are_refused():
    with pytest.raises(ValueError, match="DDIMSampler: num_steps=11 is more than the schedule's 10 noise levels"):
        point_ddpm(schedule=LinearSchedule(10), sampler=DDIMSampler(11))


@pytest.mark.parametrize("probability", [-0.1, 1.0])
def test_a_label_dropout_that_is_no_probability_is_refused(probability):
    with pytest.raises(ValueError, match=r"label_dropout must lie in \[0, 1\)"):
        point_ddpm(num_classes=3, label_dropout=probability)


def test_label_dropout_needs_classes():
    with pytest.raises(ValueError, match="label_dropout needs a network with num_classes"):
        point_ddpm(label_dropout=0.1)


def test_guidance_without_label_dropout_is_refused():
    sampler = DDIMSampler(3, guidance=ClassifierFree(2.0))
    with pytest.raises(ValueError, match="ClassifierFree asks the network without a label, which it never trained for"):
        point_ddpm(num_classes=3, sampler=sampler)
    point_ddpm(num_classes=3, sampler=sampler, label_dropout=0.1)


def test_objective_and_network_agree_on_the_variance():
    with pytest.raises(ValueError, match="Hybrid learns the variance, so the network must give 2C channels"):
        point_ddpm(objective=Hybrid())
    with pytest.raises(ValueError, match="Simple learns no variance, so the network must give C channels, not 2C"):
        point_ddpm(network=network(learned_variance=True))
    point_ddpm(network=network(learned_variance=True), objective=Hybrid())


@pytest.mark.parametrize("objective_class", [Hybrid, VariationalBoundObjective])
def test_a_bound_is_refused_where_no_steps_are_numbered(objective_class):
    options = {
        "network": network(learned_variance=True),
        "objective": objective_class(),
        "parameterization": Velocity(),
    }
    with pytest.raises(ValueError, match="L_vlb: the bound is a sum over numbered steps, and CosineLogSNR has none"):
        point_ddpm(**options, schedule=CosineLogSNR())
    point_ddpm(**options, schedule=LinearSchedule(10))
    point_ddpm(schedule=CosineLogSNR(), parameterization=Velocity())  # the plain error needs no steps


def test_losses_of_each_step_are_refused_for_a_schedule_with_other_steps_or_none():
    with pytest.raises(ValueError, match="LossSecondMoment: keeps losses of numbered steps, and CosineLogSNR has none"):
        point_ddpm(times=LossSecondMoment(), schedule=CosineLogSNR(), parameterization=Velocity())
    with pytest.raises(ValueError, match="keeps losses of 1000 noise levels, but the schedule has 10"):
        point_ddpm(times=LossSecondMoment())
    point_ddpm(times=LossSecondMoment(num_timesteps=10))


def test_images_beside_x_t_need_as_many_channels_and_channels_need_images():
    with pytest.raises(ValueError, match=r"so it needs extra_channels for them, and only then: here 2\. It has 0"):
        point_ddpm(self_conditioning=True)
    with pytest.raises(ValueError, match=r"here 0\. It has 2"):
        point_ddpm(network=network(extra_channels=2))
    point_ddpm(network=network(extra_channels=2), self_conditioning=True, parameterization=Velocity())
    sizes = {"channels": 2, "widths": (8,), "layers_per_block": 1}
    for extra, both in ((3, False), (2, True)):
        small = DiffusersUNet(8, extra_channels=extra, **sizes)
        with pytest.raises(ValueError, match=rf"here {4 if both else 2}\. It has {extra}"):
            ddpm(
                network=small,
                condition=SuperResolution(2),
                self_conditioning=both,
            )
    ddpm(network=DiffusersUNet(8, extra_channels=4, **sizes), condition=SuperResolution(2), self_conditioning=True)
    with pytest.raises(ValueError, match=r"whose sides are multiples of scale=3, got \(1, 2, 8, 8\)"):
        ddpm(network=DiffusersUNet(8, extra_channels=2, **sizes), condition=SuperResolution(3))


def test_a_sampler_takes_no_variance_that_nobody_learned():
    with pytest.raises(
        ValueError, match="the DDPMSampler takes the learned variance, of which the network says nothing"
    ):
        point_ddpm(sampler=DDPMSampler(4, variance=LearnedVariance()))
    learned = network(learned_variance=True)
    point_ddpm(network=learned, objective=Hybrid(), sampler=DDPMSampler(4, variance=LearnedVariance()))
    point_ddpm(network=learned, objective=Hybrid(), sampler=DDPMSampler(4, variance=BetaVariance()))


def test_a_condition_is_refused_on_latents():
    latent = MLPDenoiser(hidden_dim=5, num_layers=1, sample_shape=(3,))
    with pytest.raises(ValueError, match="a SuperResolution has the size of images, and a network of latents"):
        point_ddpm(network=latent, codec=vae(), condition=SuperResolution(2), clip_samples=False)
