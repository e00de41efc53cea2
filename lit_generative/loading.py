"""Build a module from its checkpoint alone, without running code that a stranger's file may name."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from lightning.pytorch.cli import instantiate_module
from torch import Tensor, nn

from lit_generative.diffusion.module import DDPM
from lit_generative.recipe import Recorded
from lit_generative.tracebacks import causes, is_ours
from lit_generative.training.averages import ema_record, ema_state
from lit_generative.training.checkpoint_io import load_checkpoint
from lit_generative.training.module import GenerativeModule
from lit_generative.types import LatentCodec

TRUSTED = ("lit_generative", "torch", "lightning", "diffusers", "peft")
"""Packages whose classes a checkpoint may build."""


def load_module(
    path: str | os.PathLike[str], ema: bool | str | None = None, device: str = "cpu", trust: Iterable[str] = ()
) -> GenerativeModule:
    """Rebuild a trained module, ready to sample.

    Args:
        path: A checkpoint written by any of the families, or a folder of runs: its newest ``last.ckpt`` is taken.
        ema: Use the averaged weights, by name if there are several; None uses the first if there are any.
        device: Where to put it; ``auto`` takes an accelerator if there is one.
        trust: Packages beside :data:`TRUSTED` whose classes the checkpoint may build.

    Returns:
        The module in evaluation mode.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged or no checkpoint of ours, names a class of another package, or has no
            averaged weights, or not those, though ``ema`` asks for them.
    """
    path = find_checkpoint(path)
    checkpoint = load_checkpoint(path)
    hparams = dict(checkpoint.get("hyper_parameters", {}))
    hparams.pop("_instantiator", None)
    if "_class_path" not in hparams:
        raise ValueError(f"{path} does not say which class it holds. It was not written by lit_generative.")
    check_trust(path, hparams, trust)
    cls = _import(hparams["_class_path"])
    if not issubclass(cls, GenerativeModule):
        raise ValueError(f"{path} holds a {hparams['_class_path']}, which is no GenerativeModule and cannot sample.")
    module = _build(cls, hparams)
    state = checkpoint["state_dict"]
    averaged = ema_state(checkpoint, ema if isinstance(ema, str) else None)
    if ema and averaged is None:
        raise ValueError(f"{path} has no averaged weights: the run had no EMA callback. Leave --ema out.")
    module.load_state_dict(state if ema is False or averaged is None else {**state, **averaged})
    return module.eval().to(choose_device(device))


def _build(cls: type[GenerativeModule], hparams: dict[str, Any]) -> GenerativeModule:
    try:
        return instantiate_module(cls, hparams)
    except Exception as error:
        # jsonargparse wraps what a constructor raised in the whole config.
        cause = next((e for e in causes(error) if is_ours(e)), None)
        if cause is None:
            raise
        raise cause from None


def load_ema(path: str | os.PathLike[str], profile: str | None = None) -> dict[str, Tensor]:
    """Read the averaged weights of a checkpoint, without building its module and without running code in it.

    Args:
        path: A checkpoint, or a folder of runs: its newest ``last.ckpt`` is taken.
        profile: Name of the average; None takes the first.

    Returns:
        Tensors on the CPU, keyed as in the checkpoint's ``state_dict``; what was not averaged is not among them.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read, has no average, or not that one.
    """
    path = find_checkpoint(path)
    weights = ema_state(load_checkpoint(path), profile)
    if weights is None:
        raise ValueError(f"{path} has no averaged weights: the run had no EMA callback.")
    return weights


def checkpoint_record(path: str | os.PathLike[str], ema: bool | str | None = None) -> dict[str, Any]:
    """How old a checkpoint is and which of its weights :func:`load_module` takes, as plain data for a score's record.

    Args:
        path: The file.
        ema: As in :func:`load_module`.
    """
    checkpoint = load_checkpoint(path)
    weights = {"weights": "raw"} if ema is False else ema_record(checkpoint, ema if isinstance(ema, str) else None)
    return {**weights, "step": checkpoint["global_step"], "epoch": checkpoint["epoch"]}


class CheckpointNetwork(Recorded, nn.Module):
    """The network of a trained DDPM, to guide another (see :class:`lit_generative.diffusion.guidance.Autoguidance`).

    Args:
        checkpoint: The file. A checkpoint of what is guided names it as it stands here, so it must stay there.
        ema: As in :func:`load_module`.

    Attributes:
        checkpoint: The file, as it was named.
        network: The network, in evaluation mode.
        schedule: The noise levels that it was trained on.
        parameterization: What it predicts.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds another family, is a folder, or as :func:`load_module`.
    """

    def __init__(self, checkpoint: str, ema: bool | str | None = None) -> None:
        super().__init__()
        if Path(checkpoint).is_dir():
            raise ValueError(
                f"CheckpointNetwork: checkpoint must be a file, as the newest of a folder changes, got {checkpoint}."
            )
        module = load_part(self, checkpoint, ema)
        if not isinstance(module, DDPM):
            raise ValueError(
                f"CheckpointNetwork: {checkpoint} holds a {type(module).__name__}, which removes no noise. Give the "
                "checkpoint of a DDPM."
            )
        self.checkpoint = checkpoint
        self.network = module.network
        self.schedule = module.schedule
        self.parameterization = module.parameterization
        self.sample_shape = tuple(module.network.sample_shape)  # type: ignore[arg-type]
        self.num_classes = module.num_classes
        self.extra_channels = int(getattr(module.network, "extra_channels", 0))

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """As the network's own."""
        prediction: Tensor = self.network(x_t, t, y)
        return prediction


