"""Figures of single examples, averaged over held-out data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor
from typing_extensions import override

from lit_generative.tensor_ops import generators_of


class ExampleEvaluation(L.Callback, ABC):
    """Logs figures of the test data, as ``test/<name>``: means over the examples.

    The noise that is drawn for an example depends on that example and ``seed`` alone, so the figures do not depend on
    the batch size, the number of processes, or the order of the data.

    Args:
        max_batches: Batches that are scored; None scores all. Each process takes so many.
        on_validation: Score the validation data too, as ``val/<name>``.
        seed: Seed of the draws.

    Raises:
        ValueError: If ``max_batches`` is below 1.
    """

    def __init__(self, max_batches: int | None = None, on_validation: bool = False, seed: int = 0) -> None:
        if max_batches is not None and max_batches < 1:
            raise ValueError(f"{type(self).__name__}: max_batches must be at least 1, got {max_batches}.")
        self.max_batches, self.on_validation, self.seed = max_batches, on_validation, seed

    @abstractmethod
    def figures(self, module: Any, x: Tensor, y: Tensor | None) -> dict[str, Tensor]:
        """Figures of each example by name, each ``(N,)``.

        Args:
            module: The model, in evaluation mode.
            x: Examples, ``(N, ...)``.
            y: Labels, ``(N,)``, if the model has classes.
        """

    def generators(self, x: Tensor) -> Sequence[torch.Generator]:
        """One for each of the examples ``(N, ...)``, the source of all randomness; at each call the same."""
        return generators_of(x, "density", self.seed)

    @override
    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if self.on_validation and not trainer.sanity_checking:
            self._score(trainer, pl_module, "val", batch, batch_idx)

    @override
    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        self._score(trainer, pl_module, "test", batch, batch_idx)

    def _score(self, trainer: L.Trainer, pl_module: Any, stage: str, batch: Any, batch_idx: int) -> None:
        if self.max_batches is not None and batch_idx >= self.max_batches:
            return
        x = batch["image"]
        y = None if pl_module.num_classes is None else batch["label"]
        with trainer.precision_plugin.forward_context():
            values = self.figures(pl_module, x, y)
        count = len(x) * trainer.world_size  # Lightning averages it over processes as a whole number
        for name, value in values.items():
            pl_module.log(
                f"{stage}/{name}", value.mean(), batch_size=count, sync_dist=True, on_step=False, on_epoch=True
            )
