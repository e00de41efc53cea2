"""Pretrained causal language models of transformers, loaded or refused with a reason."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lit_generative.data.tokenizers import check_place

FrozenDtype = Literal["float32", "bfloat16"]
Quantization = Literal["4bit"]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_causal_lm(who: str, pretrained: str, revision: str | None, dtype: str, quantization: str | None) -> Any:
    """A model with its weights, from safetensors (pickled weights could run code), in training mode.

    Args:
        who: Named in messages.
        pretrained: A folder as ``save_pretrained`` writes it, or the name of one on the hub.
        revision: Commit, branch or tag on the hub; None for its main branch.
        dtype: "float32" or "bfloat16".
        quantization: "4bit" for NF4 with double quantization (Dettmers et al. 2023, arXiv:2305.14314); None for none.

    Raises:
        ValueError: If there is no such model, it is of another kind, its weights are not complete, or it cannot be
            quantized here.
    """
    check_place(who, pretrained, "config.json and model.safetensors")
    _check_folder(who, Path(pretrained))
    options: dict[str, Any] = {"dtype": _DTYPES[dtype]}
    if quantization is not None:
        options = _quantized(who, quantization)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            pretrained, revision=revision, use_safetensors=True, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ValueError(
            f"{who}: {pretrained!r} could not be loaded as a causal language model: {str(error).splitlines()[0]} Give "
            "a folder that holds config.json and model.safetensors, or such a name on the hub. Without a network only "
            "folders work, and pickled weights (.bin) are never read."
        ) from error
    if missing := sorted(info["missing_keys"]):  # transformers fills them with random numbers
        raise ValueError(
            f"{who}: {pretrained!r} must hold all weights of a {type(model).__name__}, but {len(missing)} are missing, "
            f"{missing[0]} among them. Give a causal language model."
        )
    return model.train()  # transformers gives it in evaluation mode, in which Lightning would leave it


def positions_of(model: Any) -> int | None:
    """The longest text that a model was built for, in tokens; None if it does not say."""
    return getattr(model.config, "max_position_embeddings", None)


def _check_folder(who: str, folder: Path) -> None:
    """Name the other kinds of folders that one may take for a language model's."""
    if (index := folder / "model_index.json").is_file():
        kind = json.loads(index.read_text()).get("_class_name", "a pipeline")
        raise ValueError(
            f"{who}: {str(folder)!r} must hold a causal language model, and holds a {kind} of diffusers. For pictures "
            "use TextToImage."
        )
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ValueError(
            f"{who}: {str(folder)!r} must hold a causal language model, and holds an adapter alone. Give its base."
        )


def _quantized(who: str, quantization: str) -> dict[str, Any]:
    if quantization != "4bit":
        raise ValueError(f"{who}: quantization must be '4bit' or None, got {quantization!r}.")
    if not torch.cuda.is_available():
        raise ValueError(f"{who}: quantization='4bit' needs a GPU of NVIDIA, and there is none here. Leave it out.")
    if missing := [name for name in ("bitsandbytes", "accelerate") if importlib.util.find_spec(name) is None]:
        raise ValueError(f"{who}: quantization='4bit' needs the package {missing[0]}. Install it, or leave it out.")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"quantization_config": config, "device_map": {"": torch.cuda.current_device()}}
