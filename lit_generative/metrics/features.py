"""What a feature extractor is: pixels in, features and class logits out, and a record of what it is."""

from __future__ import annotations

import contextlib
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override


class Features(NamedTuple):
    """What one pass over a batch gives."""

    embedding: Tensor
    """Features ``(N, D)``, float32."""
    logits: Tensor | None
    """Class logits ``(N, K)``, float32; None if the network does not classify."""


class FeatureExtractor(nn.Module, ABC):
    """Turns uint8 images into :class:`Features`; always in evaluation mode, and its weights are never trained.

    Scores of two extractors are different quantities, whatever their names; :meth:`record` says which one it was.
    """

    name: str
    """Short name, part of log keys: ``inception``, ``digits``."""
    dim: int
    """Length ``D`` of a feature."""
    num_classes: int | None = None
    """Number ``K`` of logits, or None."""

    @property
    def frechet_name(self) -> str:
        """What to call the Frechet distance: ``FID`` is that of Inception-V3 alone."""
        return f"Frechet distance ({self.name} features)"

    @property
    def frechet_key(self) -> str:
        """The same as a log key: ``fid``, or ``fd_digits``."""
        return f"fd_{self.name}"

    @abstractmethod
    def forward(self, images: Tensor) -> Features:
        """Extract.

        Args:
            images: uint8 ``(N, C, H, W)``, ``C`` 1 or 3, any size.

        Raises:
            ValueError: If dtype or shape is another.
        """

    def record(self) -> dict[str, Any]:
        """Plain data that says which extractor this is; scores with unequal records are not comparable."""
        return {"extractor": self.name, "extractor_sha256": state_hash(self), "dim": self.dim}

    @override
    def train(self, mode: bool = True) -> FeatureExtractor:
        """Stay in evaluation mode: a metric inside a module must not train its batch norm."""
        return super().train(False)


def state_hash(module: nn.Module) -> str:
    """sha256 over names, dtypes, shapes and bytes of a module's state, independent of the file it came from."""
    digest = hashlib.sha256(type(module).__qualname__.encode())
    for key, value in sorted(module.state_dict().items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_images(images: Tensor, who: str) -> None:
    """Refuse what is not a batch of uint8 pictures.

    Raises:
        ValueError: If dtype, number of axes or channels do not fit.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"{who}: need uint8 images (N, C, H, W) with 1 or 3 channels, got {images.dtype} {tuple(images.shape)}. "
            "tensor_ops.to_uint8 turns images in [-1, 1] into pixels."
        )


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Neither autocast nor a global precision setting changes float32 inside; each setting is restored.

    A run in bf16, or ``torch.set_float32_matmul_precision("medium")``, would give other features than the same
    extractor gives after training, with nothing in the record to show it.

    Args:
        device: Where the extractor works.
    """
    operations: tuple[Any, ...] = (
        torch.backends.mkldnn.matmul,  # type: ignore[attr-defined]
        torch.backends.mkldnn.conv,  # type: ignore[attr-defined]
        torch.backends.cuda.matmul,
        torch.backends.cudnn.conv,  # type: ignore[attr-defined]
    )
    before = [operation.fp32_precision for operation in operations]
    try:
        for operation in operations:
            operation.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for operation, precision in zip(operations, before, strict=True):
            operation.fp32_precision = precision
