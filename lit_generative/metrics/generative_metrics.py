"""The measures as one torchmetrics metric: one pass over the images, whatever is asked of their features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from typing_extensions import override

from lit_generative.metrics.feature_set import FeatureCollector, FeatureSet
from lit_generative.metrics.features import FeatureExtractor, check_images, full_precision
from lit_generative.metrics.measures import Measure, check_measures, compute_scores
from lit_generative.metrics.processes import sum_over_processes


class GenerativeMetrics(Metric):
    """Scores generated images against real ones.

    Several processes may see any share of the images, also none. Random numbers are neither drawn nor reset. Features
    are summed in float64 on the CPU; ``compute`` gives every process the same numbers.

    As an attribute of a module it moves with it, and that is all: the extractor is no sub-module, so its weights reach
    neither checkpoint nor optimizer nor ``half()``, and nothing of the images seen is in a ``state_dict``.

    Args:
        extractor: Network whose features are compared; it is put in evaluation mode.
        measures: What to compute from them.
        reset_real: Whether ``reset`` forgets the real images, too.

    Raises:
        ValueError: If there is no measure, or one needs class logits that the extractor does not give.
    """

    higher_is_better = None
    is_differentiable = False
    full_state_update = False
    extractor: FeatureExtractor

    def __init__(self, extractor: FeatureExtractor, measures: Sequence[Measure], reset_real: bool = True) -> None:
        # It gathers by itself, since torchmetrics wants equally many updates, and keeps no result: processes with and
        # without one would wait for each other.
        super().__init__(sync_on_compute=False, compute_with_cache=False)
        self.measures, self.reset_real = list(measures), reset_real
        self.__dict__["extractor"] = extractor.eval()  # nn.Module's own way would make it a sub-module
        self._real = new_collector(extractor, measures)
        self._fake = new_collector(extractor, measures)
        self._real_set: FeatureSet | None = None

    @override
    def update(self, images: Tensor, real: bool, index: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            images: uint8 ``(N, C, H, W)``; ``tensor_ops.to_uint8`` makes them from ``[-1, 1]``.
            real: Whether they are real.
            index: Place of each image in its set ``(N,)``; needed only if the order must not depend on the processes.

        Raises:
            ValueError: If they are no uint8 images, or a feature is not finite.
        """
        check_images(images, "GenerativeMetrics")
        with torch.inference_mode(), full_precision(images.device):
            features = self.extractor(images)
        if real:
            self._real_set = None
        (self._real if real else self._fake).update(features, index)

    @override
    def compute(self) -> dict[str, float]:
        """Scores by name; the factor of the real covariance is kept for the next time.

        Raises:
            ValueError: If there are too few images.
        """
        # One process with new real images is enough: all must gather again.
        outdated = sum_over_processes(torch.tensor(float(self._real_set is None))) > 0
        if self._real_set is None or outdated:
            self._real_set = self._real.gather()
        return compute_scores(self.measures, self._real_set, self._fake.gather())

    @override
    def forward(self, images: Tensor, real: bool, index: Tensor | None = None) -> None:
        """Add a batch, as :meth:`update` does; it has no score alone, and torchmetrics' own would forget the others."""
        self.update(images, real, index)

    @override
    def reset(self) -> None:
        super().reset()
        self._fake = new_collector(self.extractor, self.measures)
        if self.reset_real:
            self._real, self._real_set = new_collector(self.extractor, self.measures), None

    @override
    def _apply(self, fn: Callable[..., Any], exclude_state: Sequence[str] = "") -> nn.Module:
        moved = super()._apply(fn, exclude_state)
        self.extractor.to(self.device)  # never to another dtype: those are other features
        return moved


def new_collector(extractor: FeatureExtractor, measures: Sequence[Measure]) -> FeatureCollector:
    """An empty collector that keeps what the measures need.

    Raises:
        ValueError: If there is no measure, two give one score, or one needs logits that the extractor has not.
    """
    check_measures(measures)
    for measure in measures:
        if measure.needs_logits and extractor.num_classes is None:
            raise ValueError(
                f"{type(measure).__name__}: needs class logits, which {type(extractor).__name__} does not give. Leave "
                "the measure out."
            )
    return FeatureCollector(
        extractor.dim, any(m.needs_embedding for m in measures), any(m.needs_logits for m in measures)
    )
