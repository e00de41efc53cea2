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


def mixture_coverage(points: Tensor, centers: Tensor, std: float) -> dict[str, float]:
    """How well points cover a mixture of round Gaussians of equal weight.

    A point is of high quality within three standard deviations of the nearest mean, which ``1 - exp(-9 / 2)``, 98.9 %,
    of the mixture's own points are; a mode is covered by one point of high quality.

    Source: Srivastava et al. 2017, VEEGAN, sec. 4.1 (arXiv:1705.07761); Lin et al. 2018, PacGAN, sec. 4.1
    (arXiv:1712.04086).

    Args:
        points: Samples, ``(N, 2)``.
        centers: Means, ``(K, 2)``.
        std: Standard deviation along each axis.

    Returns:
        ``modes`` (covered, of ``K``), ``high_quality`` (share of the points), and ``reverse_kl``: the divergence of the
        nearest means' histogram, all points counted, from the uniform one, in nats.

    Raises:
        ValueError: If a point is not finite.
    """
    if not points.isfinite().all():
        raise ValueError("mixture_coverage: the points must be finite. The generator has diverged.")
    distance, nearest = torch.cdist(points.double(), centers.double()).min(dim=1)
    good = distance <= 3 * std
    shares = nearest.bincount(minlength=len(centers)).double() / len(points)
    return {
        "modes": float(len(nearest[good].unique())),
        "high_quality": float(good.double().mean()),
        "reverse_kl": float(torch.special.xlogy(shares, shares * len(centers)).sum()),
    }


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
