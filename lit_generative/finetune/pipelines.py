"""Pipelines of Stable Diffusion 1.x, 2.x and XL, as diffusers writes them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DDPMScheduler, DiffusionPipeline
from torch import nn

from lit_generative.diffusion.diffusers_kinds import PREDICTIONS
from lit_generative.diffusion.parameterizations import Parameterization
from lit_generative.diffusion.schedules import DiscreteSchedule

SD, SDXL = "StableDiffusionPipeline", "StableDiffusionXLPipeline"
_HUB_NAME = re.compile(r"\w[\w.-]*/[\w.-]+")
_BETAS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
_UNUSED: dict[str, Any] = {"image_encoder": None, "feature_extractor": None}


def load_pipeline(who: str, pretrained: str, revision: str | None = None) -> Any:
    """A pipeline in float32, without safety checker, from safetensors: pickled weights could run code.

    Args:
        who: Named in messages.
        pretrained: A folder as ``save_pretrained`` writes it, or the name of one on the hub.
        revision: Commit, branch or tag on the hub; None for its main branch.

    Returns:
        A ``StableDiffusionPipeline`` or a ``StableDiffusionXLPipeline``.

    Raises:
        ValueError: If there is no such pipeline, it is of another class, or its parts do not fit each other.
    """
    name = _class_name(who, pretrained, revision)
    try:
        pipeline = getattr(diffusers, name).from_pretrained(
            pretrained,
            revision=revision,
            use_safetensors=True,
            low_cpu_mem_usage=False,  # else it asks for accelerate
            **_left_out(name),
        )
    except (OSError, ValueError) as error:
        raise _not_loaded(who, pretrained, error) from error
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.float()
    channels = (pipeline.unet.config.in_channels, pipeline.vae.config.latent_channels)
    if channels[0] != channels[1]:
        raise ValueError(
            f"{who}: the U-Net must see latents alone, of {channels[1]} channels, but that of {pretrained} takes "
            f"{channels[0]}. Inpainting and the like cannot be trained here: give a text-to-image pipeline."
        )
    return pipeline


def build_pipeline(name: str, parts: dict[str, Any], zeros_for_empty: bool) -> Any:
    """A pipeline of modules that exist; nothing is copied.

    Args:
        name: Its class: :data:`SD` or :data:`SDXL`.
        parts: ``unet``, ``vae``, ``scheduler``, tokenizers and text encoders.
        zeros_for_empty: Whether SDXL takes zeros for no prompt.
    """
    if name == SDXL:
        options: dict[str, Any] = {"force_zeros_for_empty_prompt": zeros_for_empty, "add_watermarker": False}
    else:
        options = _left_out(name)
    return getattr(diffusers, name)(**parts, **options)


def noise_of(who: str, scheduler: Any) -> tuple[DiscreteSchedule, Parameterization]:
    """Noise levels and prediction that a pipeline was trained with.

    Args:
        who: Named in messages.
        scheduler: The pipeline's; whichever sampler it is, it names them.

    Raises:
        ValueError: If it has no betas, or a prediction that is not known, or the two do not fit.
    """
    config = dict(scheduler.config)
    prediction = config.get("prediction_type", "epsilon")
    if "beta_schedule" not in config or prediction not in PREDICTIONS:
        raise ValueError(
            f"{who}: the scheduler must have betas and a prediction_type among {', '.join(PREDICTIONS)}, but a "
            f"{type(scheduler).__name__} of prediction_type {prediction!r} came. Flow matching is not trained here."
        )
    # Without rescale_betas_zero_snr: our schedule stretches them itself.
    betas = DDPMScheduler(**{key: config[key] for key in _BETAS if key in config}).betas.double()
    schedule = DiscreteSchedule(betas, zero_terminal_snr=bool(config.get("rescale_betas_zero_snr", False)))
    PREDICTIONS[prediction].check(schedule)
    return schedule, PREDICTIONS[prediction]


def _class_name(who: str, pretrained: str, revision: str | None) -> str:
    folder = Path(pretrained)
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise ValueError(
            f"{who}: pretrained must be a pipeline's folder, with its model_index.json, but {pretrained} holds "
            f"{_content(folder)}."
        )
    if not folder.is_dir() and not _HUB_NAME.fullmatch(pretrained):
        raise ValueError(f"{who}: there is no folder {pretrained}, looked for from {Path.cwd()}.")
    try:
        name = DiffusionPipeline.load_config(pretrained, revision=revision).get("_class_name")
    except (OSError, ValueError) as error:
        raise _not_loaded(who, pretrained, error) from error
    if name not in (SD, SDXL):
        raise ValueError(
            f"{who}: pretrained must be a {SD} or a {SDXL}, but {pretrained} holds a {name}, which is built and "
            "trained otherwise."
        )
    return str(name)


def _content(folder: Path) -> str:
    """What a folder holds that is no pipeline's."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return "none"
    found = config.get("_class_name") or next(iter(config.get("architectures") or []), None)
    hint = ". Fine-tune a language model by CausalLM" if str(found).endswith("ForCausalLM") else ""
    return f"a {found or 'network'} alone{hint}"


def _left_out(name: str) -> dict[str, Any]:
    return {**_UNUSED, "safety_checker": None, "requires_safety_checker": False} if name == SD else dict(_UNUSED)


def _not_loaded(who: str, pretrained: str, error: Exception) -> ValueError:
    reason = str(error).strip().splitlines()
    return ValueError(
        f"{who}: the pipeline {pretrained} cannot be loaded: {reason[0] if reason else type(error).__name__} Give a "
        "folder as save_pretrained writes it, with safetensors, or the name of one on the hub, which must be reached "
        "or be in its cache."
    )