class CheckpointCodec(Recorded, nn.Module):
    """A trained autoencoder, on whose latents a DDPM is trained.

    Args:
        checkpoint: A checkpoint of a VAE or an AdversarialVAE, or a folder of runs: its newest ``last.ckpt`` is taken.
            Only training needs it: a checkpoint of the DDPM holds the autoencoder.
        ema: As in :func:`load_module`.

    Attributes:
        loaded: The autoencoder, in evaluation mode.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If what it holds has no latents, or as :func:`load_module`.
    """

    def __init__(self, checkpoint: str, ema: bool | str | None = None) -> None:
        super().__init__()
        self.loaded = load_part(self, checkpoint, ema)
        if not isinstance(self.loaded, LatentCodec):
            raise ValueError(
                f"CheckpointCodec: {checkpoint} holds a {type(self.loaded).__name__}, which has no latent_shape, "
                "posterior(x) and decode(z). Give the checkpoint of a VAE without flow, or of an AdversarialVAE."
            )


def load_part(part: nn.Module, checkpoint: str, ema: bool | str | None) -> GenerativeModule:
    """As :func:`load_module`, for ``part`` of another model, which the message of a missing file names."""
    try:
        return load_module(checkpoint, ema)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{type(part).__name__}: {error} The model needs it, looked for from {Path.cwd()}."
        ) from error


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


def check_trust(path: Any, hparams: Mapping[str, Any], trust: Iterable[str] = ()) -> None:
    """Refuse hyperparameters that could make a parser import a stranger's package.

    Classes must be of known packages. A text is allowed only where the class takes a text: a parser that expects a
    class reads a text as its name, as YAML, or as the name of a file of it.

    Args:
        path: The checkpoint, for the message.
        hparams: Its hyperparameters.
        trust: Packages beside :data:`TRUSTED`.

    Raises:
        ValueError: If a class or a text is refused; nothing was imported for it.
    """
    arguments = {key: value for key, value in hparams.items() if not key.startswith("_")}
    _check_spec(path, {"class_path": hparams["_class_path"], "init_args": arguments}, (*TRUSTED, *trust))


def _check_spec(path: Any, spec: Mapping[str, Any], trusted: tuple[str, ...]) -> None:
    name = str(spec["class_path"])
    package = name.partition(".")[0]
    if package not in trusted:
        raise ValueError(
            f"{path} asks for the class {name}, and building it could run code. If you trust both the file and the "
            f"package, add --trust {package}."
        )
    cls = _import(name)
    for key, value in {**(spec.get("init_args") or {}), **(spec.get("dict_kwargs") or {})}.items():
        _check_value(path, f"{name}'s {key}", value, _takes_text(cls, key), trusted)


def _check_value(path: Any, where: str, value: Any, text_allowed: bool, trusted: tuple[str, ...]) -> None:
    if isinstance(value, str) and not text_allowed:
        raise ValueError(f"{path} gives the text {value!r} as {where}, which takes no text: it could run code.")
    if isinstance(value, Mapping) and "class_path" in value:
        _check_spec(path, value, trusted)
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            _check_value(path, where, item, text_allowed, trusted)


def _takes_text(cls: type, argument: str) -> bool:
    for base in cls.__mro__:
        init = base.__dict__.get("__init__")
        if init is not None and argument in inspect.signature(init).parameters:
            try:  # a dataclass inherits fields whose types only the modules of their own classes know
                hint = get_type_hints(base if dataclasses.is_dataclass(base) else init).get(argument)
            except NameError:  # names that only type checkers import; a class that takes text is then refused it
                hint = None
            return _is_text(hint)
    return False


def _is_text(hint: Any) -> bool:
    """Whether values of this type may hold texts, which are then no classes' names."""
    if hint is str or get_origin(hint) is Literal or (isinstance(hint, type) and issubclass(hint, Enum)):
        return True
    parts = get_args(hint)
    return any(map(_is_text, parts[1:] if get_origin(hint) in (dict, Mapping) else parts))


def _import(path: str) -> type:
    package, _, name = path.rpartition(".")
    try:
        cls = getattr(importlib.import_module(package), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"The checkpoint holds a {path}, which this version does not have: {error}.") from error
    if not isinstance(cls, type):
        raise ValueError(f"{path} is not a class.")
    return cls


def choose_device(name: str) -> torch.device:
    """The device of that name; ``auto`` is an accelerator if there is one, else the CPU."""
    if name != "auto":
        return torch.device(name)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator if accelerator is not None else torch.device("cpu")
