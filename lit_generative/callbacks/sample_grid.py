"""Pictures of samples during training, always of the same noise and labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from typing_extensions import override

from lit_generative.callbacks.ema import averaged_weights
from lit_generative.callbacks.media import log_image
from lit_generative.pictures import grid, save_png
from lit_generative.tensor_ops import sample_generators
from lit_generative.types import SupportsSampling, draws_from_images


class SampleGrid(L.Callback):
    """Draws a grid of samples every n updates or epochs, to ``samples/`` in the run's folder and to the loggers.

    Noise and labels are the same each time, so that the pictures show the same samples getting better. Training's own
    random numbers are untouched; samples come from the averaged weights where there are any.

    A model that draws from images, as in super-resolution, gets those of the first validation batch: each sample stands
    between what the model was shown, above, and the image itself, below. Before any validation there is no grid.

    Args:
        every_n_steps: Updates between two grids; None counts none.
        every_n_epochs: Epochs between two grids; None counts none. Set ``every_n_steps`` to None for epochs alone.
        num_samples: How many samples.
        columns: Samples in a row; for a model with classes, a column for each class reads best.
        seed: Seed of noise.

    Raises:
        ValueError: If a number is below 1, or neither steps nor epochs are counted.
    """

    def __init__(
        self,
        every_n_steps: int | None = 500,
        every_n_epochs: int | None = None,
        num_samples: int = 64,
        columns: int | None = None,
        seed: int = 0,
    ) -> None:
        if every_n_steps is None and every_n_epochs is None:
            raise ValueError("SampleGrid: needs every_n_steps or every_n_epochs, got neither. Set one of them.")
        counts = {"every_n_steps": every_n_steps, "every_n_epochs": every_n_epochs, "num_samples": num_samples}
        for name, count in counts.items():
            if count is not None and count < 1:
                raise ValueError(f"SampleGrid: {name} must be at least 1, got {count}.")
        self.every_n_steps = every_n_steps
        self.every_n_epochs = every_n_epochs
        self.num_samples = num_samples
        self.columns = columns
        self.seed = seed
        self._last_step = 0
        self._images: Tensor | None = None
        self._labels: Tensor | None = None
        self._folder = Path()

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # Asked of all processes: Lightning broadcasts it, and only the first one draws.
        self._folder = Path(trainer.log_dir or trainer.default_root_dir) / "samples"
        if not isinstance(pl_module, SupportsSampling):
            raise TypeError(f"SampleGrid: {type(pl_module).__name__} has no sample() and num_classes to draw from.")

    @override
    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if batch_idx == 0 and draws_from_images(pl_module):
            self._images = batch["image"][: self.num_samples]
            self._labels = None if pl_module.num_classes is None else batch["label"][: self.num_samples]

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0:
            self._draw(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.every_n_epochs is not None and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._draw(trainer, pl_module)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._draw(trainer, pl_module)

    def _draw(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step == self._last_step:  # drawn already, or nothing trained yet
            return
        if draws_from_images(pl_module) and self._images is None:
            rank_zero_warn(
                f"SampleGrid: {type(pl_module).__name__} draws from images, and there was no validation yet to take "
                "some from, so there is no grid. Let the trainer validate first: num_sanity_val_steps=1."
            )
            return
        self._last_step = trainer.global_step
        # Weights that are sharded over the processes draw with all of them at once.
        if not (trainer.is_global_zero or isinstance(trainer.strategy, ModelParallelStrategy)):
            return
        with isolate_rng(), averaged_weights(trainer), trainer.precision_plugin.forward_context():
            samples = self._samples(pl_module)
        if trainer.is_global_zero:
            self._show(trainer, grid(samples, self.columns))

    def _samples(self, module: Any) -> Tensor:
        if self._images is not None:
            x = self._images
            shown, samples = module.samples_of(x, self._labels, sample_generators(self.seed, len(x)))
            line = torch.full_like(x[:, :, :1], 64 / 127.5 - 1)  # as grid() draws them
            return torch.cat([shown.expand_as(x), line, samples, line, x], dim=2)
        sampler = cast(SupportsSampling, module)  # setup() made sure of it
        labels = None
        if sampler.num_classes is not None:
            labels = torch.arange(self.num_samples) % sampler.num_classes
        return sampler.sample(self.num_samples, labels, sample_generators(self.seed, self.num_samples))

    def _show(self, trainer: L.Trainer, picture: Tensor) -> None:
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            save_png(picture, self._folder / f"step_{trainer.global_step:07d}.png")
        log_image(trainer, "samples", picture, trainer.global_step)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"last_step": self._last_step}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._last_step = state_dict["last_step"]
