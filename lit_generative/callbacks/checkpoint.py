"""The newest state of a run, whole, at a batch's end: what ``--ckpt_path last`` resumes from bit for bit."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from typing_extensions import override


class Checkpoint(ModelCheckpoint):
    """Saves ``last.ckpt`` every n updates, at the end, and on Ctrl-C or SIGTERM; only ever between two batches.

    A checkpoint between a discriminator's and a generator's update, or at an epoch's end under ``max_steps``, would
    not resume exactly. To keep the best by a metric, add Lightning's ``ModelCheckpoint`` beside it.

    Args:
        every_n_steps: Updates (``trainer.global_step``) between two saves.
        keep_all: Also keep every save, as ``step_0000500.ckpt``.
        dirpath: Folder; None is ``checkpoints`` in the run's folder.

    Raises:
        ValueError: If ``every_n_steps`` is below 1.
    """

    def __init__(self, every_n_steps: int = 500, keep_all: bool = False, dirpath: str | None = None) -> None:
        if every_n_steps < 1:
            raise ValueError(f"Checkpoint: every_n_steps must be at least 1, got {every_n_steps}.")
        super().__init__(
            dirpath=dirpath,
            filename="step_{step:07d}",
            auto_insert_metric_name=False,
            every_n_train_steps=every_n_steps,
            save_top_k=-1 if keep_all else 0,
            save_last=True,
            enable_version_counter=False,
        )
        self.every_n_steps = every_n_steps
        self._signal: int | None = None
        self._handlers: dict[int, Any] = {}

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.fit_loop._should_accumulate():  # half of an update could not be resumed
            return
        signalled = self._any_process_was_signalled(trainer)
        stops = signalled or trainer.should_stop or self._is_last_batch(trainer)
        due = stops or trainer.global_step % self.every_n_steps == 0
        if due and trainer.global_step != self._last_global_step_saved:
            self._save(trainer)
        if signalled:
            number = self._signal or signal.SIGTERM
            rank_zero_info(
                f"Stopped by {signal.Signals(number).name} at step {trainer.global_step}; saved "
                f"{self.last_model_path}. Run the same command with --ckpt_path last to go on."
            )
            raise SystemExit(128 + number)  # Lightning closes loggers and workers on the way

    def _any_process_was_signalled(self, trainer: L.Trainer) -> bool:
        # A signal reaches the processes one at a time, and all of them must save after the same batch.
        signalled = self._signal is not None
        if trainer.world_size == 1:
            return signalled
        return trainer.strategy.reduce_boolean_decision(signalled, all=False)

    @staticmethod
    def _is_last_batch(trainer: L.Trainer) -> bool:
        if 0 <= trainer.max_steps <= trainer.global_step:
            return True
        progress = trainer.fit_loop.epoch_loop.batch_progress
        epochs = trainer.max_epochs if trainer.max_epochs is not None else -1
        return progress.is_last_batch and 0 <= epochs <= trainer.current_epoch + 1

    def _save(self, trainer: L.Trainer) -> None:
        if self._should_skip_saving_checkpoint(trainer):
            return
        candidates = self._monitor_candidates(trainer)
        self._save_topk_checkpoint(trainer, candidates)
        self._save_last_checkpoint(trainer, candidates)

    # ---- what ModelCheckpoint would do at other times

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pass

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pass

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step != self._last_global_step_saved:  # stopped within a validation
            self._save(trainer)
        self._restore_handlers()

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._restore_handlers()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass  # the best scores and files of another folder, which this callback does not keep

    # ---- signals

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._signal = None
        if threading.current_thread() is threading.main_thread() and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._handlers = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self._signal is not None:  # the second time means now
            raise KeyboardInterrupt
        self._signal = number
        self._say_that_it_stops()

    @staticmethod
    @rank_zero_only
    def _say_that_it_stops() -> None:
        # Straight to the terminal: a handler may have interrupted the logging module. An evaluation can be long.
        os.write(2, b"\nStopping: saves after this batch or evaluation. Once more stops at once, without saving.\n")

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}
