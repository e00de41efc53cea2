"""Exponential moving average of the weights that samples are drawn with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from typing_extensions import override

from lit_generative.types import SupportsAveraging

PROFILE = "ema"


class EMA(L.Callback):
    """Averages the sub-modules that sampling uses, counted in images, and evaluates with the average.

    The half-life is shortened to ``ramp_up * images seen`` early in training, so that the first average is not the
    untrained network (Karras et al. 2020, arXiv:2006.06676, app. "EMA ramp-up"). Buffers (batch norm's statistics)
    are not averaged: the average uses those of the live network. The checkpoint holds both kinds of weights.

    Args:
        half_life: Images after which a weight counts half.
        ramp_up: The half-life is at most this share of the images seen; 1 or more than the run has no effect late.
        modules: Names of the sub-modules to average; None asks the module (its ``sampling_modules``).

    Raises:
        ValueError: If ``half_life`` or ``ramp_up`` is not positive.
    """

    def __init__(self, half_life: float = 20_000, ramp_up: float = 0.05, modules: list[str] | None = None) -> None:
        if half_life <= 0 or ramp_up <= 0:
            raise ValueError(f"EMA: half_life and ramp_up must be positive, got {half_life} and {ramp_up}.")
        self.half_life = half_life
        self.ramp_up = ramp_up
        self.modules = modules
        self.images = 0
        self._pending = 0
        self._stepped = False
        self._swapped = False
        self._bound = False
        self._live: dict[str, nn.Parameter] = {}
        self._average: dict[str, Tensor] = {}
        self._raw: dict[str, Tensor] = {}
        self._ids: set[int] = set()

    # ---- updates

    @override
    @torch.no_grad()
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        names = self.modules
        if names is None:
            if not isinstance(pl_module, SupportsAveraging):
                raise ValueError(
                    f"EMA: {type(pl_module).__name__} does not say what to average. Name its sub-modules in `modules`."
                )
            names = pl_module.sampling_modules
        children = dict(pl_module.named_modules())
        if missing := [name for name in names if name not in children]:
            known = [name for name, _ in pl_module.named_children()]
            raise ValueError(f"EMA: {type(pl_module).__name__} has no sub-module {missing}. It has: {known}.")
        self._live = {f"{name}.{key}": p for name in names for key, p in children[name].named_parameters()}
        self._ids = {id(p) for p in self._live.values()}
        self._bound = False

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._bind()

    @torch.inference_mode(False)  # test hooks run in inference mode, and its tensors could not be trained on later
    @torch.no_grad()
    def _bind(self) -> None:
        """Put the averages where the weights are, which is known once the strategy has placed them."""
        if self._average and (unknown := set(self._average) ^ set(self._live)):
            raise ValueError(
                f"EMA: the checkpoint's average holds other weights than the model, for example {sorted(unknown)[0]}. "
                "Use the `modules` it was trained with."
            )
        source: Mapping[str, Tensor] = self._average or self._live
        self._average = {
            name: source[name].detach().to(p.device, _averaging_dtype(p.dtype), copy=True)
            for name, p in self._live.items()
        }
        self._bound = True

    @override
    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if not self._stepped:
            owned = (id(p) for group in optimizer.param_groups for p in group["params"])
            self._stepped = any(i in self._ids for i in owned)

    @override
    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._pending += _count(batch) * trainer.world_size
        if not self._stepped:  # gradients are being accumulated
            return
        self._stepped = False
        self.images += self._pending
        half_life = min(self.half_life, self.ramp_up * self.images)
        weight = 1 - 0.5 ** (self._pending / half_life)
        self._pending = 0
        averages = list(self._average.values())
        live = [p.detach().to(a.dtype) for p, a in zip(self._live.values(), averages, strict=True)]
        torch._foreach_lerp_(averages, live, weight)

    # ---- evaluation with the average

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the module's weights are the average; does nothing while there is none, or if they already are."""
        if self._swapped or self.images == 0:
            yield
            return
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, p in self._live.items():
            average = self._average[name]
            if average.dtype == p.dtype:
                p.data, average.data = average.data, p.data
            elif self._swapped:
                p.data = self._raw.pop(name)
            else:  # a float32 average of half-precision weights must not pass through them
                self._raw[name], p.data = p.data, average.to(p.dtype)
        self._swapped = not self._swapped

    def _enter(self) -> None:
        if self.images and not self._swapped:  # never validate a copy that was never updated
            if not self._bound:
                self._bind()
            self._exchange()

    def _leave(self) -> None:
        if self._swapped:
            self._exchange()

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._enter()

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._leave()

    @override
    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._enter()

    @override
    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._leave()

    @override
    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._enter()

    @override
    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._leave()

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._leave()

    # ---- checkpoint

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"images": self.images, "weights": {PROFILE: dict(self._average)} if self.images else {}}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.images = state_dict["images"]
        self._average = dict(state_dict["weights"].get(PROFILE, {}))
        self._swapped = self._bound = False


def averaged_weights(trainer: L.Trainer) -> contextlib.AbstractContextManager[None]:
    """The weights to sample with: the average if the trainer has an :class:`EMA`, else the live ones."""
    ema = next((c for c in trainer.callbacks if isinstance(c, EMA)), None)  # type: ignore[attr-defined]
    return contextlib.nullcontext() if ema is None else ema.averaged()


def ema_state(checkpoint: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """The averaged weights in a checkpoint, keyed as in its ``state_dict``; None if it has none."""
    for key, state in checkpoint.get("callbacks", {}).items():
        if key.partition("{")[0] == "EMA" and state["weights"]:
            return dict(state["weights"][PROFILE])
    return None


def _averaging_dtype(dtype: torch.dtype) -> torch.dtype:
    # One step moves a weight by less than bfloat16 can hold.
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _count(batch: Any) -> int:
    while not isinstance(batch, Tensor):
        batch = next(iter(batch.values())) if isinstance(batch, Mapping) else batch[0]
    return len(batch)
