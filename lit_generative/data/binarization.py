"""Black and white images, drawn from grey ones."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from lit_generative.data.batches import BatchDataset, BatchKey, InMemoryExamples
from lit_generative.data.splits import Splits
from lit_generative.tensor_ops import derive_seed
from lit_generative.types import Batch

Binarization = Literal["static", "dynamic"]


class StaticBinarization(BatchDataset):
    """Each value becomes 255 with the probability of its grey level, else 0; the same at each look.

    Source: Salakhutdinov & Murray 2008, On the quantitative analysis of deep belief networks. The draws are not those
    of the file others have published.

    Args:
        dataset: Where the grey images come from, uint8.
        seed: Together with ``part`` and an image's index all that its draw depends on.
        part: Name of the split ("train", "val", "test"), so that the three are drawn independently.
    """

    def __init__(self, dataset: BatchDataset, seed: int, part: str) -> None:
        self.dataset, self.seed, self.part = dataset, seed, part

    @override
    def __len__(self) -> int:
        return len(self.dataset)

    @override
    def __getitem__(self, key: BatchKey) -> Batch:
        batch = self.dataset[key]
        draws, generator = torch.empty(batch["image"].shape, dtype=torch.uint8), torch.Generator()
        for draw, index in zip(draws, key.indices.tolist(), strict=True):
            generator.manual_seed(derive_seed("static binarization", self.seed, self.part, index))
            draw.random_(255, generator=generator)
        return {"image": _black_or_white(batch["image"], draws), "label": batch["label"]}

    def held(self) -> BatchDataset:
        """The same images in memory, if the grey ones are there; drawing costs some 10 us an image."""
        if not isinstance(self.dataset, InMemoryExamples):
            return self
        chunks = [self[BatchKey(0, 0, 0, indices)]["image"] for indices in torch.arange(len(self)).split(1024)]
        return InMemoryExamples(torch.cat(chunks), self.dataset.label)


class DynamicBinarization(BatchDataset):
    """Each value becomes 255 with the probability of its grey level, else 0; a function of the seed and the key alone.

    Source: Burda, Grosse & Salakhutdinov 2016 (arXiv:1509.00519).

    Args:
        dataset: Where the grey images come from, uint8.
        seed: Two runs with the same seed draw the same images.
    """

    def __init__(self, dataset: BatchDataset, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    @override
    def __len__(self) -> int:
        return len(self.dataset)

    @override
    def __getitem__(self, key: BatchKey) -> Batch:
        batch = self.dataset[key]
        seed = derive_seed("dynamic binarization", self.seed, key.epoch, key.batch, key.rank)
        draws = torch.empty(batch["image"].shape, dtype=torch.uint8)
        draws.random_(255, generator=torch.Generator().manual_seed(seed))
        return {"image": _black_or_white(batch["image"], draws), "label": batch["label"]}


def binarize_splits(splits: Splits, seed: int, hold_train: bool) -> Splits:
    """Binarize all splits statically.

    Args:
        splits: Grey images.
        seed: All that the draws depend on.
        hold_train: False leaves the training part a :class:`StaticBinarization`, whose ``dataset`` is the grey one.

    Returns:
        The splits; what lies in memory stays there.
    """
    train, val, test = (StaticBinarization(part, seed, name) for name, part in splits._asdict().items())
    return Splits(train.held() if hold_train else train, val.held(), test.held())


def _black_or_white(image: Tensor, draws: Tensor) -> Tensor:
    """255 where a draw from ``0..254`` is below the grey level, which it is with a probability of level / 255."""
    return (draws < image).to(torch.uint8).mul_(255)
