"""What callbacks share that draw pictures of prompts during training and measure something on them."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from lit_generative.callbacks.ema import averaged_weights
from lit_generative.metrics.features import FeatureExtractor
from lit_generative.metrics.processes import gather_rows, num_processes, on_first_process, process_index, raise_together
from lit_generative.metrics.sources import Quantizer
from lit_generative.tensor_ops import evaluating, sample_generators
from lit_generative.training.averages import agreeing_on_buffers
from lit_generative.training.run import measures_now
from lit_generative.types import PromptOptions, SupportsAveraging, SupportsPrompts

BATCH_SIZE = 64
"""Pictures whose features are computed at a time."""


class PromptEvaluation(L.Callback, ABC):
    """Draws pictures of prompts, always of the same noise, and logs scores of them.

    Picture ``i`` is one of prompt ``i % P`` and a function of the seed and ``i``, so a score depends neither on the
    number of processes, which share the drawing, nor on when it is taken. Training's own random numbers are untouched.
    Pictures come from the averaged weights where there are any. A subclass gives ``score_names`` and ``score``.

    Args:
        prompts: ``P`` texts.
        num_samples: How many pictures, of all prompts together.
        every_n_steps: Updates between two measurements; None measures at each validation.
        guidance_scale: How much the prompts count; None for the model's own scale.
        num_steps: Steps of the sampler; None for the model's own number.
        batch_size: Pictures drawn at a time, in each process.
        seed: Seed of the pictures.

    Raises:
        ValueError: If there is no prompt, there are more prompts than pictures, or a number is below 1; when training
            starts, if no measurement will ever be due.
        TypeError: If the module cannot draw from prompts, or draws texts.
    """

    score_names: tuple[str, ...]
    """Names of the scores."""

    def __init__(
        self,
        prompts: Sequence[str],
        num_samples: int,
        every_n_steps: int | None = None,
        guidance_scale: float | None = None,
        num_steps: int | None = None,
        batch_size: int = 4,
        seed: int = 0,
    ) -> None:
        self.name = type(self).__name__
        if isinstance(prompts, str) or not prompts:
            raise ValueError(f"{self.name}: prompts must be a list with at least one text, got {prompts!r}.")
        if num_samples < len(prompts):
            raise ValueError(f"{self.name}: num_samples must be at least 1 of each prompt, got {num_samples} in all.")
        counts = {"every_n_steps": every_n_steps, "num_steps": num_steps, "batch_size": batch_size}
        for key, count in counts.items():
            if count is not None and count < 1:
                raise ValueError(f"{self.name}: {key} must be at least 1, got {count}.")
        self.prompts, self.num_samples, self.every_n_steps = list(prompts), num_samples, every_n_steps
        self.options = PromptOptions(guidance_scale=guidance_scale, num_steps=num_steps)
        self.batch_size, self.seed = batch_size, seed
        self.scores: dict[str, float] = {}

    @abstractmethod
    def score(self, trainer: L.Trainer, pictures: Tensor) -> dict[str, float]:
        """Scores by name, in process 0 alone.

        Args:
            trainer: Its data module may be asked.
            pictures: uint8, ``(num_samples, 3, H, W)``, in the order of their numbers.
        """

    def prepare(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Called when training starts, in every process."""

    def unmeasured(self) -> dict[str, float]:
        """What is found under the scores' names before the first measurement, and at a validation without one."""
        return dict.fromkeys(self.score_names, float("nan"))

    # ---- when

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if not isinstance(pl_module, SupportsPrompts):
            raise TypeError(
                f"{self.name}: {type(pl_module).__name__} has no sample_prompts() to draw from. Leave the callback out."
            )

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        validates = bool(trainer.enable_validation) and sum(trainer.num_val_batches) > 0
        if self.every_n_steps is None and not validates:
            raise ValueError(
                f"{self.name}: it measures at each validation, and this run has none. Set every_n_steps, or give the "
                "data a validation split."
            )
        self.prepare(trainer, pl_module)
        # Who monitors a score before the first measurement, or after a resume, shall find it.
        _publish(trainer, self.scores or self.unmeasured())

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not measures_now(trainer, self.every_n_steps):
            return
        scores = self.measure(trainer, pl_module)
        _publish(trainer, scores)  # Lightning hands a step's values on only every log_every_n_steps
        for logger in trainer.loggers:
            logger.log_metrics({f"val/{name}": value for name, value in scores.items()}, step=trainer.global_step - 1)

    @override
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        if trainer.state.fn == "fit" and self.every_n_steps is not None:
            if trainer.global_step % self.every_n_steps != 0:
                _publish(trainer, self.unmeasured())
            return
        for name, value in self.measure(trainer, pl_module).items():
            # Alike in all processes; Lightning wants to be told to share it.
            score = torch.tensor(value, dtype=torch.float32)
            pl_module.log(f"val/{name}", score, on_step=False, on_epoch=True, sync_dist=True)

    # ---- how

    def measure(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, float]:
        """Draw and score with the weights that sampling uses now; every process must call it.

        Returns:
            Scores by name, alike in all processes.

        Raises:
            ValueError: If a picture is damaged.
        """
        with isolate_rng():
            pictures = self.draw(trainer, pl_module)
            self.scores = on_first_process(lambda: self.score(trainer, pictures))
        return self.scores

    def draw(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Tensor:
        """All pictures in process 0: uint8 ``(num_samples, 3, H, W)`` on the CPU, in the order of their numbers.

        Every process must call it, and takes every n-th batch. Elsewhere the result is empty.
        """
        sharded = isinstance(trainer.strategy, ModelParallelStrategy)
        quantize = Quantizer(type(pl_module).__name__)
        mine: list[Tensor] = []
        numbers: list[Tensor] = []
        step = self.batch_size * num_processes()
        with _as_sampled(trainer, pl_module), raise_together():
            for first in range(0, self.num_samples, step):
                start = first + process_index() * self.batch_size
                if start >= self.num_samples:  # fewer batches are left than processes
                    if sharded:  # a model of which each process holds a part draws with all of them at once
                        self._batch(pl_module, torch.tensor([0]), quantize)
                    break
                indices = torch.arange(start, min(start + self.batch_size, self.num_samples))
                mine.append(self._batch(pl_module, indices, quantize))
                numbers.append(indices)
        nothing = torch.zeros(0, 0, 0, 0, dtype=torch.uint8)
        pictures = gather_rows(torch.cat(mine) if mine else nothing)
        order = gather_rows(torch.cat(numbers) if numbers else torch.zeros(0, dtype=torch.int64))
        return pictures[order.argsort()]

    @torch.no_grad()
    def _batch(self, pl_module: Any, indices: Tensor, quantize: Quantizer) -> Tensor:
        numbers = indices.tolist()
        prompts = [self.prompts[i % len(self.prompts)] for i in numbers]
        generators = [g for i in numbers for g in sample_generators(self.seed, 1, start=i)]
        drawn = pl_module.sample_prompts(prompts, self.options, generators)
        if not isinstance(drawn, Tensor):
            raise TypeError(
                f"{self.name}: {type(pl_module).__name__} draws texts, not pictures. Leave the callback out."
            )
        return quantize(drawn, indices)

    # ---- checkpoint

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"scores": self.scores}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.scores = dict(state_dict["scores"])


