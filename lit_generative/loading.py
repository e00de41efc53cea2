"""Build a module from its checkpoint alone, without running code that a stranger's file may name."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import instantiate_module

from lit_generative.callbacks.ema import ema_state
from lit_generative.training.checkpoint_io import load_checkpoint
from lit_generative.training.module import GenerativeModule

TRUSTED = ("lit_generative", "torch", "lightning", "diffusers")
"""Packages whose classes a checkpoint may build."""
DOTTED_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


def load_module(
    path: str | os.PathLike[str], ema: bool | None = None, device: str = "cpu", trust: Iterable[str] = ()
) -> GenerativeModule:
    """Rebuild a trained module, ready to sample.

    Args:
        path: A checkpoint written by any of the families, or a folder of runs: its newest ``last.ckpt`` is taken.
        ema: Use the averaged weights; None uses them if there are any.
        device: Where to put it; ``auto`` takes an accelerator if there is one.
        trust: Packages beside :data:`TRUSTED` whose classes the checkpoint may build.

    Returns:
        The module in evaluation mode.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged or no checkpoint of ours, names a class of another package, or has no
            averaged weights though ``ema`` asks for them.
    """
    path = find_checkpoint(path)
    checkpoint = load_checkpoint(path)
    hparams = dict(checkpoint.get("hyper_parameters", {}))
    hparams.pop("_instantiator", None)
    if "_class_path" not in hparams:
        raise ValueError(f"{path} does not say which class it holds. It was not written by lit_generative.")
    _check_trust(path, hparams, (*TRUSTED, *trust))
    cls = _import(hparams["_class_path"])
    if not issubclass(cls, GenerativeModule):
        raise ValueError(f"{path} holds a {hparams['_class_path']}, which is no GenerativeModule and cannot sample.")
    module: GenerativeModule = instantiate_module(cls, hparams)
    state = checkpoint["state_dict"]
    averaged = ema_state(checkpoint)
    if ema and averaged is None:
        raise ValueError(f"{path} has no averaged weights: the run had no EMA callback. Leave --ema out.")
    module.load_state_dict(state if ema is False or averaged is None else {**state, **averaged})
    return module.eval().to(_device(device))


def find_checkpoint(path: str | os.PathLike[str]) -> Path:
    """The file itself, or the newest ``last.ckpt`` below a folder.

    Raises:
        FileNotFoundError: If the folder holds none.
    """
    if not Path(path).is_dir():
        return Path(path)
    newest = max(Path(path).rglob("last.ckpt"), key=lambda file: file.stat().st_mtime, default=None)
    if newest is None:
        raise FileNotFoundError(f"There is no last.ckpt below {path}. Name a checkpoint, or the folder of a run.")
    return newest


def class_paths(config: Any) -> Iterator[str]:
    """Every text in a config, at any depth, that may name a class: a parser imports a bare name, too."""
    if isinstance(config, str) and DOTTED_NAME.fullmatch(config):
        yield config
    elif isinstance(config, Mapping):
        for value in config.values():
            yield from class_paths(value)
    elif isinstance(config, list | tuple):
        for value in config:
            yield from class_paths(value)


def _check_trust(path: Any, hparams: Mapping[str, Any], trusted: Iterable[str]) -> None:
    packages = tuple(trusted)
    for name in class_paths(hparams):
        if name.partition(".")[0] not in packages:
            raise ValueError(
                f"{path} asks for the class {name}, and building it could run code. If you trust both the file and "
                f"the package, add --trust {name.partition('.')[0]}."
            )


def _import(path: str) -> type:
    package, _, name = path.rpartition(".")
    try:
        cls = getattr(importlib.import_module(package), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"The checkpoint holds a {path}, which this version does not have: {error}.") from error
    if not isinstance(cls, type):
        raise ValueError(f"{path} is not a class.")
    return cls


def _device(name: str) -> torch.device:
    if name != "auto":
        return torch.device(name)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator if accelerator is not None else torch.device("cpu")
