"""Modes of a 2-D mixture that a model covers, during training."""

from __future__ import annotations

from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from typing_extensions import override

from lit_generative.callbacks.ema import averaged_weights
from lit_generative.metrics.mode_coverage import mixture_coverage
from lit_generative.tensor_ops import evaluating
from lit_generative.types import DescribesModes, SupportsSampling


class ModeCoverage(L.Callback):
    """Logs ``val/modes``, ``val/high_quality`` and ``val/reverse_kl`` of samples, at each validation and while testing.

    Samples come from the averaged weights where there are any; training's random numbers stay as they were. The counts
    are those of :func:`~lit_generative.metrics.mode_coverage.mixture_coverage`.

    Args:
        num_samples: Samples drawn; 2,500 in the literature.
        seed: Seed of their noise.

    Raises:
        ValueError: If ``num_samples`` is below 1.
    """

    def __init__(self, num_samples: int = 2500, seed: int = 0) -> None:
        if num_samples < 1:
            raise ValueError(f"ModeCoverage: num_samples must be at least 1, got {num_samples}.")
        self.num_samples, self.seed = num_samples, seed

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if not isinstance(pl_module, SupportsSampling):
            raise TypeError(f"ModeCoverage: {type(pl_module).__name__} has no sample() and num_classes to draw from.")
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, DescribesModes):
            raise TypeError(
                f"ModeCoverage: {type(data).__name__} has no `centers` and `std`, so its modes cannot be counted. Use "
                "FIDEvaluation for images."
            )

    @override
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._log(trainer, pl_module, "val")

    @override
    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._log(trainer, pl_module, "test")

    def _log(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        sampler = cast(SupportsSampling, pl_module)  # setup() made sure of both
        data = cast(DescribesModes, trainer.datamodule)  # type: ignore[attr-defined]
        with isolate_rng(), averaged_weights(trainer), evaluating(pl_module), torch.no_grad():
            generator = torch.Generator().manual_seed(self.seed)
            points = sampler.sample(self.num_samples, generator=generator).cpu()
        values: dict[str, Any] = mixture_coverage(points, data.centers, data.std)
        for name, value in values.items():
            pl_module.log(f"{stage}/{name}", torch.tensor(value, dtype=torch.float32), sync_dist=True)
