"""Whether drawn pictures show the subject that a model is tuned to."""

from __future__ import annotations

import lightning as L
import torch
from torch import Tensor
from typing_extensions import override

from lit_generative.callbacks.prompt_evaluation import BATCH_SIZE, PromptEvaluation, unit_features
from lit_generative.metrics.features import FeatureExtractor
from lit_generative.metrics.sources import DataModuleImages


class SubjectSimilarity(PromptEvaluation):
    """Logs ``val/subject_similarity``: cosine similarity of drawn pictures and the subject's, mean over all pairs.

    It is in ``[-1, 1]``. With CLIP's image features it is the paper's CLIP-I, with DINO's its DINO: two quantities. The
    latter sees more of what makes a subject another than its class. A high one alone may mean that the model copies its
    training pictures, whatever the prompt.

    Source: Ruiz et al. 2023, DreamBooth (arXiv:2208.12242), sec. 4.1, subject fidelity; four pictures of each prompt.

    Args:
        extractor: Network whose features are compared; not part of the model or of its checkpoints.
        prompts: Texts with the subject's name, as in "a sks dog in the snow".
        num_samples: How many pictures are drawn, of all prompts together.
        every_n_steps: Updates between two measurements; None measures at each validation.
        guidance_scale: How much the prompts count; None for the model's own scale.
        num_steps: Steps of the sampler; None for the model's own number.
        batch_size: Pictures drawn at a time, in each process.
        seed: Seed of the pictures.

    Raises:
        ValueError: As :class:`~lit_generative.callbacks.prompt_evaluation.PromptEvaluation`; when training starts, if
            there are no training pictures.
        TypeError: If the module draws no pictures of prompts, or the data gives no single ones.
    """

    score_names = ("subject_similarity",)

    def __init__(
        self,
        extractor: FeatureExtractor,
        prompts: list[str],
        num_samples: int = 32,
        every_n_steps: int | None = None,
        guidance_scale: float | None = None,
        num_steps: int | None = None,
        batch_size: int = 4,
        seed: int = 0,
    ) -> None:
        super().__init__(prompts, num_samples, every_n_steps, guidance_scale, num_steps, batch_size, seed)
        self.extractor = extractor
        self._subject: Tensor | None = None  # mean of its features, in process 0

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._subject = None  # another data module may have come

    @override
    def prepare(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        DataModuleImages(getattr(trainer, "datamodule", None), "train")  # refuses now what it would refuse later

    @override
    def score(self, trainer: L.Trainer, pictures: Tensor) -> dict[str, float]:
        device = trainer.strategy.root_device
        if self._subject is None:
            source = DataModuleImages(getattr(trainer, "datamodule", None), "train")
            numbers = torch.arange(source.count).split(BATCH_SIZE)
            sums = [unit_features(self.extractor, source.pixels(part), device).sum(dim=0) for part in numbers]
            self._subject = torch.stack(sums).sum(dim=0) / source.count
        drawn = unit_features(self.extractor, pictures, device).mean(dim=0)
        return {"subject_similarity": float(drawn @ self._subject)}  # the mean over pairs, by linearity

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.extractor.cpu()
