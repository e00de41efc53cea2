"""Make a checkpoint of ours from a StyleGAN2 that another library has trained.

Source: Karras et al. 2020 (arXiv:1912.04958, arXiv:2006.06676); what is assumed of the files:
:mod:`lit_generative.finetune.stylegan2_keys`.
"""

from __future__ import annotations

import argparse
import functools
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import lightning as L
import torch
from torch import Tensor, nn

from lit_generative.finetune.restricted_unpickler import PersistentObject, restricted_load
from lit_generative.finetune.stylegan2_keys import (
    Weights,
    count,
    nvlabs_discriminator,
    nvlabs_generator,
    renamed,
    rosinality_discriminator,
    rosinality_generator,
)
from lit_generative.gan.losses import NonSaturating
from lit_generative.gan.module import GAN
from lit_generative.networks.stylegan2_discriminator import StyleGAN2Discriminator
from lit_generative.networks.stylegan2_generator import StyleGAN2Generator
from lit_generative.training.checkpoint_io import SafeCheckpointIO

Layout = Literal["stylegan2-rosinality", "stylegan2-nvlabs"]
_GROUP_SIZE = 4
_WHOLE_BATCH = 2**30
_NUM_DRAWS = 10_000


class Networks(NamedTuple):
    """Weights of one file, under our names."""

    generator: dict[str, Tensor]
    average: dict[str, Tensor]
    """Of the generator, that samples are drawn with."""
    discriminator: dict[str, Tensor]
    group_size: int
    """Examples that minibatch standard deviation compares."""


def convert_stylegan2(source: str | os.PathLike[str], out: str | os.PathLike[str], layout: Layout) -> Path:
    """Write the networks of another library's file as a checkpoint of a GAN, without running code in the file.

    Sizes are read off the weights. The converted networks give the source's images and logits, with these exceptions:
    minibatch standard deviation compares neighbours in the batch, and there examples that lie far apart, which differs
    for batches of more than one group; NVLabs' clamping of activations at +-256 is not there. ``w_avg`` of a
    rosinality file is its ``latent_avg``, or without one the mean of 10,000 styles. If the file has no raw generator,
    its average stands for both. Optimizers, p of ADA and the training settings are not carried over.

    Args:
        source: ``stylegan2-rosinality``: a file of ``torch.save`` with the state dicts ``g_ema``, ``d`` and, if there
            is one, ``g``. ``stylegan2-nvlabs``: a pickle of PyTorch with the modules ``G_ema``, ``D`` and ``G``.
        out: The checkpoint to write, for :func:`lit_generative.loading.load_module`.
        layout: Whose file it is.

    Returns:
        The file written.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds code, other networks than StyleGAN2's without classes, or widths that do not double up
            to 512 from size to size.
    """
    if layout not in get_args(Layout):
        raise ValueError(f"convert_stylegan2: layout must be one of {get_args(Layout)}, got {layout!r}.")
    networks = _read_rosinality(Path(source)) if layout == "stylegan2-rosinality" else _read_nvlabs(Path(source))
    module, average = _build(str(source), networks)
    checkpoint = {
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": L.__version__,
        "state_dict": module.state_dict(),
        "hyper_parameters": dict(module.hparams),
        "callbacks": {"EMA": {"images": 0, "weights": {"ema": average}}},
    }
    SafeCheckpointIO().save_checkpoint(checkpoint, out)
    return Path(out)


def _read_rosinality(file: Path) -> Networks:
    parts = _torch_file(file)
    _check_parts(file, parts, "g_ema", "d")
    for name in {"g", "g_ema", "d"} & set(parts):
        if not isinstance(parts[name], Mapping) or not all(isinstance(value, Tensor) for value in parts[name].values()):
            raise ValueError(f"{file}: {name} must be a state dict of tensors.")

    def generator(name: str) -> dict[str, Tensor]:
        weights = parts[name]
        sizes = 1 + count(weights, "to_rgbs.{}.bias")
        renaming = rosinality_generator(weights, sizes, count(weights, "style.{}.weight", 1))
        mean = {} if parts.get("latent_avg") is None else {"w_avg": parts["latent_avg"].flatten().float()}
        return renamed(f"{file}, {name}", weights, renaming) | mean

    sizes = count(parts["d"], "convs.{}.skip.1.weight", 1) + 1
    discriminator = renamed(f"{file}, d", parts["d"], rosinality_discriminator(sizes))
    return Networks(generator("g" if "g" in parts else "g_ema"), generator("g_ema"), discriminator, _GROUP_SIZE)


def _read_nvlabs(file: Path) -> Networks:
    parts = restricted_load(file)
    _check_parts(file, parts, "G_ema", "D")

    def generator(name: str) -> dict[str, Tensor]:
        weights = _tensors(f"{file}, {name}", parts[name])
        sizes = _num_sizes(weights, "synthesis.b{}.torgb.weight")
        renaming = nvlabs_generator(sizes, count(weights, "mapping.fc{}.weight"))
        return renamed(f"{file}, {name}", weights, renaming)

    weights = _tensors(f"{file}, D", parts["D"])
    discriminator = renamed(f"{file}, D", weights, nvlabs_discriminator(1 + _num_sizes(weights, "b{}.skip.weight", 8)))
    average = generator("G_ema")
    raw = average if parts.get("G") is None else generator("G")
    return Networks(raw, average, discriminator, _group_size(parts["D"]))


