"""The base of all data modules: splits, loaders, and the position in the data that a checkpoint holds."""

from __future__ import annotations

import os
import warnings
from abc import ABC, abstractmethod
from typing import Any, cast

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from lit_generative.data.batches import BatchDataset, BatchKey, ResumableBatches
from lit_generative.data.splits import Splits, check_fraction
from lit_generative.types import Batch, Split


class ResumableDataModule(L.LightningDataModule, ABC):
    """Loaders that go on, after a resume, with exactly the batches that were not yet trained on.

    The order of the training data, and every augmentation, is a function of the global seed, the epoch, the batch and
    the rank; the number of workers does not matter. A checkpoint holds the epoch and the batch as the trainer counts
    them. Bit-exact resuming needs the same batch size, number of processes and seed; otherwise a warning is given and
    training goes on at about the same example.

    Args:
        batch_size: Training examples per batch and process.
        eval_batch_size: Examples per batch in validation, test and prediction; None for ``batch_size``.
        val_fraction: Part of the training examples to validate on, in ``[0, 1)``, where the data has no such split.
        split_seed: Seed of the splits. They do not depend on the global seed.
        drop_last: Leave out the incomplete last batch of a training epoch.
        num_workers: Processes that load; 0 loads in the training process.
        pin_memory: Copy batches to page-locked memory first.
        persistent_workers: Keep the workers from one epoch to the next.
        num_predict_samples: How many samples ``predict`` draws from a model.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        val_fraction: float = 0.1,
        split_seed: int = 0,
        drop_last: bool = True,
        num_workers: int = 0,
        pin_memory: bool = False,
        persistent_workers: bool = False,
        num_predict_samples: int = 64,
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.val_fraction = val_fraction
        self.split_seed = split_seed
        self.drop_last = drop_last
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.persistent_workers = persistent_workers
        self.num_predict_samples = num_predict_samples
        self._check_arguments()
        self._splits: Splits | None = None
        self._resume: dict[str, int] | None = None

    @property
    @abstractmethod
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one example: ``(C, H, W)``, or ``(2,)``."""

    @property
    @abstractmethod
    def num_classes(self) -> int | None:
        """How many classes the labels name; None if there are none."""

    @abstractmethod
    def load_splits(self) -> Splits:
        """Read the data; called once, in every process."""

    def augment(self, train: BatchDataset, seed: int) -> BatchDataset:  # noqa: ARG002
        """What training sees in place of ``train``; whatever is random in it is a function of ``seed`` and the key."""
        return train

    @property
    def splits(self) -> Splits:
        """Training, validation and test examples.

        Raises:
            ValueError: Before ``setup``.
        """
        if self._splits is None:
            raise ValueError(f"{self._name}: there is no data before setup(). Call it first; the Trainer does.")
        return self._splits

    @override
    def setup(self, stage: str | None = None) -> None:
        if self._splits is None:
            self._splits = self.load_splits()
        if stage in (None, "fit"):
            self._check_training()

    @override
    def train_dataloader(self) -> DataLoader[Batch]:
        epoch, start_batch = self._start()
        dataset = self.augment(self.splits.train, self._seed)
        sampler = ResumableBatches(
            dataset,
            self.batch_size,
            self._world_size,
            self._rank,
            shuffle_seed=self._seed,
            drop_last=self.drop_last,
            epoch=epoch,
            start_batch=start_batch,
        )
        return self._loader(dataset, sampler)

    @override
    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        return self._eval_loader(self.splits.val)

    @override
    def test_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        return self._eval_loader(self.splits.test)

    @override
    def predict_dataloader(self) -> DataLoader[Tensor]:
        """Indices of the samples to draw, ``(N,)`` int64; Lightning shares them out without repeats."""
        indices = cast("Dataset[Tensor]", range(self.num_predict_samples))
        return DataLoader(indices, batch_size=self.eval_batch_size)

    def num_examples(self, split: Split) -> int:
        """Number of examples of a split."""
        return len(getattr(self.splits, split))

    def examples(self, split: Split, indices: Tensor) -> Tensor:
        """Examples as they are stored and never augmented: uint8 ``(N, C, H, W)``, or points ``(N, 2)``.

        Args:
            split: Which part of the data.
            indices: Which of its examples, ``(N,)`` int64.
        """
        return self._batch(split, indices)["image"]

    def labels(self, split: Split, indices: Tensor) -> Tensor:
        """Class labels of the examples at ``indices``, ``(N,)`` int64, of a split: ``(N,)`` int64."""
        return self._batch(split, indices)["label"]

    def _batch(self, split: Split, indices: Tensor) -> Batch:
        dataset: BatchDataset = getattr(self.splits, split)
        return dataset[BatchKey(0, 0, 0, indices)]

    @override
    def state_dict(self) -> dict[str, int]:
        if self.trainer is None or self.trainer.state.fn != "fit":
            return {}
        epochs: Any = self.trainer.fit_loop.epoch_progress.current
        batches: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        epoch, batch = epochs.processed, 0
        # Between two epochs the batch counter still is that of the one that ended.
        if epochs.started > epochs.processed:
            batch = batches.processed
            if batch >= self.trainer.num_training_batches:
                epoch, batch = epoch + 1, 0
        return {"epoch": epoch, "batch": batch, **self._fingerprint()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Lightning calls this for validate and test too; a later fit must not start in the middle because of it.
        if self.trainer is None or self.trainer.state.fn == "fit":
            self._resume = state_dict
            # Lightning looks for a position in the loader. Ours is here, so its advice would be wrong.
            warnings.filterwarnings("ignore", message=".*and your dataloader is not resumable.*")

    def _start(self) -> tuple[int, int]:
        """Epoch and batch at which the next training loader starts."""
        resume, self._resume = self._resume, None
        if resume is None:
            return (0 if self.trainer is None else self.trainer.current_epoch), 0
        now = self._fingerprint()
        changed = [f"{name} {resume[name]} to {now[name]}" for name in now if resume[name] != now[name]]
        if changed:
            rank_zero_warn(
                f"{self._name}: this resume is not bit-exact, since the checkpoint was made with another "
                f"{'; '.join(changed)}. Training goes on at about the same example of epoch {resume['epoch']}."
            )
        num_seen = resume["batch"] * resume["batch_size"] * resume["world_size"]
        return resume["epoch"], num_seen // (self.batch_size * self._world_size)

    def _fingerprint(self) -> dict[str, int]:
        return {"batch_size": self.batch_size, "world_size": self._world_size, "seed": self._seed}

    def _eval_loader(self, dataset: BatchDataset) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        if len(dataset) == 0:
            return []
        sampler = ResumableBatches(dataset, self.eval_batch_size, self._world_size, self._rank, drop_last=False)
        return self._loader(dataset, sampler)

    def _loader(self, dataset: BatchDataset, sampler: ResumableBatches) -> DataLoader[Batch]:
        return DataLoader(
            dataset,
            batch_size=None,
            sampler=sampler,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            persistent_workers=self.persistent_workers,
        )

    def _check_arguments(self) -> None:
        for name in ("batch_size", "eval_batch_size", "num_predict_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{self._name}: {name} must be at least 1, got {getattr(self, name)}.")
        if self.num_workers < 0:
            raise ValueError(f"{self._name}: num_workers must be at least 0, got {self.num_workers}.")
        if self.persistent_workers and self.num_workers == 0:
            raise ValueError(
                f"{self._name}: persistent_workers needs num_workers of at least 1, got 0. Set one of the two."
            )
        check_fraction(self._name, "val_fraction", self.val_fraction)

    def _check_training(self) -> None:
        num, joined = len(self.splits.train), self.batch_size * self._world_size
        if num == 0:
            raise ValueError(f"{self._name}: there are no training examples left after the splits. Lower val_fraction.")
        if self.drop_last and num < joined:
            raise ValueError(
                f"{self._name}: a batch of all processes must not be larger than the training set, got batch_size "
                f"{self.batch_size} * {self._world_size} processes = {joined} for {num} examples. "
                "Lower batch_size, or set drop_last to false."
            )
        overfit_batches = getattr(self.trainer, "overfit_batches", 0)
        if overfit_batches > 0:
            raise ValueError(
                f"{self._name}: Trainer(overfit_batches) must be 0, got {overfit_batches}: it replaces "
                "the sampler. Use limit_train_batches."
            )

    @property
    def _seed(self) -> int:
        return int(os.environ.get("PL_GLOBAL_SEED", "0"))  # set by Lightning's seed_everything

    @property
    def _world_size(self) -> int:
        return 1 if self.trainer is None else self.trainer.world_size

    @property
    def _rank(self) -> int:
        return 0 if self.trainer is None else self.trainer.global_rank

    @property
    def _name(self) -> str:
        return type(self).__name__
