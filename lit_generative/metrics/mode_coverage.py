"""How many classes of the data a model draws, and how evenly: what mode collapse looks like as a number."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from lit_generative.metrics.feature_set import FeatureSet
from lit_generative.metrics.measures import Measure, logits_of


def mode_counts(logits: Tensor) -> Tensor:
    """Images of each class, as a classifier calls them: ``(N, K)`` to ``(K,)`` int64."""
    return logits.argmax(dim=1).bincount(minlength=logits.shape[1])


class ModeCoverage(Measure):
    """``modes``: classes drawn at least ``min_count`` times; ``mode_kl``: KL of drawn from real class shares, in nats.

    The second is infinite if a class is drawn that the real images do not have.

    Source: the counts on stacked MNIST of Metz et al. 2017, sec. 3.3.1 (arXiv:1611.02163), with any classifier.

    Args:
        min_count: Images of a class that count as drawn.

    Raises:
        ValueError: If ``min_count`` is below 1.
    """

    scores = ("modes", "mode_kl")
    needs_logits = True

    def __init__(self, min_count: int = 1) -> None:
        if min_count < 1:
            raise ValueError(f"ModeCoverage: min_count must be at least 1, got {min_count}.")
        self.min_count = min_count

    @override
    def compute(self, real: FeatureSet, fake: FeatureSet) -> dict[str, float]:
        drawn, wanted = (mode_counts(logits_of(data, "ModeCoverage")) for data in (fake, real))
        p, q = drawn.double() / drawn.sum(), wanted.double() / wanted.sum()
        kl = torch.where(drawn > 0, p * (p / q).log(), 0.0).sum()
        return {"modes": float((drawn >= self.min_count).sum()), "mode_kl": float(kl)}
