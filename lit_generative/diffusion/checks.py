"""Parts of a diffusion model that do not fit each other, found before training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lit_generative.diffusion.conditions import Condition, SuperResolution
from lit_generative.diffusion.guidance import Guidance
from lit_generative.diffusion.latents import Latents
from lit_generative.diffusion.objectives import DenoisingObjective
from lit_generative.diffusion.samplers import Sampler
from lit_generative.diffusion.variances import LearnedVariance


def check_model(module: Any) -> None:
    """All of the checks below, of a DDPM.

    Raises:
        ValueError: If the sampler takes more steps than the schedule has, or as they do.
    """
    network, guidance = module.network, module.sampler.guidance
    module.parameterization.check(module.schedule)
    module.sampler.levels(module.schedule)
    module.times.check(module.schedule)
    check_shapes(network, module.latents, module.clip_samples)
    check_guidance(guidance, module.label_dropout, module.num_classes)
    check_variance(network, module.objective)
    check_sampled_variance(network, module.sampler)
    module.objective.check(module.schedule)
    check_conditions(network, module.self_conditioning, module.condition, module.latents)
    if guidance is not None:
        guidance.check(network, module.schedule, module.parameterization)


def check_shapes(network: nn.Module, latents: Latents | None, clip_samples: bool) -> None:
    """The network works on latents of the codec's shape, which do not lie in ``[-1, 1]``.

    Raises:
        ValueError: If it does not.
    """
    if latents is None:
        return
    if tuple(network.sample_shape) != latents.latent_shape:  # type: ignore[arg-type]
        raise ValueError(
            f"DDPM: the codec's latents have shape {latents.latent_shape}, but the network takes "
            f"{tuple(network.sample_shape)}. Set its image_size and channels to theirs."  # type: ignore[arg-type]
        )
    if clip_samples:
        raise ValueError("DDPM: latents do not lie in [-1, 1]. Leave clip_samples out.")


def check_guidance(guidance: Guidance | None, label_dropout: float, num_classes: int | None) -> None:
    """A network that is asked without a label must have trained without, which takes classes.

    Raises:
        ValueError: If it has not, or ``label_dropout`` is no probability.
    """
    if not 0 <= label_dropout < 1:
        raise ValueError(f"DDPM: label_dropout must lie in [0, 1), got {label_dropout}.")
    if label_dropout and num_classes is None:
        raise ValueError("DDPM: label_dropout needs a network with num_classes.")
    if guidance is not None and guidance.needs_null_class and not label_dropout:
        raise ValueError(
            f"DDPM: {type(guidance).__name__} asks the network without a label, which it never trained for. Set "
            "label_dropout, to 0.1 say, or leave the guidance out."
        )


def check_variance(network: nn.Module, objective: DenoisingObjective) -> None:
    """An objective that learns the variance needs a network that says something of it, and the other way round.

    Raises:
        ValueError: If only one of them does.
    """
    said = bool(getattr(network, "learned_variance", False))
    if said != objective.learns_variance:
        raise ValueError(
            f"DDPM: {type(objective).__name__} "
            + (
                "learns the variance, so the network must give 2C channels: set its learned_variance to true."
                if objective.learns_variance
                else "learns no variance, so the network must give C channels, not 2C: leave its learned_variance out."
            )
        )


def check_sampled_variance(network: nn.Module, sampler: Sampler) -> None:
    """A sampler that takes the network's variance needs a network that says one.

    Raises:
        ValueError: If it says none.
    """
    wants = isinstance(getattr(sampler, "variance", None), LearnedVariance)
    if wants and not getattr(network, "learned_variance", False):
        raise ValueError(
            f"DDPM: the {type(sampler).__name__} takes the learned variance, of which the network says nothing. Train "
            "with an objective that learns it, as Hybrid, and learned_variance; or leave the sampler's variance out."
        )


def check_conditions(
    network: nn.Module, self_conditioning: bool, condition: Condition | None, latents: Latents | None = None
) -> None:
    """What is shown beside ``x_t`` needs input channels, as many as it has, and the size of ``x_t``.

    Raises:
        ValueError: If the network has others, ``x_t`` is a latent, or no condition can be made of an image.
    """
    if condition is not None and latents is not None:
        raise ValueError(
            f"DDPM: a {type(condition).__name__} has the size of images, and a network of latents works on smaller "
            "maps. Leave condition or codec out."
        )
    extra = int(getattr(network, "extra_channels", 0))
    shape: tuple[int, ...] = tuple(network.sample_shape)  # type: ignore[arg-type]
    needed = shape[0] if self_conditioning else 0
    if condition is not None:
        needed += condition.of(torch.zeros(1, *shape)).shape[1]
    if extra != needed:
        raise ValueError(
            "DDPM: self_conditioning and condition show the network images beside x_t, so it needs extra_channels for "
            f"them, and only then: here {needed}. It has {extra}."
        )


def check_shown(condition: Condition | None, shown: Tensor | None) -> None:
    """A model with a condition draws no sample without what it is shown, ``(N, C', H, W)``.

    Raises:
        ValueError: If there is none.
    """
    if condition is not None and shown is None:
        raise ValueError(
            f"DDPM: samples of this model need images, of which it makes its {type(condition).__name__}. Give it some "
            "with samples_of() or, if they are small ones, with super_resolve() or litgen sample --low_res IMAGES."
        )


def check_inpainting(latents: Latents | None, condition: Condition | None) -> None:
    """Holes are filled by a model of pixels that is shown the noisy image alone.

    Raises:
        ValueError: If it works on latents, or has a condition.
    """
    if latents is not None:
        raise ValueError("DDPM: inpaint needs a model of pixels: a known pixel is no known latent.")
    if condition is not None:
        raise ValueError(
            f"DDPM: inpaint needs a model without condition: no {type(condition).__name__} can be made of an image "
            "with holes."
        )


def super_resolution_of(condition: Condition | None) -> SuperResolution:
    """The condition, if it shows small images.

    Raises:
        ValueError: If it does not.
    """
    if not isinstance(condition, SuperResolution):
        raise ValueError("DDPM: super_resolve needs a model that was trained with the condition SuperResolution.")
    return condition
