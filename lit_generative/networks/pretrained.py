"""Networks of diffusers: weights from a folder or the hub, and the architecture as a text that needs neither."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

_HUB_NAME = re.compile(r"\w[\w.-]*/[\w.-]+")


class Source(NamedTuple):
    """Where weights are."""

    pretrained: str
    """A folder as ``save_pretrained`` writes it, or the name of one on the hub."""
    subfolder: str | None = None
    """Of that folder, as in ``"vae"`` of a pipeline's."""
    revision: str | None = None
    """Commit, branch or tag on the hub; None for its main branch. A commit stays the same."""


def read_settings(who: str, model_class: Any, source: Source) -> dict[str, Any]:
    """What a network was built with.

    Args:
        who: Named in the message.
        model_class: Class of diffusers that it must be.
        source: Where it is.

    Returns:
        Every argument of the class, its default where the file has none.

    Raises:
        ValueError: If there is no such network, or it is of another class.
    """
    _check_place(who, source)
    try:
        config = model_class.load_config(source.pretrained, subfolder=source.subfolder, revision=source.revision)
    except (OSError, ValueError) as error:
        raise _not_loaded(who, source, error) from error
    found = config.get("_class_name")
    if found != model_class.__name__:
        raise ValueError(
            f"{who}: {_named(source)} must hold weights of {model_class.__name__}, but its config.json says {found}. "
            "In a pipeline's folder, subfolder chooses the network."
        )
    return _as_json(_completed(model_class, config))


def load_pretrained(who: str, model_class: Any, source: Source, **settings: Any) -> nn.Module:
    """A network with its weights, in float32 and training mode, from safetensors: pickled weights could run code.

    Args:
        who: Named in the message.
        model_class: Class of diffusers.
        source: Where the weights are.
        settings: Replace arguments that the network was built with.

    Raises:
        ValueError: If the weights cannot be read or do not fit.
    """
    _check_place(who, source)
    try:
        net, info = model_class.from_pretrained(
            source.pretrained,
            subfolder=source.subfolder,
            revision=source.revision,
            use_safetensors=True,
            torch_dtype=torch.float32,
            low_cpu_mem_usage=False,  # else it asks for accelerate
            output_loading_info=True,
            **settings,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise _not_loaded(who, source, error) from error
    # diffusers fills what a file lacks with random numbers and only warns.
    if wrong := sorted({*info["missing_keys"], *info["unexpected_keys"]}):
        raise ValueError(
            f"{who}: the weights in {_named(source)} are not those of its own config.json: {len(wrong)} are missing "
            f"or too many, {wrong[0]} among them. Save them anew with save_pretrained."
        )
    return net.train()  # diffusers gives it in evaluation mode, in which Lightning would leave it


def build_from_text(who: str, model_class: Any, text: str, **settings: Any) -> nn.Module:
    """A network with random weights, of the architecture that :func:`forget_source` wrote down.

    Args:
        who: Named in the message.
        model_class: Class of diffusers.
        text: A JSON object.
        settings: Replace arguments that it names.

    Raises:
        ValueError: If it is none, or does not describe such a network.
    """
    try:
        config = json.loads(text)
        if not isinstance(config, dict):  # from_config would take a text for a folder's or hub's name
            raise TypeError("it is no object")
        return model_class.from_config(config, **settings)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{who}: config must be a JSON object of {model_class.__name__}'s arguments, got {text!r}: {error}"
        ) from error


def settings_of(net: Any) -> dict[str, Any]:
    """The arguments that a network of diffusers was built with, as JSON has them: lists, no tuples."""
    return _as_json(_completed(type(net), net.config))


def forget_source(module: nn.Module, net: nn.Module) -> None:
    """Let a checkpoint rebuild ``module`` without the folder: its weights come from the checkpoint itself.

    Args:
        module: A :class:`~lit_generative.recipe.Recorded` network with the arguments ``pretrained``, ``subfolder``,
            ``revision`` and ``config``; a class derived from it may have others, and keeps its recipe.
        net: What it has loaded.
    """
    arguments: dict[str, Any] = module._recipe["init_args"]  # type: ignore[index, assignment]
    if {"pretrained", "subfolder", "revision", "config"} <= arguments.keys():
        arguments |= {"pretrained": None, "subfolder": None, "revision": None, "config": json.dumps(settings_of(net))}


def _completed(model_class: Any, config: Any) -> dict[str, Any]:
    parameters = list(inspect.signature(model_class.__init__).parameters.values())[1:]
    return {p.name: config.get(p.name, p.default) for p in parameters}


def _as_json(settings: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(settings))


def _named(source: Source) -> str:
    return f"{source.pretrained!r}" + (f" (subfolder {source.subfolder!r})" if source.subfolder else "")


def _check_place(who: str, source: Source) -> None:
    """A mistyped path must not be looked for on the hub."""
    folder = Path(source.pretrained)
    if (source.pretrained and folder.is_dir()) or (_HUB_NAME.fullmatch(source.pretrained) and not folder.exists()):
        return
    raise ValueError(
        f"{who}: there is no folder {source.pretrained!r}, and names on the hub read owner/name. Give a folder that "
        "holds config.json and diffusion_pytorch_model.safetensors."
    )


def _not_loaded(who: str, source: Source, error: Exception) -> ValueError:
    return ValueError(
        f"{who}: {_named(source)} could not be loaded: {str(error).splitlines()[0]} Give a folder that holds "
        "config.json and diffusion_pytorch_model.safetensors, or such a name on the hub, and subfolder if it is a "
        "pipeline's. Without a network only folders work, and pickled weights (.bin) are never read."
    )