def _torch_file(file: Path) -> Any:
    if not file.is_file():
        raise FileNotFoundError(f"There is no file {file}.")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # its training arguments
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # its long message advises to run the code
        raise ValueError(f"{file} holds Python objects beside tensors and was refused: it could run code.") from error
    except Exception as error:  # a damaged file shows in many ways
        raise ValueError(f"{file} cannot be read as a file of torch: {str(error).splitlines()[0]}.") from error


def _check_parts(file: Path, parts: Any, *names: str) -> None:
    found = list(parts) if isinstance(parts, Mapping) else type(parts).__name__
    missing = [name for name in names if name not in found]
    if missing or not isinstance(parts, Mapping):
        raise ValueError(
            f"{file}: needs the networks {list(names)}, of which {missing} are missing; it holds {found}. Fine-tuning "
            "needs a discriminator: take the file that training saved, not one for sampling alone."
        )


def _num_sizes(weights: Weights, pattern: str, lowest: int = 4) -> int:
    num = 0
    while pattern.format(lowest * 2**num) in weights:
        num += 1
    return num


def _tensors(who: str, module: Any, prefix: str = "") -> dict[str, Tensor]:
    """Parameters and buffers by dotted name: a frozen layer has its weights among the buffers."""
    if not isinstance(module, PersistentObject):
        raise ValueError(f"{who}: {prefix or 'it'} must be a persistent module, got a {type(module).__name__}.")
    tensors: dict[str, Tensor] = {}
    for kind in ("_parameters", "_buffers"):
        for name, value in module.state.get(kind, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{prefix}{name}"] = value
    for name, child in module.state.get("_modules", {}).items():
        if child is not None:
            tensors |= _tensors(who, child, f"{prefix}{name}.")
    return tensors


def _group_size(discriminator: PersistentObject) -> int:
    """What its minibatch standard deviation says; None there is the whole batch."""
    lowest = discriminator.state["_modules"]["b4"].state["_modules"]
    if lowest.get("mbstd") is None:  # the width of the last convolution then says that there is none
        return _GROUP_SIZE
    size = lowest["mbstd"].state.get("group_size", _GROUP_SIZE)
    return _WHOLE_BATCH if size is None else int(size)


def _build(who: str, networks: Networks) -> tuple[GAN, dict[str, Tensor]]:
    """A GAN of the file's sizes with its weights, and the generator's average as a checkpoint holds it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of noise maps and draws that a file may lack
        generator = StyleGAN2Generator(**_generator_sizes(networks.average))
        discriminator = StyleGAN2Discriminator(**_discriminator_sizes(networks))
        adam = functools.partial(torch.optim.Adam, lr=2e-3, betas=(0.0, 0.99))
        module = GAN(generator, discriminator, NonSaturating(), adam, adam)
        _load(who, generator, networks.average)
        average = {f"generator.{name}": value.clone() for name, value in generator.state_dict().items()}
        _load(who, generator, networks.generator)
        _load(who, discriminator, networks.discriminator)
    return module, average


def _generator_sizes(weights: Weights) -> dict[str, int]:
    num_sizes = count(weights, "to_colours.{}.bias")
    style_dim, latent_dim = weights["mapping.layers.0.weight"].shape
    return {
        "image_size": 4 * 2 ** (num_sizes - 1),
        "channels": len(weights["to_colours.0.bias"]),
        "latent_dim": latent_dim,
        "style_dim": style_dim,
        "width": len(weights[f"convs.{2 * num_sizes - 2}.bias"]),
        "num_mapping_layers": count(weights, "mapping.layers.{}.weight"),
    }


def _discriminator_sizes(networks: Networks) -> dict[str, Any]:
    weights = networks.discriminator
    width, channels, *_ = weights["from_colours.weight"].shape
    last, shown, *_ = weights["conv.weight"].shape
    return {
        "image_size": 4 * 2 ** count(weights, "blocks.{}.conv1.weight"),
        "channels": channels,
        "width": width,
        "group_size": None if shown == last else networks.group_size,
    }


@torch.no_grad()
def _load(who: str, network: nn.Module, weights: Weights) -> None:
    own = network.state_dict()
    may_lack = {name for name in own if name == "w_avg" or name.endswith(".noise")}
    if different := (set(own) - may_lack) ^ (set(weights) - may_lack):
        raise ValueError(f"{who}: the networks differ in size from each other: {sorted(different)[0]} is in one alone.")
    for name, value in weights.items():
        if own[name].shape != value.shape:
            raise ValueError(
                f"{who}: {type(network).__name__} has {name} of shape {tuple(own[name].shape)}, the file "
                f"{tuple(value.shape)}. The channels must double with every halving of the size, up to 512."
            )
    network.load_state_dict({**own, **weights})
    if isinstance(network, StyleGAN2Generator) and "w_avg" not in weights:
        network.w_avg.copy_(network.mapping(torch.randn(_NUM_DRAWS, network.latent_dim)).mean(dim=0))
