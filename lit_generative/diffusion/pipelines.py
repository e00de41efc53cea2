"""From a trained model to a pipeline of diffusers."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from lit_generative.diffusion.parameterizations import CleanImage, Epsilon, Velocity
from lit_generative.diffusion.samplers import DDIMSampler, DDPMSampler
from lit_generative.diffusion.schedules import DiscreteSchedule
from lit_generative.diffusion.spacings import Leading, Linspace, Trailing
from lit_generative.diffusion.variances import BetaVariance, LearnedVariance, PosteriorVariance

if TYPE_CHECKING:
    from lit_generative.diffusion.module import DDPM

PREDICTIONS = {Epsilon: "epsilon", Velocity: "v_prediction", CleanImage: "sample"}
SPACINGS = {Linspace: "linspace", Leading: "leading", Trailing: "trailing"}
VARIANCES = {PosteriorVariance: "fixed_small", BetaVariance: "fixed_large", LearnedVariance: "learned_range"}


def to_pipeline(module: DDPM, label: int | None = None) -> Any:
    """A ``DDPMPipeline`` or ``DDIMPipeline`` of the model's network, schedule and sampler.

    With the generators of :func:`~lit_generative.tensor_ops.sample_generators` it draws the images that the model
    draws: see :func:`how_to_call`.

    Args:
        module: Trained on images with a discrete schedule, by a ``DiffusersUNet`` without patches.
        label: The class to draw, of a model with classes: these pipelines take no labels, so the class's embedding goes
            into the U-Net's time embedding.

    Returns:
        The pipeline; the model's own network is left as it is.

    Raises:
        ValueError: If the pipelines have no place for a part of the model, or the label does not fit.
    """
    schedule = _check(module)
    unet: Any = copy.deepcopy(module.network.unet)
    variance = _variance(module)
    if variance != "learned_range" and getattr(module.network, "learned_variance", False):
        _keep_prediction(unet)
    if module.num_classes is not None:
        _fold_label(unet, module.num_classes, label)
    elif label is not None:
        raise ValueError("--label: the model has no classes. Leave it out.")
    settings = {
        "num_train_timesteps": schedule.num_timesteps,
        "trained_betas": schedule.betas.tolist(),
        "prediction_type": PREDICTIONS[type(module.parameterization)],
        "clip_sample": module.clip_samples,
        "timestep_spacing": SPACINGS[type(module.sampler.spacing)],
        "steps_offset": getattr(module.sampler.spacing, "offset", 0),
    }
    if isinstance(module.sampler, DDIMSampler):
        from diffusers import DDIMPipeline, DDIMScheduler

        return DDIMPipeline(unet=unet, scheduler=DDIMScheduler(**settings, set_alpha_to_one=True))
    from diffusers import DDPMPipeline, DDPMScheduler

    return DDPMPipeline(unet=unet, scheduler=DDPMScheduler(**settings, variance_type=variance))


def how_to_call(module: DDPM) -> str:
    """The call of the pipeline that draws as the model's own sampler does."""
    sampler = module.sampler
    call = f"pipeline(num_inference_steps={sampler.num_steps}, generator=sample_generators(seed, n), batch_size=n"
    if isinstance(sampler, DDIMSampler):
        call += f", eta={sampler.eta:g}" + (", use_clipped_model_output=True" if module.clip_samples else "")
        total = cast(DiscreteSchedule, module.schedule).num_timesteps
        regular = total % sampler.num_steps == 0 and not isinstance(sampler.spacing, Linspace)
        if not regular and sampler.num_steps < total:
            return (
                f"{call}) draws from the same model on other times: diffusers' DDIM steps by "
                f"{total} // {sampler.num_steps}. For equal images sample with spacing Leading or Trailing, and a "
                f"number of steps that divides {total}."
            )
    elif (last := sampler.levels(module.schedule)[-2].t) > 0 and _variance(module) != "fixed_small":
        return (
            f"{call}) draws from the same model, and leaves noise in its images: the last step is at time {last}, and "
            "only at 0 does diffusers' DDPM add none. For equal images sample with spacing Linspace, or Leading "
            "without offset."
        )
    return f"{call}) draws the same images."


def _check(module: DDPM) -> DiscreteSchedule:
    network = module.network
    unet = getattr(network, "unet", None)
    reasons = {
        "its network is no DiffusersUNet": not isinstance(unet, nn.Module),
        "its network folds patches (patch_size above 1, which is chosen before training)": getattr(
            network, "patch_size", 1
        )
        != 1,
        "its network sees more than x_t (condition, self_conditioning)": getattr(network, "extra_channels", 0) != 0,
        "its schedule is continuous": not isinstance(module.schedule, DiscreteSchedule),
        f"of its parameterization {type(module.parameterization).__name__}": type(module.parameterization)
        not in PREDICTIONS,
        "it works on latents": module.latents is not None,
        f"of its sampler {type(module.sampler).__name__}": not isinstance(module.sampler, DDPMSampler | DDIMSampler),
        f"of its spacing {type(module.sampler.spacing).__name__}": type(module.sampler.spacing) not in SPACINGS,
        "its sampler is guided (guidance_scale other than 1)": getattr(module.sampler.guidance, "scale", 1) != 1,
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        raise ValueError(
            f"The DDPM cannot become a DDPMPipeline or DDIMPipeline, as {' and '.join(found)}. Those hold a plain "
            "UNet2DModel, betas, and an unguided DDPMSampler or DDIMSampler. Choose a sampler with --sampler, "
            "--num_steps and --guidance_scale 1."
        )
    return cast(DiscreteSchedule, module.schedule)


def _variance(module: DDPM) -> str | None:
    """What diffusers calls the variance of a step; None for DDIM, which has none of its own."""
    if isinstance(module.sampler, DDIMSampler):
        return None
    learned = getattr(module.network, "learned_variance", False)
    return VARIANCES[
        type(cast(DDPMSampler, module.sampler).variance or (LearnedVariance() if learned else PosteriorVariance()))
    ]


@torch.no_grad()
def _keep_prediction(unet: Any) -> None:
    """Take away the outputs that say the variance, the second half: not every scheduler knows what they are."""
    whole, channels = unet.conv_out, unet.config.in_channels
    unet.conv_out = nn.Conv2d(whole.in_channels, channels, whole.kernel_size, padding=whole.padding)
    unet.conv_out.weight.copy_(whole.weight[:channels])
    unet.conv_out.bias.copy_(whole.bias[:channels])
    unet.conv_out.to(whole.weight)
    unet.register_to_config(out_channels=channels)


@torch.no_grad()
def _fold_label(unet: Any, num_classes: int, label: int | None) -> None:
    """Add the class's embedding to the last bias of the time embedding: diffusers adds the two."""
    if label is None or not 0 <= label < num_classes:
        raise ValueError(f"--label: the pipeline draws one class, so choose it: 0..{num_classes - 1}, got {label}.")
    unet.time_embedding.linear_2.bias += unet.class_embedding.weight[label]
    unet.class_embedding = None
    unet.register_to_config(num_class_embeds=None)
