"""What an average of the weights follows: chosen tensors of a module, whole or sharded, and copies of them."""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

import lightning as L
import torch
import torch.distributed
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from lit_generative.types import SupportsAveraging


def averaged_modules(who: str, module: nn.Module, names: Sequence[str] | None) -> list[str]:
    """The sub-modules to average: those named, or those the module names itself.

    Args:
        who: Who asks, for the message.
        module: The whole module.
        names: Dotted names; None asks the module (its ``sampling_modules``).

    Raises:
        ValueError: If the module does not say, or lacks one of them.
    """
    if names is None:
        if not isinstance(module, SupportsAveraging):
            raise ValueError(
                f"{who}: {type(module).__name__} does not say what to average. Name its sub-modules in `modules`."
            )
        names = module.sampling_modules
    children = dict(module.named_modules())
    if missing := [name for name in names if name not in children]:
        known = [name for name, _ in module.named_children()]
        raise ValueError(f"{who}: {type(module).__name__} has no sub-module {missing}. It has: {known}.")
    return list(names)


def check_strategy(who: str, trainer: L.Trainer) -> None:
    """Refuse strategies under which a parameter is not a tensor one can copy.

    Raises:
        ValueError: If the trainer's strategy is FSDP1 or DeepSpeed.
    """
    if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy):
        raise ValueError(
            f"{who}: {type(trainer.strategy).__name__} hides the weights in flat shards, so they cannot be averaged. "
            "Use ddp, or ModelParallelStrategy (FSDP2)."
        )


