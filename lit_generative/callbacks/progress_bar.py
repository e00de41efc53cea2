"""One progress bar for the whole run, in updates."""

from __future__ import annotations

import sys
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm
from typing_extensions import override


class RunProgressBar(ProgressBar):
    """Counts ``trainer.global_step`` to the end of the run and shows the losses; evaluation has a bar of its own.

    Lightning's bars count one epoch, which for a small data set is over in a moment and says nothing of the run.

    Args:
        seconds: Least time between two refreshes of a terminal; a log file gets one in ten seconds.
    """

    def __init__(self, seconds: float = 0.2) -> None:
        super().__init__()
        self.seconds = seconds if sys.stderr.isatty() else 10.0
        self._enabled = True
        self._bar: tqdm[Any] | None = None

    @override
    def disable(self) -> None:
        self._enabled = False

    @override
    def enable(self) -> None:
        self._enabled = True

    def _open(self, name: str, total: float, unit: str, start: int = 0) -> tqdm[Any]:
        return tqdm(
            desc=name,
            total=None if total == float("inf") else int(total),
            initial=start,
            unit=unit,
            mininterval=self.seconds,
            dynamic_ncols=True,
            disable=not self._enabled,
            file=sys.stderr,
        )

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        epochs = float("inf") if trainer.max_epochs in (None, -1) else trainer.max_epochs * trainer.num_training_batches
        total = min(epochs, trainer.max_steps if trainer.max_steps >= 0 else float("inf"))
        self._bar = self._open("training", total, " steps", trainer.global_step)

    @override
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if self._bar is None:
            return
        self._bar.update(trainer.global_step - self._bar.n)
        # Collecting the metrics costs as much as a small network's step, and they are new only when they are logged.
        every = max(1, trainer.log_every_n_steps)  # type: ignore[attr-defined]
        if (trainer.fit_loop.total_batch_idx + 1) % every == 0:
            self._bar.set_postfix(self.get_metrics(trainer, pl_module), refresh=False)

    @override
    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """What the bar shows: the losses a module marks for it, without the stage in front."""
        return {name.removeprefix("train/"): value for name, value in trainer.progress_bar_metrics.items()}

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)

    # ---- evaluation on its own; within training it is part of the one bar

    def _start(self, name: str, batches: list[int | float]) -> None:
        if self._bar is None:
            self._bar = self._open(name, sum(batches), " batches")

    @override
    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start("testing", trainer.num_test_batches)

    @override
    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start("sampling", trainer.num_predict_batches)

    @override
    def on_test_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if self._bar is not None:
            self._bar.update()

    @override
    def on_predict_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if self._bar is not None:
            self._bar.update()

    @override
    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.on_train_end(trainer, pl_module)

    @override
    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.on_train_end(trainer, pl_module)
