"""AdaLoRA: adapters that begin with many ranks, and keep those that matter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from peft import AdaLoraConfig
from peft.tuners.adalora.layer import AdaLoraLayer, RankAllocator
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lit_generative.callbacks.mixed_precision import unscale_gradients
from lit_generative.training.run import log_now

_ADAPTER = "default"


class RankAllocation(L.Callback):
    """Takes ranks from AdaLoRA's adapters as training goes: PEFT's schedule and scores, for any of our modules.

    Each adapted weight begins with ``init_r`` singular values of ``peft.AdaLoraConfig``. After ``tinit`` updates those
    of least importance, over all weights of a network, are set to 0, every ``deltaT`` updates some more, until
    ``tfinal`` updates before ``total_step`` ``target_r`` of a weight are left on average; from there they stay. Both
    factors are kept near orthogonal by a penalty of weight ``orth_reg_weight``, whose gradient is added here: no logged
    loss holds it; put the callback before GradientClipping. ``train/mean_rank`` is logged. Sums and ranks are saved: a
    resumed run ends as one never stopped.

    Files of the adapter keep ``init_r`` ranks of each weight, zeros among them.

    Source: Zhang et al. 2023, AdaLoRA (arXiv:2303.10512), sec. 3; the scores and the cubic schedule are PEFT's.

    Raises:
        ValueError: When training starts, if the module has no AdaLoRA adapter, or a checkpoint is of other adapters.
        TypeError: If the module's optimizers take turns.
    """

    def __init__(self) -> None:
        self._allocators: list[_Allocator] = []
        self._saved: list[dict[str, Any]] | None = None
        self._done = 0

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        who = type(pl_module).__name__
        if not pl_module.automatic_optimization:
            raise TypeError(
                f"RankAllocation: {who}'s optimizers take turns, so no update has the gradients of all adapters. Use "
                "peft.LoraConfig."
            )
        self._allocators = [_Allocator(network, config) for network, config in _adaptive(pl_module)]
        if not self._allocators:
            raise ValueError(f"RankAllocation: no network of {who} has an adapter of peft.AdaLoraConfig. Leave it out.")
        for allocator in self._allocators:
            if 0 <= trainer.max_steps <= allocator.last:
                rank_zero_warn(
                    f"RankAllocation: AdaLoraConfig reaches target_r in update {allocator.last + 1}, total_step - "
                    f"tfinal + 1, but training ends after {trainer.max_steps}: more are left. Lower total_step."
                )

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._done = trainer.global_step
        saved, self._saved = self._saved, None
        if saved is None:
            return
        if len(saved) != len(self._allocators):
            raise ValueError(
                f"RankAllocation: the checkpoint holds the ranks of {len(saved)} networks, the module has "
                f"{len(self._allocators)} with AdaLoRA. Use the adapters of the run that is resumed."
            )
        for allocator, state in zip(self._allocators, saved, strict=True):
            allocator.load(state, pl_module.device)

    @override
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        unscale_gradients(trainer, optimizer)
        for allocator in self._allocators:
            allocator.add_penalty()

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._done:
            return  # gradients are still gathered
        for allocator in self._allocators:
            allocator.allocate(self._done)
        self._done = trainer.global_step
        if log_now(trainer):  # counting makes the host wait for the device
            ranks = [rank for allocator in self._allocators for rank in allocator.ranks()]
            pl_module.log("train/mean_rank", sum(ranks) / len(ranks))

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"allocators": [allocator.state() for allocator in self._allocators]}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict["allocators"]


class _Allocator:
    """One network's ranks."""

    def __init__(self, network: nn.Module, config: AdaLoraConfig) -> None:
        self.network, self.config = network, config
        self.inner = RankAllocator(network, config, _ADAPTER)
        self.last = (config.total_step or 0) - config.tfinal
        """The update, counted from 0, in which the last ranks are taken."""
        self.pattern: dict[str, list[bool]] | None = None

    def add_penalty(self) -> None:
        """Add the gradient of the mean distance of the factors' Gram matrices from the identity."""
        named = [(n, p) for n, p in self.network.named_parameters() if _factor(n)]
        if not named or not self.config.orth_reg_weight:
            return
        with torch.enable_grad():
            distances = [
                torch.linalg.matrix_norm(gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
                for gram in (p @ p.T if "lora_A" in n else p.T @ p for n, p in named)
            ]
            penalty = self.config.orth_reg_weight * torch.stack(distances).mean()
            gradients = torch.autograd.grad(penalty, [p for _, p in named])
        for (_, p), gradient in zip(named, gradients, strict=True):
            p.grad = gradient if p.grad is None else p.grad + gradient

    def allocate(self, step: int) -> None:
        """After update ``step``, counted from 0, while its gradients are there."""
        if step <= self.last:
            _, pattern = self.inner.update_and_allocate(self.network, step, force_mask=step == self.last)
            self.pattern = pattern or self.pattern
        elif self.pattern is not None:
            self.inner.mask_using_rank_pattern(self.network, self.pattern)

    def ranks(self) -> Iterator[int]:
        """Singular values of each weight that are not 0."""
        for layer in self.network.modules():
            if isinstance(layer, AdaLoraLayer):
                yield int(torch.count_nonzero(layer.lora_E[_ADAPTER]))

    def state(self) -> dict[str, Any]:
        """Plain data."""
        sums = {name: getattr(self.inner, name) for name in ("exp_avg_ipt", "exp_avg_unc")}
        return {"pattern": self.pattern, **sums}

    def load(self, state: dict[str, Any], device: torch.device) -> None:
        """What :meth:`state` gave."""
        expected = {n for n, _ in self.network.named_parameters() if "lora_" in n and _ADAPTER in n}
        found: dict[str, Tensor] = state["exp_avg_ipt"]
        if found and set(found) != expected:
            raise ValueError(
                "RankAllocation: the checkpoint holds the ranks of other weights than the adapter has, as "
                f"{min(set(found) ^ expected)}. Use the target_modules of the run that is resumed."
            )
        self.pattern = state["pattern"]
        for name in ("exp_avg_ipt", "exp_avg_unc"):
            setattr(self.inner, name, {key: value.to(device) for key, value in state[name].items()})
        self.inner.ipt = {key: torch.zeros_like(value) for key, value in self.inner.exp_avg_ipt.items()}


def _adaptive(module: nn.Module) -> Iterator[tuple[nn.Module, AdaLoraConfig]]:
    """Networks with adapters of AdaLoRA, and their configs, which PEFT leaves at what it adapts."""
    for network in module.modules():
        configs = network.__dict__.get("peft_config")
        if isinstance(configs, dict) and isinstance(configs.get(_ADAPTER), AdaLoraConfig):
            yield network, configs[_ADAPTER]


def _factor(name: str) -> bool:
    return name.endswith((f"lora_A.{_ADAPTER}", f"lora_B.{_ADAPTER}"))