def unit_features(extractor: FeatureExtractor, pictures: Tensor, device: torch.device) -> Tensor:
    """Features of length 1.

    Args:
        extractor: Comes to ``device`` and stays there.
        pictures: uint8, ``(N, 3, H, W)``.
        device: Where features are computed.

    Returns:
        ``(N, D)``, float64, on the CPU.
    """
    extractor.to(device).eval()
    with torch.inference_mode(), torch.autocast(device.type, enabled=False):
        parts = [extractor(part.to(device)).embedding.cpu() for part in pictures.split(BATCH_SIZE)]
    return F.normalize(torch.cat(parts).double(), dim=1)


@contextlib.contextmanager
def _as_sampled(trainer: L.Trainer, pl_module: L.LightningModule) -> Iterator[None]:
    """Inside, the module is what samples are drawn from: averaged, in evaluation mode, alike in all processes."""
    modules = pl_module.sampling_modules if isinstance(pl_module, SupportsAveraging) else [""]
    with (
        averaged_weights(trainer),
        agreeing_on_buffers(pl_module, modules),
        trainer.precision_plugin.forward_context(),
        evaluating(pl_module),
    ):
        yield


def _publish(trainer: L.Trainer, scores: dict[str, float]) -> None:
    trainer.callback_metrics.update({f"val/{name}": torch.tensor(value) for name, value in scores.items()})
