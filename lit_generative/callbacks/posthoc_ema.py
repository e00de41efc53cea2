"""Averages of the weights whose length is chosen after training."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typing_extensions import override

from lit_generative.training.averages import LiveWeights, averaged_modules, check_strategy, images_in, replicas
from lit_generative.training.power_ema import Profile, combine, gamma_from_sigma_rel, live_share

FOLDER = "ema_snapshots"
SIGMA_RELS = (0.05, 0.10)


class PostHocEMA(L.Callback):
    """Keeps power-function averages and stores snapshots, of which ``litgen ema`` makes an average of any length.

    Snapshots are safetensors files in ``ema_snapshots/`` of the run's folder, written whole by the first process. It
    stands beside :class:`~lit_generative.callbacks.ema.EMA`, which evaluates during training.

    Source: Karras et al. 2024 (arXiv:2312.02696), sec. 3.1 and 3.2.

    Args:
        sigma_rels: Relative widths of the averages kept; two are enough, and each costs a copy of the weights.
        every_n_steps: Updates between two snapshots; the paper stores some 100 to 200 in a run.
        modules: Names of the sub-modules to average; None asks the module (its ``sampling_modules``).
        dtype: Of the snapshots; ``float16`` halves them and costs three digits.
        buffers: ``copy``: an average comes with the buffers of floating point (batch norm's statistics, a codebook)
            that the live network had at the last snapshot in it; ``average``: they are averaged like weights. Where
            processes differ, the first one's count. A codebook that is averaged is blurred.

    Raises:
        ValueError: If a width is out of range or named twice, ``every_n_steps`` is below 1, or a word is unknown.
    """

    def __init__(
        self,
        sigma_rels: tuple[float, ...] = SIGMA_RELS,
        every_n_steps: int = 1000,
        modules: list[str] | None = None,
        dtype: Literal["float32", "float16", "bfloat16"] = "float32",
        buffers: Literal["copy", "average"] = "copy",
    ) -> None:
        if not sigma_rels or len(set(sigma_rels)) < len(sigma_rels):
            raise ValueError(f"PostHocEMA: sigma_rels must be different numbers, got {sigma_rels}. Try 0.05 and 0.1.")
        if every_n_steps < 1:
            raise ValueError(f"PostHocEMA: every_n_steps must be at least 1, got {every_n_steps}.")
        if dtype not in ("float32", "float16", "bfloat16"):
            raise ValueError(f"PostHocEMA: dtype must be float32, float16 or bfloat16, got {dtype!r}.")
        if buffers not in ("copy", "average"):
            raise ValueError(f"PostHocEMA: buffers must be copy or average, got {buffers!r}.")
        self.sigma_rels = tuple(sigma_rels)
        self.every_n_steps = every_n_steps
        self.modules = modules
        self.dtype = dtype
        self.buffers = buffers
        self.updates = 0
        self.images = 0
        self._gammas = {str(sigma_rel): gamma_from_sigma_rel(sigma_rel) for sigma_rel in self.sigma_rels}
        self._pending = 0
        self._stepped = False
        self._names: list[str] = []
        self._folder = Path()
        self._live: LiveWeights | None = None
        self._averages: dict[str, dict[str, Tensor]] = {}
        self._lists: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
        self._copied: set[str] = set()
        self._are_copied: list[bool] = []

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        check_strategy("PostHocEMA", trainer)
        # Asked of all processes: Lightning broadcasts it, and only the first one writes.
        self._folder = Path(trainer.log_dir or trainer.default_root_dir) / FOLDER
        self._names = averaged_modules("PostHocEMA", pl_module, self.modules)

    @override
    @torch.no_grad()
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        live = LiveWeights(pl_module, self._names, buffers=True)
        for saved in self._averages.values():
            live.check("PostHocEMA", saved, "`modules`")
        if self._averages and set(self._averages) != set(self._gammas):
            raise ValueError(
                f"PostHocEMA: the checkpoint has the sigma_rels {list(self._averages)}, the config "
                f"{list(self._gammas)}. A power function cannot start late: use those of the checkpoint."
            )
        copied = self._copied_of(live)
        if self._averages and copied != self._copied:
            other = "average" if self.buffers == "copy" else "copy"
            raise ValueError(
                f"PostHocEMA: buffers is {self.buffers!r}, and was {other!r} in the checkpoint. Use buffers={other!r}: "
                "a power function cannot start late."
            )
        whole = self._live is None
        self._averages = {key: live.copies(self._averages.get(key), whole) for key in self._gammas}
        self._are_copied = [name in copied for name in live.tensors]
        self._lists = {key: _split(average.values(), self._are_copied) for key, average in self._averages.items()}
        self._live, self._copied = live, copied

    def _copied_of(self, live: LiveWeights) -> set[str]:
        """Names of the buffers that are copied."""
        if self.buffers == "average":
            return set()
        copied = {name for name, tensor in live.tensors.items() if not isinstance(tensor, nn.Parameter)}
        return copied | {alias for alias, name in live.aliases.items() if name in copied}

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
        self.updates += 1
        self.images, self._pending = self.images + self._pending, 0
        weights, buffers = _split(self._live.now(), self._are_copied)
        for key, gamma in self._gammas.items():
            averages, copies = self._lists[key]
            torch._foreach_lerp_(averages, weights, live_share(gamma, self.updates))
            if copies:
                torch._foreach_copy_(copies, buffers)
        if self.updates % self.every_n_steps == 0:
            for key, average in self._averages.items():
                self._write(key, self._live.whole(average))

    @rank_zero_only
    def _write(self, sigma_rel: str, average: Mapping[str, Tensor]) -> None:
        dtype = getattr(torch, self.dtype)
        # Each tensor its own memory: safetensors refuses tied weights.
        tensors = {name: value.to("cpu", dtype, copy=True).contiguous() for name, value in average.items()}
        target = self._folder / f"update_{self.updates:07d}_sigma_{sigma_rel}.safetensors"
        target.parent.mkdir(parents=True, exist_ok=True)
        hidden = target.with_name(f".{target.name}.tmp")  # a killed run's is overwritten: it resumes before this update
        try:
            save_file(tensors, hidden, {"sigma_rel": sigma_rel, "update": str(self.updates)})
            with hidden.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(hidden, target)
        except (OSError, SafetensorError) as error:
            raise OSError(f"PostHocEMA: {target} could not be written: {error}. Is the disk full?") from error
        finally:
            hidden.unlink(missing_ok=True)

    @override
    def state_dict(self) -> dict[str, Any]:
        whole: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict if self._live is None else self._live.whole
        averages = {key: whole(average) for key, average in self._averages.items()} if self.updates else {}
        copied = sorted(self._copied) if averages else []
        return {"updates": self.updates, "images": self.images, "averages": averages, "copied": copied}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.updates, self.images = state_dict["updates"], state_dict["images"]
        self._averages = {key: dict(average) for key, average in state_dict["averages"].items()}
        self._copied = set(state_dict.get("copied", ()))
        self._live = None


def _split(tensors: Iterable[Tensor], are_copied: Sequence[bool]) -> tuple[list[Tensor], list[Tensor]]:
    """Those that are averaged, and those that are copied."""
    averaged: list[Tensor] = []
    copied: list[Tensor] = []
    for tensor, is_copied in zip(tensors, are_copied, strict=True):
        (copied if is_copied else averaged).append(tensor)
    return averaged, copied


class Synthesis(NamedTuple):
    """An average put together after training."""

    weights: dict[str, Tensor]
    """Keyed as in the checkpoint's ``state_dict``; on the CPU."""
    update: int
    """The update at which it ends."""
    images: int
    """Images seen until then."""
    error: float
    """Norm of the difference between its profile and the one asked for, over the norm of the latter; 0 is exact."""


def synthesize(
    checkpoint: Mapping[str, Any], folder: str | os.PathLike[str], sigma_rel: float, update: int | None = None
) -> Synthesis:
    """Combine the stored averages of a run into one of another width.

    Buffers that were copied are those of the latest one stored: a mixture of several would be an average again.

    Args:
        checkpoint: The run's last checkpoint, as it was read: its averages count as one snapshot more.
        folder: The run's ``ema_snapshots``; later snapshots than the checkpoint are left out.
        sigma_rel: Relative width of the average.
        update: Update at which it ends; None for the checkpoint's.

    Raises:
        ValueError: If the run kept no averages, ``sigma_rel`` or ``update`` is out of range, or a file is damaged.
    """
    state = checkpoint.get("callbacks", {}).get("PostHocEMA")
    if state is None or not state["averages"]:
        raise ValueError("The checkpoint has no averages to combine: the run had no PostHocEMA callback.")
    last = state["updates"]
    end = last if update is None else update
    stored: dict[Profile, Path | dict[str, Tensor]] = {
        profile: path for profile, path in _snapshots(Path(folder)).items() if profile.update <= min(end, last)
    }
    if end == last:
        stored |= {Profile(gamma_from_sigma_rel(float(key)), last): value for key, value in state["averages"].items()}
    if not 1 <= end <= last or not stored:
        first = min((profile.update for profile in _snapshots(Path(folder))), default=last)
        raise ValueError(
            f"The run has averages of updates {min(first, last)} to {last}, got {end}. Choose one of those."
        )
    shares, error = combine(list(stored), Profile(gamma_from_sigma_rel(sigma_rel), end))
    latest, copied = max(profile.update for profile in stored), set(state.get("copied", ()))
    total: dict[str, Tensor] = {}
    for share, (profile, source) in zip(shares.tolist(), stored.items(), strict=True):
        if share:
            for name, value in (_read(source) if isinstance(source, Path) else source).items():
                if name not in copied:
                    total[name] = total.get(name, torch.zeros((), dtype=torch.float64)) + share * value.double()
                elif profile.update == latest:
                    total[name] = value
    weights = {name: value.to(checkpoint["state_dict"][name].dtype) for name, value in total.items()}
    return Synthesis(weights, end, round(state["images"] * end / last), error)


def _snapshots(folder: Path) -> dict[Profile, Path]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}. Remove it, and the others will do.") from error
        found[Profile(gamma_from_sigma_rel(float(metadata["sigma_rel"])), int(metadata["update"]))] = path
    return found


def _read(path: Path) -> dict[str, Tensor]:
    return load_file(path)
