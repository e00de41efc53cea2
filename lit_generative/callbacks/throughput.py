"""How fast a run trains, and with how many images an update is made."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
from typing_extensions import override


class Throughput(L.Callback):
    """Logs ``train/images_per_second`` and ``train/effective_batch`` at every ``log_every_n_steps``-th update.

    Images per second is the mean since the last such update over all processes, by the wall clock: loading data and
    other callbacks are part of it, validation and the writing of checkpoints are not. A GPU runs behind the clock by
    the few batches it has queued, and is not waited for; over the window that averages out. The first batch of a run,
    resumed or not, is left out: it builds caches and starts workers.

    The effective batch is what one update sees: the loader's batch x processes x accumulated batches.
    """

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._warm = False
        self._images = 0
        self._seconds = 0.0
        self._since: float | None = None

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._forget()

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._since is None:
            self._since = time.perf_counter()

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        images = _num_images(batch)
        if not self._warm:
            self._warm, self._since = True, time.perf_counter()
            return
        self._images += images
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every == 0 or trainer.global_step % every or trainer.fit_loop._should_accumulate():
            return
        self._pause()
        rate = self._images * trainer.world_size / self._seconds
        pl_module.log("train/images_per_second", rate)
        pl_module.log("train/effective_batch", float(images * trainer.world_size * trainer.accumulate_grad_batches))
        self._images, self._seconds, self._since = 0, 0.0, time.perf_counter()

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._pause()

    @override
    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._pause()

    def _pause(self) -> None:
        """Stop the clock; the next batch starts it."""
        if self._since is not None:
            self._seconds += time.perf_counter() - self._since
            self._since = None


def _num_images(batch: Any) -> int:
    if not isinstance(batch, dict) or "image" not in batch:
        raise TypeError(
            f"Throughput: counts batch['image'], but a batch is a {type(batch).__name__} without it. Leave it out."
        )
    return len(batch["image"])
