"""A module that draws pictures of prompts, and a run of it on two processes: ``python prompted.py FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lit_generative.callbacks.prior_drift import PriorDrift
from lit_generative.callbacks.subject_similarity import SubjectSimilarity
from lit_generative.data.toy_shapes import ToySubject
from lit_generative.tensor_ops import randn
from lit_generative.types import PromptOptions
from tests import tiny
from tests.metrics.tiny_features import TinyFeatures

PROMPTS = ["a circle", "a sks circle", "a photo of a circle"]


class Draws(L.LightningModule):
    """Pictures of one grey level and some noise; the level is trained to that of the data, and each letter adds to it.

    Args:
        careless: Draw from the global random numbers, too, in training and in sampling.
    """

    prompt_options = ("guidance_scale", "num_steps")
    sampling_modules = [""]  # noqa: RUF012

    def __init__(self, careless: bool = False) -> None:
        super().__init__()
        self.level = nn.Parameter(torch.zeros(3))
        self.dropout = nn.Dropout(0.5)
        self.careless = careless
        self.asked: list[tuple[list[str], PromptOptions | None]] = []
        self.rolls: list[float] = []

    def sample_prompts(self, prompts, options=None, generator=None) -> Tensor:
        assert len(generator) == len(prompts)
        assert not torch.is_grad_enabled()
        self.asked.append((list(prompts), options))
        if self.careless:
            torch.rand(())
        noise = 0.1 * randn((len(prompts), 3, 6, 5), generator)
        letters = torch.tensor([len(prompt) / 100 for prompt in prompts]).reshape(-1, 1, 1, 1)
        return self.dropout(self.level.reshape(1, 3, 1, 1) + noise + letters).tanh()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.rolls.append(float(torch.rand(())) if self.careless else 0.0)
        return (self.level.reshape(1, 3, 1, 1) - batch["image"]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def subject(**changes: Any) -> ToySubject:
    """Four green circles, five batches an epoch."""
    return ToySubject(**{"batch_size": 4, "repeats": 5} | changes)


def measured(folder: Path, devices: int) -> dict[str, Any]:
    """Scores and kept pictures of a run; the same steps on the same data, however many devices."""
    features = TinyFeatures()
    # Seven pictures are three batches: of two processes, one has one more than the other.
    options = {"num_samples": 7, "batch_size": 3}
    callbacks = [SubjectSimilarity(features, PROMPTS, **options), PriorDrift(PROMPTS, extractor=features, **options)]
    strategy = {"strategy": "ddp"} if devices > 1 else {}
    trainer = tiny.trainer(
        folder, devices=devices, max_steps=3, val_check_interval=1, limit_val_batches=1, callbacks=callbacks, **strategy
    )
    torch.manual_seed(0)
    trainer.fit(Draws(), subject(batch_size=4 // devices))
    similarity, drift = (callback.state_dict() for callback in callbacks)
    return {"scores": similarity["scores"] | drift["scores"], "before": drift["before"]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    result = measured(Path(sys.argv[1]), devices=2)
    rank = torch.distributed.get_rank()
    torch.save(result, Path(sys.argv[1]) / f"{rank}.pt")
