"""All that the measures ask of one set of images, from one pass over them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_generative.metrics.features import Features
from lit_generative.metrics.moments import FeatureSums, Moments
from lit_generative.metrics.processes import gather_rows


@dataclass(eq=False)
class FeatureSet:
    """What is known of one set of images, of all processes together."""

    moments: Moments
    embedding: Tensor | None = None
    """Features ``(n, D)`` float32 in the order of the images; None if no measure asked, and empty off process 0."""
    logits: Tensor | None = None
    """Class logits ``(n, K)`` float32, likewise."""


class FeatureCollector:
    """Collects features of images that arrive in batches, in any order, on any number of processes.

    Args:
        dim: Length of a feature.
        keep_embedding: Whether measures need the single features, not only their moments.
        keep_logits: Whether measures need the class logits.
    """

    def __init__(self, dim: int, keep_embedding: bool, keep_logits: bool) -> None:
        self.sums = FeatureSums(dim)
        self.keep_embedding, self.keep_logits = keep_embedding, keep_logits
        self._index: list[Tensor] = []
        self._embedding: list[Tensor] = []
        self._logits: list[Tensor] = []

    def update(self, features: Features, index: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            features: Of ``N`` images.
            index: Place of each in the whole set, ``(N,)`` int64, so that the result does not depend on which process
                saw which; None for the order of arrival.

        Raises:
            ValueError: If a feature or a logit is not finite, which would spoil every score without a word; if logits
                are needed and missing, or places are not one for each image.
        """
        start, num = self.sums.count, len(features.embedding)
        index = torch.arange(start, start + num) if index is None else index.cpu()
        if index.shape != (num,):
            raise ValueError(f"FeatureCollector: index must hold {num} places, one for each image, got {len(index)}.")
        self._check_finite(features.embedding, index)
        if self.keep_logits:
            if features.logits is None:
                raise ValueError("FeatureCollector: a measure needs class logits, which this extractor does not give.")
            self._check_finite(features.logits, index)
            self._logits.append(features.logits.float().cpu())
        if self.keep_embedding:
            self._embedding.append(features.embedding.float().cpu())
        self.sums.update(features.embedding)
        self._index.append(index)

    @staticmethod
    def _check_finite(rows: Tensor, index: Tensor) -> None:
        bad = ~rows.isfinite().all(dim=1).cpu()
        if bad.any():
            place = int(index[bad][0])
            raise ValueError(f"FeatureCollector: the features of image {place} are not finite. Look at that image.")

    def gather(self) -> FeatureSet:
        """All processes' images in one set; every process must call it."""
        moments = self.sums.moments()
        if not (self.keep_embedding or self.keep_logits):
            return FeatureSet(moments)
        order = gather_rows(torch.cat([torch.empty(0, dtype=torch.int64), *self._index])).argsort(stable=True)
        return FeatureSet(
            moments,
            _gathered(self._embedding)[order] if self.keep_embedding else None,
            _gathered(self._logits)[order] if self.keep_logits else None,
        )


def _gathered(parts: list[Tensor]) -> Tensor:
    return gather_rows(torch.cat(parts) if parts else torch.empty(0, 0))
