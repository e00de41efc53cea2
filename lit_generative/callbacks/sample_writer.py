"""Writes what ``litgen predict`` draws."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor
from typing_extensions import override

from lit_generative.pictures import save_png
from lit_generative.tensor_ops import to_uint8


class SampleWriter(BasePredictionWriter):
    """One file a sample, named by its index, so that processes never write the same one.

    Args:
        output_dir: Folder; None is ``predictions`` in the run's folder.
    """

    def __init__(self, output_dir: str | None = None) -> None:
        super().__init__(write_interval="batch")
        self.output_dir = output_dir
        self._folder = Path()

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # Asked of all processes at once: Lightning broadcasts it, and they need not have as many batches.
        run = trainer.log_dir or trainer.default_root_dir
        self._folder = Path(run) / "predictions" if self.output_dir is None else Path(self.output_dir)

    @override
    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        for index, sample in zip(batch.tolist(), prediction, strict=True):
            self._write(sample, self._folder / f"{index:06d}")

    @staticmethod
    def _write(sample: Tensor, stem: Path) -> None:
        if sample.ndim == 3:
            save_png(to_uint8(sample).permute(1, 2, 0), stem.with_suffix(".png"))
        else:
            torch.save(sample.cpu().clone(), stem.with_suffix(".pt"))
