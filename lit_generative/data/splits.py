"""Splits that depend on nothing but their seed: not on the machine, the global seed or the version of torch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lit_generative.data.batches import BatchDataset
from lit_generative.tensor_ops import derive_seed


class Splits(NamedTuple):
    """The three parts of a data set; ``val`` and ``test`` may be empty."""

    train: BatchDataset
    val: BatchDataset
    test: BatchDataset


def check_fraction(who: str, name: str, fraction: float) -> None:
    """Refuse a fraction that leaves nothing to train on.

    Raises:
        ValueError: If ``fraction`` is not in ``[0, 1)``.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"{who}: {name} must be at least 0 and below 1, got {fraction}. Use 0 for no such part.")


def split_indices(num: int, fraction: float, seed: int, part: str) -> tuple[Tensor, Tensor]:
    """Take ``round(num * fraction)`` of ``num`` examples away.

    Args:
        num: Number of examples.
        fraction: How much to take, in ``[0, 1)``.
        seed: Another seed takes others.
        part: Name of what is taken ("val", "test"), so that the two are drawn independently.

    Returns:
        Indices of the rest and of the part taken, each ascending int64. No index is in both.
    """
    # Sorted by hash: torch.randperm does not promise the same permutation in the next version.
    order = sorted(range(num), key=lambda i: derive_seed("split", part, seed, i))
    num_taken = round(num * fraction)
    taken, rest = sorted(order[:num_taken]), sorted(order[num_taken:])
    return torch.tensor(rest, dtype=torch.int64), torch.tensor(taken, dtype=torch.int64)
