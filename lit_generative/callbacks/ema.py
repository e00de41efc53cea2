"""Exponential moving averages of the weights that samples are drawn with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import override

from lit_generative.training.averages import (
    LiveWeights,
    agree_on_buffers,
    averaged_modules,
    check_strategy,
    images_in,
    replicas,
)

PROFILE = "ema"
FIRST = "first"
RAW = "raw"
HALF_LIFE = 20_000


class EMA(L.Callback):
    """Averages the sub-modules that sampling uses, and evaluates with the average.

    A plain number makes one profile, ``ema``; a dictionary makes several at once, by name. The half-life is shortened
    to ``ramp_up * images seen`` early in training, so that the first average is not the untrained network (Karras et
    al. 2020, arXiv:2006.06676, app. "EMA ramp-up"). The checkpoint holds the raw weights and, in this callback's
    state, all profiles. Weights of half precision have averages of single precision.

    On resume, a profile that the checkpoint lacks starts from the weights of that moment, and one that the config
    lacks is dropped; both are said. Evaluating a checkpoint uses the profiles in it, whatever the config has.

    Args:
        half_life: Images after which a weight counts half; 20000 if neither it nor ``decay`` is given.
        ramp_up: The half-life, or that of ``decay``, is at most this share of the images seen; None for no warm-up.
        modules: Names of the sub-modules to average; None asks the module (its ``sampling_modules``).
        decay: Factor of the average at each update, as papers state it, in place of ``half_life``.
        buffers: ``copy``: evaluate with the live network's buffers (batch norm's statistics), as StyleGAN does;
            ``average``: average those of floating point like weights. Where processes differ, the first one's count.
        evaluate: Profile that validation, test, prediction and sampling use; ``first`` is the first one there is;
            None uses the raw weights.
        device: ``cpu`` keeps the averages in main memory: slower, and no memory of the accelerator.
        every_n_steps: Updates (``trainer.global_step``) from one of the average to the next, which then counts all
            their images: a pass over all weights costs 3 % of a step on eight small images.

    Raises:
        ValueError: If a number is out of range, both kinds of number are given, or a name is unknown.
    """

    def __init__(
        self,
        half_life: float | dict[str, float] | None = None,
        ramp_up: float | None = 0.05,
        modules: list[str] | None = None,
        decay: float | dict[str, float] | None = None,
        buffers: Literal["copy", "average"] = "copy",
        evaluate: str | None = FIRST,
        device: Literal["same", "cpu"] = "same",
        every_n_steps: int = 1,
    ) -> None:
        if half_life is not None and decay is not None:
            raise ValueError(f"EMA: got half_life={half_life} and decay={decay}. Give one of them.")
        self.unit = "half_life" if decay is None else "decay"
        given = decay if decay is not None else HALF_LIFE if half_life is None else half_life
        self.profiles = dict(given) if isinstance(given, Mapping) else {PROFILE: given}
        self.ramp_up = ramp_up
        self.modules = modules
        self.buffers = buffers
        self.evaluate = evaluate
        self.device = device
        self.every_n_steps = every_n_steps
        self._check()
        self.images = 0
        self._pending = 0
        self._stepped = False
        self._bound = False
        self._names: list[str] = []
        self._live: LiveWeights | None = None
        self._averages: dict[str, dict[str, Tensor]] = {}
        self._lists: dict[str, list[Tensor]] = {}
        self._current: str | None = None
        self._kept: dict[str, Tensor] = {}

    def _check(self) -> None:
        values = self.profiles.values()
        if self.ramp_up is not None and self.ramp_up <= 0:
            raise ValueError(f"EMA: ramp_up must be positive, got {self.ramp_up}. None turns it off.")
        if self.unit == "half_life" and not all(value > 0 for value in values):
            raise ValueError(f"EMA: half_life must be positive, got {self.profiles}. It is a number of images.")
        if self.unit == "decay" and not all(0 < value < 1 for value in values):
            raise ValueError(f"EMA: decay must lie between 0 and 1, got {self.profiles}. Papers use 0.999 or so.")
        if self.every_n_steps < 1:
            raise ValueError(f"EMA: every_n_steps must be at least 1, got {self.every_n_steps}.")
        if not self.profiles or {FIRST, RAW} & set(self.profiles):
            raise ValueError(f"EMA: needs a profile, not named first or raw, got {list(self.profiles)}. Rename it.")
        for name, choices in (("buffers", ("copy", "average")), ("device", ("same", "cpu"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"EMA: {name} must be one of {choices}, got {getattr(self, name)!r}.")

    # ---- updates

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        check_strategy("EMA", trainer)
        if stage == "fit":
            if self.evaluate not in (None, FIRST, *self.profiles):
                raise ValueError(f"EMA: evaluate={self.evaluate!r} is none of the profiles {list(self.profiles)}.")
            if any(getattr(c, "save_weights_only", False) for c in trainer.callbacks):  # type: ignore[attr-defined]
                raise ValueError(
                    "EMA: a checkpoint callback has save_weights_only=True, and its files would hold the raw weights "
                    "alone. Leave save_weights_only out."
                )
        self._names = averaged_modules("EMA", pl_module, self.modules)
        self._bound = False

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._bind(pl_module, fitting=True)

    @torch.inference_mode(False)  # test hooks run in inference mode, and its tensors could not be trained on later
    @torch.no_grad()
    def _bind(self, pl_module: L.LightningModule, fitting: bool) -> None:
        """Put the averages where the weights are, which is known once the strategy has placed them."""
        if fitting or not self._averages:
            live = LiveWeights(pl_module, self._names, self.buffers == "average", self.device)
        else:  # the checkpoint says what it averaged, and how
            saved = next(iter(self._averages.values()))
            live = LiveWeights(pl_module, [""], buffers=True, device=self.device, only=saved)
        for average in self._averages.values():
            live.check("EMA", average, "`modules` and `buffers`")
        profiles = list(self.profiles if fitting else self._averages)
        if self._averages and set(profiles) != set(self._averages):
            rank_zero_info(
                f"EMA: the checkpoint has the averages {list(self._averages)}, the config {profiles}. Those it lacks "
                "start from the weights of now; those the config lacks are dropped."
            )
        whole = self._live is None
        self._averages = {name: live.copies(self._averages.get(name), whole) for name in profiles}
        self._lists = {name: list(average.values()) for name, average in self._averages.items()}
        self._live = live
        self._bound = True

    @override
    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if not self._stepped and self._live is not None:
            self._stepped = self._live.updated_by(optimizer)

    @override
    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._pending += images_in(batch) * replicas(trainer)
        if not self._stepped or self._live is None:  # gradients are being accumulated
            return
        self._stepped = False
        if trainer.global_step % self.every_n_steps:
            return
        self.images += self._pending
        for name, averages in self._lists.items():
            torch._foreach_lerp_(averages, self._live.now(), self._share(self.profiles[name]))
        self._pending = 0

    def _share(self, value: float) -> float:
        """The live weights' share of the new average."""
        share = 1 - value**self.every_n_steps if self.unit == "decay" else 1 - 0.5 ** (self._pending / value)
        if self.ramp_up is not None:
            share = max(share, 1 - 0.5 ** (self._pending / (self.ramp_up * self.images)))
        return share

    # ---- evaluation with the average

    @contextlib.contextmanager
    def averaged(self, profile: str | None = None) -> Iterator[None]:
        """Inside, the module's weights are an average, or the raw ones while it was never updated.

        Args:
            profile: Its name; ``raw`` for the raw weights, None for what ``evaluate`` says.

        Raises:
            ValueError: If there is no such profile.
        """
        outer = self._current
        self._switch(self._chosen(profile))
        try:
            yield
        finally:
            self._switch(outer)

    def _chosen(self, profile: str | None) -> str | None:
        name = self.evaluate if profile is None else profile
        if name in (None, RAW) or self.images == 0 or not self._averages:  # never use a copy that was never updated
            return None
        if name not in self._averages and name != FIRST:
            raise ValueError(f"EMA: there is no profile {name!r}. There are: {list(self._averages)}.")
        return next(iter(self._averages)) if name == FIRST else name

    @torch.inference_mode(False)
    @torch.no_grad()
    def _switch(self, profile: str | None) -> None:
        if profile == self._current or self._live is None:
            return
        for name in (self._current, profile):
            if name is not None:
                self._live.exchange(self._averages[name], self._kept)
        self._current = profile

    def _prepare(self, trainer: L.Trainer) -> None:
        if not self._bound and self._averages:
            self._bind(trainer.lightning_module, fitting=trainer.state.fn == TrainerFn.FITTING)

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        profile = self._chosen(None)
        if profile is None:
            return
        self._prepare(trainer)
        self._switch(profile)
        agree_on_buffers(pl_module, self._names)

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._switch(None)

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._switch(None)

    # ---- checkpoint

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._current is not None:
            raise RuntimeError("EMA: the module holds averaged weights now. Save before or after the evaluation.")
        whole = (lambda average: dict(average)) if self._live is None else self._live.whole
        weights = {name: whole(average) for name, average in self._averages.items()} if self.images else {}
        settings = {name: {self.unit: value} for name, value in self.profiles.items()}
        return {"images": self.images, "pending": self._pending, "weights": weights, "settings": settings}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._switch(None)
        self.images, self._pending = state_dict["images"], state_dict.get("pending", 0)
        self._averages = {name: dict(weights) for name, weights in state_dict["weights"].items()}
        self._live, self._bound = None, False


