"""Frechet distance, kernel distance, Inception score, precision and recall during training and at its end."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.seed import isolate_rng
from tqdm import tqdm
from typing_extensions import override

from lit_generative.callbacks.ema import averaged_weights, evaluated_weights
from lit_generative.callbacks.media import log_record
from lit_generative.metrics.evaluation import cached_features, collect_features, features_key
from lit_generative.metrics.feature_set import FeatureSet
from lit_generative.metrics.features import FeatureExtractor
from lit_generative.metrics.frechet import Frechet, bias_warning
from lit_generative.metrics.generative_metrics import new_collector
from lit_generative.metrics.inception_score import InceptionScore
from lit_generative.metrics.kernel import Kernel
from lit_generative.metrics.measures import Measure, compute_scores
from lit_generative.metrics.mode_coverage import ModeCoverage
from lit_generative.metrics.precision_recall import PrecisionRecall
from lit_generative.metrics.record import differences, score_record
from lit_generative.metrics.sources import DataModuleImages, ModelSamples
from lit_generative.training.averages import agreeing_on_buffers
from lit_generative.training.run import measures_now
from lit_generative.types import Split, SupportsAveraging, SupportsSampling, draws_from_images

Stage = Literal["val", "test"]


class FIDEvaluation(L.Callback):
    """Draws samples from the averaged weights and scores them against the data, without touching training.

    Sample ``i`` is a function of the seed and ``i``, and batches are dealt to the processes, so a score depends neither
    on their number nor on when it is taken; training's random numbers stay as they were. Real features are computed
    once and kept on disk. Scores are logged as ``val/fid`` (``test/fid`` while testing), with another network than
    Inception as ``val/fd_digits``, beside ``kid``, ``is``, ``precision``, ``recall``, ``density``, ``coverage`` and
    ``modes``: ``ModelCheckpoint`` and ``ReduceLROnPlateau`` can monitor them. The loggers get a record of all they
    were measured with. A model that draws from images, as in super-resolution, is shown those of the validation data
    (while testing of the test data), from first to last and again.

    With neither ``every_n_steps`` nor ``every_n_epochs`` every validation of a training run is one. ``litgen validate``
    and ``litgen test`` always evaluate.

    Args:
        extractor: Network whose features are compared; not part of the model or of its checkpoints.
        measures: What to compute; None for all that the extractor allows.
        num_samples: Samples drawn; a score depends on how many, so keep it.
        every_n_steps: Updates (``trainer.global_step``) between two evaluations.
        every_n_epochs: Epochs between two evaluations, at the validation of the epoch if there is one.
        split: Which examples to compare with; papers use those trained on.
        batch_size: Samples drawn at a time, in each process.
        seed: Seed of the samples.

    Raises:
        ValueError: If a number is out of its range, or both steps and epochs are counted.
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        measures: list[Measure] | None = None,
        num_samples: int = 10_000,
        every_n_steps: int | None = None,
        every_n_epochs: int | None = None,
        split: Split = "train",
        batch_size: int = 64,
        seed: int = 0,
    ) -> None:
        for name, value, least in (
            ("num_samples", num_samples, 2),
            ("every_n_steps", every_n_steps, 1),
            ("every_n_epochs", every_n_epochs, 1),
            ("batch_size", batch_size, 1),
        ):
            if value is not None and value < least:
                raise ValueError(f"FIDEvaluation: {name} must be at least {least}, got {value}.")
        if every_n_steps is not None and every_n_epochs is not None:
            raise ValueError("FIDEvaluation: every_n_steps and every_n_epochs are both set. Leave one of them out.")
        self.extractor = extractor
        self.measures = default_measures(extractor) if measures is None else measures
        new_collector(extractor, self.measures)  # refuses what the extractor cannot give now, not after training
        self.num_samples, self.every_n_steps, self.every_n_epochs = num_samples, every_n_steps, every_n_epochs
        self.split, self.batch_size, self.seed = split, batch_size, seed
        self.scores: dict[str, float] = {}
        self.record: dict[str, Any] = {}
        self._earlier: dict[str, Any] = {}
        self._scored_step = -1
        self._loaded_age: dict[str, int] = {}
        self._real: FeatureSet | None = None
        self._reference: dict[str, Any] = {}

    # ---- when

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if not isinstance(pl_module, SupportsSampling):
            raise TypeError(
                f"FIDEvaluation: {type(pl_module).__name__} has no sample() and num_classes to draw from. Leave the "
                "callback out."
            )
        self._real = None  # another data module may have come

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for split in [self.split, "val"] if draws_from_images(pl_module) else [self.split]:
            DataModuleImages(_data(trainer), split)  # refuses an empty split now
        if self.every_n_steps is None and self.every_n_epochs is None and not _validates(trainer):
            raise ValueError(
                "FIDEvaluation: scores come with validation, and this run has none. Set every_n_steps or "
                "every_n_epochs, or give the data a validation split (val_fraction)."
            )
        # Who monitors a score before the first evaluation, or after a resume, shall find it.
        saved = {name: torch.tensor(value) for name, value in self.scores.items()}
        trainer.callback_metrics.update(self._not_measured() | saved)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not measures_now(trainer, self.every_n_steps):
            return
        scores = self.evaluate(trainer, pl_module, "val")
        # Lightning hands a step's values on only every log_every_n_steps.
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in scores.items()})
        for logger in trainer.loggers:
            logger.log_metrics(scores, step=trainer.global_step - 1)

    @override
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        if trainer.state.fn == "fit" and not self._due_at_this_validation(trainer):
            if self._scored_step != trainer.global_step:
                # Or ModelCheckpoint would file these weights under an earlier score, and a plateau count it twice.
                trainer.callback_metrics.update(self._not_measured())
            return
        self._log(pl_module, self.evaluate(trainer, pl_module, "val"))

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.every_n_epochs is not None and not _validates(trainer) and self._due_at_this_epoch(trainer):
            self._log(pl_module, self.evaluate(trainer, pl_module, "val"))

    @override
    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._log(pl_module, self.evaluate(trainer, pl_module, "test"))

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.extractor.cpu()

    def _due_at_this_validation(self, trainer: L.Trainer) -> bool:
        return self.every_n_steps is None and self._due_at_this_epoch(trainer)

    def _due_at_this_epoch(self, trainer: L.Trainer) -> bool:
        return self.every_n_epochs is None or (trainer.current_epoch + 1) % self.every_n_epochs == 0

    def _not_measured(self) -> dict[str, torch.Tensor]:
        names = [f"val/{self._key(name)}" for measure in self.measures for name in measure.scores]
        return {name: torch.tensor(float("nan")) for name in names}

    # ---- how

    def evaluate(
        self, trainer: L.Trainer, pl_module: L.LightningModule, stage: Literal["val", "test"]
    ) -> dict[str, float]:
        """Score the weights that sampling uses now; every process must call it.

        Args:
            trainer: Its data module gives the real images.
            pl_module: Draws the samples.
            stage: In front of every name: ``val`` or ``test``.

        Returns:
            Scores by log key, alike in all processes. ``self.record`` says what they were measured with.

        Raises:
            ValueError: If a sample or an example is damaged.
        """
        began = time.monotonic()
        device = pl_module.device
        self.extractor.to(device)
        dry = trainer.fast_dev_run  # type: ignore[attr-defined]
        num = min(self.num_samples, self.batch_size) if dry else self.num_samples
        shown = DataModuleImages(_data(trainer), stage) if draws_from_images(pl_module) else None
        samples = ModelSamples(pl_module, num, self.seed, shown)
        with isolate_rng(), self._progress(trainer) as progress:
            real = self._real_features(trainer, device)
            modules = pl_module.sampling_modules if isinstance(pl_module, SupportsAveraging) else [""]
            with (
                averaged_weights(trainer),
                agreeing_on_buffers(pl_module, modules),
                trainer.precision_plugin.forward_context(),
            ):
                weights = evaluated_weights(trainer)
                sharded = isinstance(trainer.strategy, ModelParallelStrategy)
                fake = collect_features(
                    samples, self.extractor, self.measures, self.batch_size, device, progress, in_step=sharded
                )
        values = compute_scores(self.measures, real, fake)
        self.scores = {f"{stage}/{self._key(name)}": value for name, value in values.items()}
        subject = {**samples.record(), **weights, **self._age(trainer)}
        self.record = score_record(self.extractor, self.measures, self._reference, subject)
        self.record["subject"]["seconds"] = round(time.monotonic() - began, 3)
        self._scored_step = trainer.global_step
        self._say_what_changed(stage)
        log_record(trainer, f"{stage}/scores", {"metrics": self.scores, "record": self.record}, trainer.global_step)
        return self.scores

    def _age(self, trainer: L.Trainer) -> dict[str, int]:
        if trainer.state.fn != "fit" and self._loaded_age:  # which the trainer does not restore then
            return self._loaded_age
        return {"step": trainer.global_step, "epoch": trainer.current_epoch}

    def _key(self, name: str) -> str:
        return name.replace("fid", self.extractor.frechet_key) if name.startswith("fid") else name

    def _real_features(self, trainer: L.Trainer, device: torch.device) -> FeatureSet:
        if self._real is None:
            source = DataModuleImages(_data(trainer), self.split)
            self._reference = source.record()
            self._real = cached_features(
                features_key(self._reference, self.extractor, self.measures),
                lambda: collect_features(source, self.extractor, self.measures, self.batch_size, device),
            )
            if trainer.is_global_zero:
                self._warn_of_bias(self._real)
        return self._real

    def _warn_of_bias(self, real: FeatureSet) -> None:
        wanted = any(isinstance(measure, Frechet) for measure in self.measures)
        if wanted and (text := bias_warning(real.moments, self.num_samples)):
            warnings.warn(f"FIDEvaluation: {text}", stacklevel=2)

    def _say_what_changed(self, stage: Stage) -> None:
        earlier, self._earlier = self._earlier, {}
        if earlier and stage == "test":
            earlier["shown"] = self.record.get("shown")  # validation images while training, those of the test now
        if earlier and (found := differences(earlier, self.record)):
            warnings.warn(
                f"FIDEvaluation: scores from here on are not comparable with those before the resume: they differ in "
                f"{'; '.join(found)}.",
                stacklevel=2,
            )

    @contextlib.contextmanager
    def _progress(self, trainer: L.Trainer) -> Iterator[Callable[[int], None]]:
        shown = trainer.is_global_zero and trainer.progress_bar_callback is not None
        with tqdm(desc="evaluating", total=self.num_samples, unit=" samples", leave=False, disable=not shown) as bar:
            yield lambda done: bar.update(done) and None

    @staticmethod
    def _log(pl_module: L.LightningModule, scores: dict[str, float]) -> None:
        for name, value in scores.items():
            # Alike in all processes; Lightning wants to be told to share it.
            pl_module.log(name, torch.tensor(value, dtype=torch.float32), on_step=False, on_epoch=True, sync_dist=True)

    # ---- checkpoint

    @override
    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._loaded_age = {"step": checkpoint["global_step"], "epoch": checkpoint["epoch"]}

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"scores": self.scores, "record": self.record}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.scores, self._earlier = dict(state_dict["scores"]), dict(state_dict["record"])


def default_measures(extractor: FeatureExtractor) -> list[Measure]:
    """All measures that an extractor allows; two of them need class logits."""
    measures: list[Measure] = [Frechet(), Kernel(), PrecisionRecall()]
    return measures if extractor.num_classes is None else [*measures, InceptionScore(), ModeCoverage()]


def _data(trainer: L.Trainer) -> Any:
    return getattr(trainer, "datamodule", None)


def _validates(trainer: L.Trainer) -> bool:
    return bool(trainer.enable_validation) and sum(trainer.num_val_batches) > 0
