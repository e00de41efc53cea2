"""How far a model under fine-tuning has gone from what it drew before."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from typing_extensions import override

from lit_generative.callbacks.prompt_evaluation import PromptEvaluation, unit_features
from lit_generative.metrics.features import FeatureExtractor


class PriorDrift(PromptEvaluation):
    """Logs ``val/prior_drift``: how much pictures of the class differ from those that the untuned model drew.

    The same noise is drawn from before training and at each measurement. The drift is the mean absolute difference of
    pixels in ``[0, 1]``: 0 before training, and for a model that draws something else altogether about what two of its
    pictures differ by. With an extractor, ``val/prior_feature_drift`` is 1 minus the cosine similarity of the features
    of each pair, mean over the pairs: it does not count a shift by a few pixels.

    The first pictures are kept in the checkpoint, so that a resumed run goes on comparing with the untuned model. To
    stop in time: ``EarlyStopping(monitor="val/prior_drift", mode="max", stopping_threshold=0.1, patience=1000000)``.

    Source: the drift that Ruiz et al. 2023, DreamBooth (arXiv:2208.12242), sec. 3.3, call language drift; the measure
    is this project's.

    Args:
        prompts: Texts without the subject's name: its class, and what else shall stay.
        num_samples: How many pictures are drawn, of all prompts together; as many are kept in the checkpoint.
        extractor: Network whose features are compared, too; not part of the model or of its checkpoints.
        every_n_steps: Updates between two measurements; None measures at each validation.
        guidance_scale: How much the prompts count; None for the model's own scale.
        num_steps: Steps of the sampler; None for the model's own number.
        batch_size: Pictures drawn at a time, in each process.
        seed: Seed of the pictures.

    Raises:
        ValueError: As :class:`~lit_generative.callbacks.prompt_evaluation.PromptEvaluation`; when training starts, if a
            checkpoint holds no pictures, or pictures of other settings.
        TypeError: If the module draws no pictures of prompts.
    """

    def __init__(
        self,
        prompts: list[str],
        num_samples: int = 8,
        extractor: FeatureExtractor | None = None,
        every_n_steps: int | None = None,
        guidance_scale: float | None = None,
        num_steps: int | None = None,
        batch_size: int = 4,
        seed: int = 0,
    ) -> None:
        super().__init__(prompts, num_samples, every_n_steps, guidance_scale, num_steps, batch_size, seed)
        self.extractor = extractor
        self.score_names = ("prior_drift",) if extractor is None else ("prior_drift", "prior_feature_drift")
        self._before: Tensor | None = None  # uint8 (num_samples, 3, H, W), in process 0; empty elsewhere
        self._drawn_with: dict[str, Any] = {}

    @property
    def settings(self) -> dict[str, Any]:
        """What the pictures depend on, beside the model."""
        return {
            "prompts": self.prompts,
            "num_samples": self.num_samples,
            "guidance_scale": self.options.guidance_scale,
            "num_steps": self.options.num_steps,
            "seed": self.seed,
        }

    @override
    def prepare(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._before is not None:
            self._check_settings()
            return
        if trainer.global_step > 0:
            raise ValueError(
                f"PriorDrift: there is nothing to compare with, as the model was trained for {trainer.global_step} "
                "updates without this callback. Start anew with it, or leave it out."
            )
        with isolate_rng():
            self._before = self.draw(trainer, pl_module)
        self._drawn_with = self.settings

    @override
    def unmeasured(self) -> dict[str, float]:
        # Not NaN, which EarlyStopping would stop at. Nothing has drifted before training.
        return self.scores or dict.fromkeys(self.score_names, 0.0)

    @override
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != "fit" and self._before is None:
            rank_zero_warn("PriorDrift: nothing is measured, as no checkpoint was loaded that holds earlier pictures.")
            return
        super().on_validation_epoch_end(trainer, pl_module)

    @override
    def score(self, trainer: L.Trainer, pictures: Tensor) -> dict[str, float]:
        before = self._before
        if before is None or before.shape != pictures.shape:
            shape = None if before is None else tuple(before.shape)
            raise ValueError(
                f"PriorDrift: pictures must have the shape of those before training, {shape}, got "
                f"{tuple(pictures.shape)}. Start anew, or draw at the size of before."
            )
        drift = (pictures.double() - before.double()).abs().mean() / 255
        scores = {"prior_drift": float(drift)}
        if self.extractor is not None:
            device = trainer.strategy.root_device
            now, then = (unit_features(self.extractor, x, device) for x in (pictures, before))
            scores["prior_feature_drift"] = float(1 - (now * then).sum(dim=1).mean())
        return scores

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.extractor is not None:
            self.extractor.cpu()

    # ---- checkpoint

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "before": self._before, "drawn_with": self._drawn_with}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._before, self._drawn_with = state_dict["before"], dict(state_dict["drawn_with"])

    def _check_settings(self) -> None:
        changed = [
            f"{key} {self._drawn_with.get(key)!r} and {value!r}"
            for key, value in self.settings.items()
            if self._drawn_with.get(key) != value
        ]
        if changed:
            raise ValueError(
                f"PriorDrift: the pictures in the checkpoint and those to come would differ in {'; '.join(changed)}. "
                "Give the settings of before."
            )
