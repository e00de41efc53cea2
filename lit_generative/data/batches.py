"""Whole batches by key: which examples a batch holds, and the data sets that fetch them at once.

A loader here is ``DataLoader(dataset, sampler=ResumableBatches(dataset, ...), batch_size=None)``: the sampler yields
one key per batch and the data set answers with the whole batch, so that there is no Python work per example.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler
from typing_extensions import override

from lit_generative.tensor_ops import derive_seed, expand_like
from lit_generative.types import Batch


class BatchKey(NamedTuple):
    """All that a data set needs to make a batch, and to draw its augmentation, in any process."""

    epoch: int
    batch: int
    """Index within the epoch, also after a resume in the middle."""
    rank: int
    indices: Tensor
    """Which examples, ``(N,)`` int64."""


class BatchDataset(Dataset[Batch], ABC):
    """A data set that answers a :class:`BatchKey` with the whole batch."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of examples, not of batches."""

    @abstractmethod
    def __getitem__(self, key: BatchKey) -> Batch:
        """The examples ``key.indices``, in this order."""


class InMemoryExamples(BatchDataset):
    """Examples that lie in memory.

    Args:
        image: uint8 images ``(N, C, H, W)``, or float32 points ``(N, 2)``.
        label: Class labels ``(N,)``, int64.

    Raises:
        ValueError: If there is not one label for each image.
    """

    def __init__(self, image: Tensor, label: Tensor) -> None:
        if len(image) != len(label):
            raise ValueError(f"InMemoryExamples: need one label for each image, got {len(image)} and {len(label)}.")
        self.image, self.label = image, label

    @override
    def __len__(self) -> int:
        return len(self.image)

    @override
    def __getitem__(self, key: BatchKey) -> Batch:
        return {"image": self.image.index_select(0, key.indices), "label": self.label.index_select(0, key.indices)}


class RandomFlip(BatchDataset):
    """Mirrors each image left to right with probability 1/2; a function of the seed and the key alone.

    Args:
        dataset: Where the images come from.
        seed: Two runs with the same seed flip the same images.
    """

    def __init__(self, dataset: BatchDataset, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    @override
    def __len__(self) -> int:
        return len(self.dataset)

    @override
    def __getitem__(self, key: BatchKey) -> Batch:
        batch = self.dataset[key]
        generator = torch.Generator().manual_seed(derive_seed("flip", self.seed, key.epoch, key.batch, key.rank))
        image = batch["image"]
        flipped = torch.rand(len(image), generator=generator) < 0.5
        return {"image": torch.where(expand_like(flipped, image), image.flip(-1), image), "label": batch["label"]}


class ResumableBatches(DistributedSampler[BatchKey]):
    """One :class:`BatchKey` per batch; shards itself over processes and can start in the middle of an epoch.

    The order is a function of the seed and the epoch. Batch ``b`` of all processes together covers
    ``order[b * B * W : (b + 1) * B * W]`` for batch size ``B`` and ``W`` processes, of which rank ``r`` takes the
    ``r``-th part: two processes with batch size ``B`` see the batches of one process with ``2 * B``.

    It is a ``DistributedSampler`` because Lightning then leaves it alone, and calls ``set_epoch`` before every epoch.

    Args:
        dataset: The examples.
        batch_size: Examples per batch and process.
        num_replicas: Number of processes ``W``.
        rank: Index of this process.
        shuffle_seed: Seed of the order; None for the order of the data set.
        drop_last: Leave out what is left after the last whole batch of all processes. If False it is split over them;
            where it has fewer examples than there are processes, it is filled up from the start of the order, so that
            no process waits for ever for another.
        epoch: Epoch of the first iteration; ``set_epoch`` changes it.
        start_batch: Where the first iteration starts; later ones start at 0. ``len`` stays that of the whole epoch.

    Raises:
        ValueError: If ``batch_size`` is below 1, or ``rank`` is not one of ``num_replicas``.
    """

    def __init__(
        self,
        dataset: BatchDataset,
        batch_size: int,
        num_replicas: int = 1,
        rank: int = 0,
        shuffle_seed: int | None = None,
        drop_last: bool = True,
        epoch: int = 0,
        start_batch: int = 0,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"ResumableBatches: batch_size must be at least 1, got {batch_size}.")
        shuffle = shuffle_seed is not None
        super().__init__(dataset, num_replicas, rank, shuffle=shuffle, seed=shuffle_seed or 0, drop_last=drop_last)
        self.batch_size, self.num_examples = batch_size, len(dataset)
        self.epoch, self._start_batch = epoch, start_batch

    @override
    def __len__(self) -> int:
        whole, rest = divmod(self.num_examples, self.batch_size * self.num_replicas)
        return whole + (rest > 0 and not self.drop_last)

    @override
    def __iter__(self) -> Iterator[BatchKey]:
        start, self._start_batch = self._start_batch, 0
        epoch = self.epoch
        order = self._order(epoch)
        for batch in range(start, len(self)):
            yield BatchKey(epoch, batch, self.rank, self._share(order, batch))

    def _order(self, epoch: int) -> Tensor:
        if not self.shuffle:
            return torch.arange(self.num_examples)
        generator = torch.Generator().manual_seed(derive_seed("order", self.seed, epoch))
        return torch.randperm(self.num_examples, generator=generator)

    def _share(self, order: Tensor, batch: int) -> Tensor:
        joined = order[batch * self.batch_size * self.num_replicas :][: self.batch_size * self.num_replicas]
        missing = self.num_replicas - len(joined)
        if missing > 0:
            joined = torch.cat([joined, order.repeat(-(-missing // len(order)))[:missing]])
        return joined.tensor_split(self.num_replicas)[self.rank]
