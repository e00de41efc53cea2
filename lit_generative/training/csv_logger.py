"""A CSV logger that continues the file of the run it resumes."""

from __future__ import annotations

import csv
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger as LightningCSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import override


class CSVLogger(LightningCSVLogger):
    """Lightning's ``CSVLogger``, but a run that resumes in its own folder keeps the rows it has.

    Lightning's deletes ``metrics.csv`` there. Rows are flushed every 20 logged steps, so that a kill loses few.

    Args:
        save_dir: Folder of all runs.
        name: Folder of this config's runs in it.
        version: Folder of this run; None takes the next free number.
        prefix: Put before every key.
    """

    def __init__(
        self, save_dir: str, name: str | None = "lightning_logs", version: int | str | None = None, prefix: str = ""
    ) -> None:
        super().__init__(save_dir=save_dir, name=name, version=version, prefix=prefix, flush_logs_every_n_steps=20)
        self._continue_at: int | None = None

    @rank_zero_only
    def continue_from(self, step: int) -> None:
        """Drop the rows that the resumed run will write again.

        Args:
            step: ``trainer.global_step`` of the checkpoint; its rows are those of steps below.
        """
        self._continue_at = step

    @property
    @override
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            self._experiment = _ContinuingWriter(self.log_dir, self._continue_at)
        return self._experiment


class _ContinuingWriter(ExperimentWriter):
    def __init__(self, log_dir: str, continue_at: int | None) -> None:
        super().__init__(log_dir)
        if not self._fs.isfile(self.metrics_file_path):
            return
        with self._fs.open(self.metrics_file_path, "r", newline="") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
            self.metrics_keys = list(reader.fieldnames or [])
        if continue_at is None:
            return
        kept = [row for row in rows if (row["step"] or "").isdigit() and int(row["step"]) < continue_at]
        with self._fs.open(self.metrics_file_path, "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=self.metrics_keys)
            writer.writeheader()
            writer.writerows(kept)

    @override
    def _check_log_dir_exists(self) -> None:
        pass  # Lightning's deletes the file here
