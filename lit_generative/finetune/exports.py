"""Fine-tuned pipelines in forms that diffusers and PEFT read."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.utils import convert_state_dict_to_diffusers
from peft import PeftConfig, PeftType, get_peft_model_state_dict
from torch import Tensor, nn

from lit_generative.finetune.adapters import merged, save_adapter
from lit_generative.finetune.stable_diffusion import StableDiffusion

WHOLE = ("diffusers", "merged")
LORA, PEFT = "diffusers-lora", "peft"


def formats_of(adapters: Mapping[str, PeftConfig], whole: bool) -> tuple[str, ...]:
    """Forms that a model can be written in.

    Args:
        adapters: Configs by network.
        whole: Whether weights are trained that belong to no adapter.
    """
    if whole or not adapters:
        return WHOLE
    lora = all(config.peft_type == PeftType.LORA for config in adapters.values())
    return (*WHOLE, LORA, PEFT) if lora else (*WHOLE, PEFT)


def export(
    model: StableDiffusion, adapters: Mapping[str, PeftConfig], formats: Sequence[str], form: str, folder: Path
) -> str:
    """Write a model, or its adapters.

    Args:
        model: With its adapters.
        adapters: Their configs by network, as :func:`.adapters.inject` gave them.
        formats: As :func:`formats_of` says.
        form: One of them.
        folder: Where to; made if it is not there.

    Returns:
        How to load it, in Python.

    Raises:
        ValueError: If the form is none of these.
    """
    if form not in formats:
        raise ValueError(f"TextToImage: cannot be written as {form!r}: {_reason(form, adapters)}.")
    folder.mkdir(parents=True, exist_ok=True)
    if form in WHOLE:
        return _export_pipeline(model, folder)
    return _export_lora(model, adapters, folder) if form == LORA else _export_peft(model, adapters, folder)


def _reason(form: str, adapters: Mapping[str, PeftConfig]) -> str:
    kinds = sorted({type(config).__name__ for config in adapters.values() if config.peft_type != PeftType.LORA})
    if form not in (*WHOLE, LORA, PEFT):
        return f"the forms are {', '.join((*WHOLE, LORA, PEFT))}"
    if form == LORA and kinds:
        return f"diffusers reads the adapters of LoraConfig, not of {' and '.join(kinds)}. Take peft, or diffusers"
    return "weights are trained that belong to no adapter. Take diffusers"


def _export_pipeline(model: StableDiffusion, folder: Path) -> str:
    networks = {"unet": model.unet, **model.prompts.encoders}
    model.pipeline(**{name: _plain(network) for name, network in networks.items()}).save_pretrained(folder)
    return f"diffusers.DiffusionPipeline.from_pretrained({str(folder)!r})"


def _export_lora(model: StableDiffusion, adapters: Mapping[str, PeftConfig], folder: Path) -> str:
    arguments: dict[str, Any] = {}
    for name, config in adapters.items():
        arguments[f"{name}_lora_layers"] = _lora_layers(_network(model, name), in_text=name != "unet")
        # Without it, diffusers takes alpha for the rank, and says nothing.
        arguments[f"{name}_lora_adapter_metadata"] = {
            key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()
        }
    getattr(diffusers, model.pipeline_class).save_lora_weights(folder, **arguments)
    return f"pipeline.load_lora_weights({str(folder)!r}), with the pipeline that was fine-tuned"


def _lora_layers(network: nn.Module, in_text: bool) -> dict[str, Tensor]:
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(network))  # type: ignore[arg-type]
    # transformers 5.6 took text_model out of CLIPTextModel's names; other programs still expect it.
    prefix = "text_model." if in_text and not hasattr(network, "text_model") else ""
    return {f"{prefix}{key}": value.detach().float().cpu().contiguous() for key, value in state.items()}


def _export_peft(model: StableDiffusion, adapters: Mapping[str, PeftConfig], folder: Path) -> str:
    places = {name: folder if name == "unet" else folder / name for name in adapters}
    for name, place in places.items():
        save_adapter(_network(model, name), adapters[name], place)
    return "; ".join(
        f"peft.PeftModel.from_pretrained(pipeline.{name}, {str(place)!r})" for name, place in places.items()
    )


def _network(model: StableDiffusion, name: str) -> Any:
    return model.unet if name == "unet" else model.prompts.encoders[name]


def _plain(network: Any) -> Any:
    """The network without adapters, in float32; itself if it is so already."""
    if any(p.dtype != torch.float32 for p in network.parameters()):
        network = copy.deepcopy(network).float()
    return merged(network)
