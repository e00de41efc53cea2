"""Adapters of PEFT: small trained parts within a frozen network.

Which adapter, and where, is said by a config class of PEFT: ``peft.LoraConfig`` (Hu et al. 2021, arXiv:2106.09685; with
``use_dora`` DoRA, Liu et al. 2024, arXiv:2402.09353), ``peft.LoHaConfig``, ``peft.LoKrConfig``, ``peft.IA3Config`` and
others; ``peft.AdaLoraConfig`` together with the callback ``RankAllocation``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peft import AdaLoraConfig, PeftConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from lit_generative.finetune.base_weights import LeavesBaseOut
from lit_generative.recipe import Recorded
from lit_generative.training.checks import unknown_name

_PREFIX = "base_model.model."


def inject(who: str, network: nn.Module, config: PeftConfig) -> PeftConfig:
    """Put an adapter into a network, in place; nothing but the adapter is trained then.

    Args:
        who: Named in messages.
        network: Its layers are wrapped where ``config.target_modules`` names them: by the ends of their names, by a
            pattern (a text), or by ``all-linear``.
        config: Which adapter; not changed.

    Returns:
        The config as used.

    Raises:
        ValueError: If the network has an adapter, or the config names no layer, or ones that take no adapter.
        TypeError: If the config is of prompt, prefix or p-tuning, which change no layer.
    """
    if config.is_prompt_learning:
        raise TypeError(
            f"{who}: {type(config).__name__} adds words to a language model, and no adapter to layers. Give a "
            "LoraConfig, or use CausalLM."
        )
    if next(adapter_layers(network), None) is not None:
        raise ValueError(f"{who}: the {type(network).__name__} has an adapter already. Merge it first.")
    config = copy.deepcopy(config)
    if not config.target_modules:
        raise ValueError(
            f"{who}: {type(config).__name__} must say which layers of the {type(network).__name__} to adapt. Give "
            f"target_modules, as in [{', '.join(_layer_kinds(network)[:4])}]."
        )
    if config.target_modules == "all-linear" and not isinstance(network, PreTrainedModel):  # those PEFT knows itself
        config.target_modules = [name for name, part in network.named_modules() if isinstance(part, nn.Linear)]
    _check_targets(who, network, config)
    try:
        inject_adapter_in_model(config, network)
    except ValueError as error:
        raise ValueError(f"{who}: {type(config).__name__} does not fit: {str(error).splitlines()[0]}") from error
    if isinstance(config, AdaLoraConfig):
        network.needed_callback = "lit_generative.callbacks.rank_allocation.RankAllocation"  # type: ignore[assignment]
    return config


def adapter_layers(network: nn.Module) -> Iterator[tuple[str, Any]]:
    """Names and modules of the layers that have an adapter."""
    return ((name, part) for name, part in network.named_modules() if isinstance(part, BaseTunerLayer))


def merge(network: nn.Module) -> None:
    """Add each adapter to the weights of its layer, in place, where it costs no time; :func:`unmerge` takes it back."""
    for _, layer in adapter_layers(network):
        layer.merge()


def unmerge(network: nn.Module) -> None:
    """Take the adapters out of the weights again, exactly up to rounding."""
    for _, layer in adapter_layers(network):
        layer.unmerge()


def merged(network: nn.Module) -> nn.Module:
    """A copy without adapters whose layers hold their effect: names and shapes are those of before.

    Also what ``modules_to_save`` and ``trainable_token_indices`` trained whole is in its place.
    """
    network = copy.deepcopy(network)
    for name, part in list(network.named_modules()):
        if isinstance(part, AuxiliaryTrainingWrapper):
            _replace(network, name, part.unload_and_optionally_merge_module(True, False, None))
    merge(network)
    for name, layer in list(adapter_layers(network)):
        _replace(network, name, layer.get_base_layer())
    return network


def save_adapter(network: nn.Module, config: PeftConfig, folder: Path) -> None:
    """Write the adapter alone, as ``PeftModel.from_pretrained(network, folder)`` reads it.

    Args:
        network: With the adapter.
        config: As :func:`inject` returned it.
        folder: Gets ``adapter_config.json`` and ``adapter_model.safetensors``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(network)  # type: ignore[arg-type]
    save_file(
        {f"{_PREFIX}{key}": value.detach().cpu().contiguous() for key, value in state.items()},
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    saved = copy.deepcopy(config)
    saved.inference_mode = True
    saved.save_pretrained(str(folder))


class Adapted(Recorded, LeavesBaseOut):
    """A trained network with an adapter, in place of the network: of a GAN, a VAE or a DDPM.

    A checkpoint holds the adapter alone, and names where ``network`` came from, which must stay there.

    Args:
        network: The network, as :class:`lit_generative.loading.CheckpointPart` gives it.
        adapter: A config of PEFT; ``target_modules`` names layers of the network.

    Attributes:
        network: The network with its adapter.
        adapter: The config as used.

    Raises:
        ValueError: As :func:`inject`.
        TypeError: As :func:`inject`.
    """

    def __init__(self, network: nn.Module, adapter: PeftConfig) -> None:
        super().__init__()
        source: dict[str, Any] | None = getattr(network, "source", None)
        if source is not None:  # a checkpoint names the file, as it holds no weights of it
            self._recipe["init_args"]["network"] = source
        self.network: nn.Module = getattr(network, "loaded", network)
        self.adapter = inject("Adapted", self.network, adapter)
        self.leave_base_out(type(self.network).__name__ if source is None else str(source["init_args"]["checkpoint"]))

    def __getattr__(self, name: str) -> Any:
        """What consumers ask of the network, as its ``sample_shape``."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "network":
                raise
            return getattr(self.network, name)

    def forward(self, *args: Any) -> Any:
        """As the network's own."""
        return self.network(*args)


def _replace(network: nn.Module, name: str, part: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(network.get_submodule(parent), last, part)


def _layer_kinds(network: nn.Module) -> list[str]:
    """Last names of linear and convolutional layers, the most frequent first."""
    counts: dict[str, int] = {}
    for name, part in network.named_modules():
        if isinstance(part, nn.Linear | nn.Conv2d) and name:
            last = name.rpartition(".")[2]
            key = name if last.isdigit() else last
            counts[key] = counts.get(key, 0) + 1
    return sorted(counts, key=lambda key: -counts[key])


def _check_targets(who: str, network: nn.Module, config: PeftConfig) -> None:
    targets = config.target_modules
    if isinstance(targets, str):
        return  # a pattern; PEFT says so if it names nothing
    names = [name for name, _ in network.named_modules() if name]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise unknown_name(who, f"target_modules name no layer of the {type(network).__name__}:", target, names)
