"""Class labels: of a batch of data, and of samples that are asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_generative.types import Batch


def check_labels(who: str, num: int, num_classes: int | None, label: Tensor | None) -> None:
    """Refuse labels that a model cannot sample.

    Args:
        who: Named in the message.
        num: How many samples.
        num_classes: How many classes the model has; None if it has none.
        label: ``(num,)`` int64, or None.

    Raises:
        ValueError: If the model has no classes, the count is wrong, or a label is not one of its classes.
    """
    if label is None:
        return
    if num_classes is None:
        raise ValueError(f"{who}: the model is unconditional, so it takes no label. Leave label out.")
    if label.shape != (num,):
        raise ValueError(f"{who}: need one label for each of {num} samples, got shape {tuple(label.shape)}.")
    if label.dtype != torch.int64:
        raise ValueError(f"{who}: labels must be int64, got {str(label.dtype).removeprefix('torch.')}.")
    if num and not 0 <= int(label.min()) <= int(label.max()) < num_classes:
        raise ValueError(f"{who}: labels must lie in 0..{num_classes - 1}, got {int(label.min())}..{int(label.max())}.")


def check_batch_labels(who: str, label: Tensor, num_classes: int) -> None:
    """Refuse labels of training data that name no class; where they still lie in main memory, no device waits for it.

    Args:
        who: Named in the message.
        label: From a batch.
        num_classes: How many classes the model has.

    Raises:
        ValueError: If they are no int64 ``(N,)`` in ``[0, num_classes)``.
    """
    if label.dtype != torch.int64 or label.ndim != 1:
        raise ValueError(
            f"{who}: labels must be int64 of shape (N,), got {str(label.dtype).removeprefix('torch.')} of shape "
            f"{tuple(label.shape)}. Convert them in the data set."
        )
    if len(label) and not 0 <= int(label.min()) <= int(label.max()) < num_classes:
        raise ValueError(
            f"{who}: the data's labels must lie in 0..{num_classes - 1}, as the networks have "
            f"num_classes={num_classes}, got {int(label.min())}..{int(label.max())}. Number the classes from 0, or "
            "raise num_classes."
        )


def labels_of(who: str, batch: Batch, num_classes: int | None) -> Tensor | None:
    """The labels of a batch, for a model that has classes.

    Args:
        who: Named in the message.
        batch: From the data.
        num_classes: How many classes the model has; None if it has none.

    Returns:
        ``(N,)`` int64, or None without classes.

    Raises:
        ValueError: If the model has classes and the batch no labels.
    """
    if num_classes is None:
        return None
    if "label" not in batch:
        raise ValueError(
            f"{who}: a model of {num_classes} classes needs labels, but the batch holds {sorted(batch)} alone. Add "
            "'label' to it, (N,) int64, or set the networks' num_classes to null."
        )
    return batch["label"]