def averaged_weights(trainer: L.Trainer, profile: str | None = None) -> contextlib.AbstractContextManager[None]:
    """The weights to sample with: an average if the trainer has an :class:`EMA`, else the live ones.

    Args:
        trainer: Whose callbacks are looked at.
        profile: An average's name; ``raw`` for the raw weights; None for what evaluation uses.
    """
    if (ema := _callback(trainer)) is None:
        return contextlib.nullcontext()
    ema._prepare(trainer)
    return ema.averaged(profile)


def evaluated_weights(trainer: L.Trainer) -> dict[str, Any]:
    """Which weights :func:`averaged_weights` gives now, as plain data.

    Returns:
        ``{"weights": "raw"}``, or ``weights: "ema"`` with ``profile``, ``images`` (seen) and ``half_life`` (images) or
        ``decay`` (per update), whichever the callback was given; neither for a profile that only the checkpoint knows.
    """
    ema = _callback(trainer)
    profile = None if ema is None else ema._chosen(None)
    if ema is None or profile is None:
        return {"weights": RAW}
    setting = {ema.unit: ema.profiles[profile]} if profile in ema.profiles else {}
    return {"weights": "ema", "profile": profile, **setting, "images": ema.images}


def _callback(trainer: L.Trainer) -> EMA | None:
    return next((c for c in trainer.callbacks if isinstance(c, EMA)), None)  # type: ignore[attr-defined]