class LiveWeights:
    """Tensors of a module that averages follow.

    A tensor under two names (tied weights) is followed once and stored under both. Of a sharded one (FSDP2), each
    process follows its own part. Buffers that are integers, or not part of a ``state_dict``, are not followed.

    Args:
        module: The whole module, placed by its strategy.
        names: Dotted names of the sub-modules.
        buffers: Follow floating point buffers too.
        device: Where copies live: ``same`` as the live tensor, or another.
        only: Follow none but these tensors of theirs.
    """

    def __init__(
        self,
        module: nn.Module,
        names: Iterable[str],
        buffers: bool,
        device: str = "same",
        only: Container[str] | None = None,
    ) -> None:
        self._module = module
        reshard(module)
        first: dict[int, str] = {}
        self.tensors: dict[str, Tensor] = {}
        self.aliases: dict[str, str] = {}
        children = dict(module.named_modules())
        for name in names:
            for key, tensor in children[name].state_dict(keep_vars=True).items():
                path = f"{name}.{key}" if name else key
                averaged = isinstance(tensor, nn.Parameter) or (buffers and _is_float(tensor))
                if not averaged or (only is not None and path not in only):
                    continue
                if first.setdefault(id(tensor), path) == path:
                    self.tensors[path] = tensor
                else:
                    self.aliases[path] = first[id(tensor)]
        self._ids = set(first)
        self.parts = [local(tensor) for tensor in self.tensors.values()]
        self._kinds = [_kind(part, device) for part in self.parts]
        self._casts = self._kinds != [(part.device, part.dtype) for part in self.parts]

    def updated_by(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether the optimizer owns any of the tensors."""
        return any(id(p) in self._ids for group in optimizer.param_groups for p in group["params"])

    def check(self, who: str, saved: Iterable[str], arguments: str) -> None:
        """Refuse averages of other tensors.

        Args:
            who: Who asks, for the message.
            saved: Their names.
            arguments: What decides which tensors are averaged.

        Raises:
            ValueError: If a name is missing on either side.
        """
        if unknown := (set(saved) - set(self.aliases)) ^ set(self.tensors):
            raise ValueError(
                f"{who}: the checkpoint's average holds other weights than the model, for example "
                f"{sorted(unknown)[0]}. Use the {arguments} it was trained with."
            )

    def copies(self, source: Mapping[str, Tensor] | None = None, whole: bool = True) -> dict[str, Tensor]:
        """Copies by name, float32 at least: this process's parts of sharded tensors.

        Args:
            source: Values by name; None for those of now.
            whole: Whether the source's tensors are whole, or parts already.
        """
        result: dict[str, Tensor] = {}
        for (name, live), part, kind in zip(self.tensors.items(), self.parts, self._kinds, strict=True):
            value = part if source is None else source[name]
            if source is not None and whole and isinstance(live, DTensor):
                value = distribute_tensor(value.to(part.device), live.device_mesh, live.placements).to_local()
            result[name] = value.detach().to(*kind, copy=source is None)
        return result

    def now(self) -> list[Tensor]:
        """The live tensors, of the copies' dtype and on their device."""
        if not self._casts:
            return self.parts
        return [part.detach().to(*kind) for part, kind in zip(self.parts, self._kinds, strict=True)]

    def whole(self, copies: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies as whole tensors under every name; all processes must ask."""
        values = {name: _whole(copies[name], live) for name, live in self.tensors.items()}
        return values | {alias: values[name] for alias, name in self.aliases.items()}

    def exchange(self, copies: Mapping[str, Tensor], kept: dict[str, Tensor]) -> None:
        """Put the copies into the module, or, called again, the weights back.

        Args:
            copies: What :meth:`copies` gave.
            kept: Filled with what cannot change places with its copy, emptied the second time.
        """
        reshard(self._module)  # gathered weights would hide the exchange
        for (name, live), part in zip(self.tensors.items(), self.parts, strict=True):
            copy = copies[name]
            if name in kept:
                part.copy_(kept.pop(name))
            elif part is live and copy.dtype == live.dtype and copy.device == live.device:
                live.data, copy.data = copy.data, live.data
            else:  # a float32 average of half-precision weights must not pass through them; FSDP2 keeps its storage
                kept[name] = part.detach().clone()
                part.copy_(copy)


def agree_on_buffers(module: nn.Module, names: Iterable[str]) -> None:
    """Give every process the first one's floating point buffers, as DDP itself does before each forward pass."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        children = dict(module.named_modules())
        for buffer in (buffer for name in names for buffer in children[name].buffers() if _is_float(buffer)):
            torch.distributed.broadcast(local(buffer).detach(), src=0)


@contextlib.contextmanager
def agreeing_on_buffers(module: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Inside, :func:`agree_on_buffers` holds; afterwards each process has its own again. Every process must enter."""
    children, chosen = dict(module.named_modules()), list(names)
    own = [(b, b.clone()) for name in chosen for b in children[name].buffers() if _is_float(b)]
    agree_on_buffers(module, chosen)
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in own:
                buffer.copy_(value)


def reshard(module: nn.Module) -> None:
    """Undo what FSDP2 gathered for a forward pass that no backward pass followed."""
    for child in module.modules():
        if isinstance(child, FSDPModule):
            child.reshard()


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor: all of it unless it is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def images_in(batch: Any) -> int:
    """How many examples a batch holds, whatever its form."""
    while not isinstance(batch, Tensor):
        batch = next(iter(batch.values())) if isinstance(batch, Mapping) else batch[0]
    return len(batch)


def replicas(trainer: L.Trainer) -> int:
    """How many processes see different batches."""
    shares = getattr(trainer.strategy, "distributed_sampler_kwargs", None)
    return trainer.world_size if shares is None else int(shares["num_replicas"])


def _kind(part: Tensor, device: str) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of a copy: one step moves a weight by less than half precision can hold."""
    dtype = torch.float32 if part.dtype in (torch.bfloat16, torch.float16) else part.dtype
    return part.device if device == "same" else torch.device(device), dtype


def _is_float(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.is_floating_point()


def _whole(part: Tensor, live: Tensor) -> Tensor:
    if not isinstance(live, DTensor):
        return part
    placed = part.to(live.device_mesh.device_type)
    sharded = DTensor.from_local(
        placed, live.device_mesh, live.placements, run_check=False, shape=live.shape, stride=live.stride()
    )
    return sharded.full_tensor()


def ema_state(checkpoint: Mapping[str, Any], profile: str | None = None) -> dict[str, Tensor] | None:
    """The averaged weights in a checkpoint, keyed as in its ``state_dict``; None if it has none.

    Args:
        checkpoint: As it was read.
        profile: Name of the average; None takes the first.

    Raises:
        ValueError: If it has averages, but not that one.
    """
    state = _state_of_ema(checkpoint)
    return None if state is None else dict(state["weights"][_profile(state, profile)])


def ema_record(checkpoint: Mapping[str, Any], profile: str | None = None) -> dict[str, Any]:
    """Which weights :func:`ema_state` gives, as plain data, as ``evaluated_weights`` of the EMA callback says it.

    Args:
        checkpoint: As it was read.
        profile: Name of the average; None takes the first.

    Returns:
        ``{"weights": "raw"}``, or ``weights: "ema"`` with ``profile``, ``images`` (seen), and ``half_life`` (images),
        ``decay`` (per update) or ``sigma_rel`` if the checkpoint knows it.

    Raises:
        ValueError: If it has averages, but not that one.
    """
    state = _state_of_ema(checkpoint)
    if state is None:
        return {"weights": "raw"}
    name = _profile(state, profile)
    return {"weights": "ema", "profile": name, **state.get("settings", {}).get(name, {}), "images": state["images"]}


def _state_of_ema(checkpoint: Mapping[str, Any]) -> Mapping[str, Any] | None:
    states = checkpoint.get("callbacks", {}).items()
    return next((state for key, state in states if key.partition("{")[0] == "EMA" and state["weights"]), None)


def _profile(state: Mapping[str, Any], name: str | None) -> str:
    weights = state["weights"]
    if name is not None and name not in weights:
        raise ValueError(f"The checkpoint has no average {name!r}. It has: {list(weights)}.")
    return next(iter(weights)) if name is None else name
