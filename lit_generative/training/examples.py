"""Training examples that a model begins with."""

from __future__ import annotations

import lightning as L
import torch
from torch import Tensor

from lit_generative.tensor_ops import from_uint8
from lit_generative.types import DescribesData, SupportsReference


def training_images(trainer: L.Trainer, at_most: int, purpose: str) -> Tensor:
    """Training examples spread evenly over the set, as the data module gives them one by one.

    Args:
        trainer: Its data module is asked.
        at_most: How many, if there are so many.
        purpose: What they are for, as an error begins.

    Returns:
        ``(N, C, H, W)`` in ``[-1, 1]``, float32.

    Raises:
        ValueError: If the data module cannot give single images.
    """
    data = getattr(trainer, "datamodule", None)
    if not (isinstance(data, SupportsReference) and isinstance(data, DescribesData) and len(data.sample_shape) == 3):
        source = "a plain DataLoader" if data is None else type(data).__name__
        raise ValueError(
            f"{purpose} needs single training images, which {source} does not give. Fit with a data module that has "
            "num_examples(split) and examples(split, indices), as ImageDataModule has."
        )
    total = data.num_examples("train")
    indices = torch.linspace(0, total - 1, min(at_most, total), dtype=torch.float64).round().long()
    return from_uint8(data.examples("train", indices))
