"""A GAN, VAE or DDPM with adapters, written for others: the adapters alone, or a checkpoint without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch

from lit_generative.finetune.adapters import Adapted, merged, save_adapter
from lit_generative.recipe import describe
from lit_generative.training.module import GenerativeModule

FORMATS = ("peft", "merged")


def adapted_parts(module: GenerativeModule) -> dict[str, Adapted]:
    """The networks of a module that have an adapter, by the name of its argument."""
    return {name: part for name, part in module.named_children() if isinstance(part, Adapted)}


def export_adapted(module: GenerativeModule, format: str, folder: Path) -> str:
    """Write adapters, or what they amount to.

    Args:
        module: With one network at least that has an adapter.
        format: ``peft``: a folder for each network, as ``PeftModel.from_pretrained(network, folder)`` reads it;
            ``merged``: ``merged.ckpt``, a checkpoint of plain networks that needs no other file.
        folder: Is made if it is not there.

    Returns:
        How to load it.
    """
    parts = adapted_parts(module)
    if format == "peft":
        for name, part in parts.items():
            save_adapter(part.network, part.adapter, folder / name)
        return "; ".join(f"PeftModel.from_pretrained({name}, '{folder / name}')" for name in parts)
    state: dict[str, Any] = {}
    own = module.state_dict()
    hparams = dict(module.hparams)
    for name, part in parts.items():
        plain = merged(part.network)
        state |= {f"{name}.{key}": value for key, value in plain.state_dict().items()}
        hparams[name] = describe(plain)
    state |= {key: value for key, value in own.items() if key.partition(".")[0] not in parts}
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "merged.ckpt"
    torch.save(
        {
            "state_dict": state,
            "hyper_parameters": hparams,
            "global_step": 0,
            "epoch": 0,
            "pytorch-lightning_version": L.__version__,
        },
        file,
    )
    return f"lit_generative.loading.load_module('{file}')"
