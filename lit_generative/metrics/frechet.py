"""Frechet distance between Gaussians fitted to features: FID with Inception's features."""

from __future__ import annotations

import numpy as np
import torch
from typing_extensions import override

from lit_generative.metrics.feature_set import FeatureSet
from lit_generative.metrics.measures import Measure, embedding_of
from lit_generative.metrics.moments import Moments, moments_of, trace_sqrt_product


def frechet_distance(real: Moments, fake: Moments) -> float:
    """``|mean_r - mean_f|^2 + tr(cov_r + cov_f - 2 sqrt(cov_r cov_f))``, at least zero.

    Symmetric but for rounding; the factor of ``real`` is computed once and kept.

    Source: Heusel et al. 2017, eq. 6 (arXiv:1706.08500).
    """
    means = (real.mean - fake.mean).square().sum()
    traces = real.cov.trace() + fake.cov.trace()
    # The tensor's clamp, since max(0.0, nan) is 0.0: the best score.
    return float((means + traces - 2 * trace_sqrt_product(real, fake)).clamp_min(0.0))


def frechet_bias(real: Moments, count: int, seed: int = 0) -> float:
    """What ``count`` samples of the real Gaussian score against ``real.count`` others: the part due to the counts.

    Args:
        real: Moments of the real features.
        count: Number of generated images, at least 2.
        seed: Seed of the draw.

    Returns:
        A distance, to be read as "a perfect generator would score about this".

    Raises:
        ValueError: If ``count`` is below 2.
    """
    if count < 2:
        raise ValueError(f"frechet_bias: a covariance needs at least two images, got {count}.")
    draw = np.random.default_rng(seed)
    return frechet_distance(_drawn_moments(real, real.count, draw), _drawn_moments(real, count, draw))


def _drawn_moments(of: Moments, count: int, draw: np.random.Generator) -> Moments:
    """Moments of ``count`` samples of a Gaussian, without the samples: ``O(D^2)`` memory whatever the count.

    The covariance is a Wishart matrix ``R A A^T R^T / (count - 1)`` with a lower triangular ``A`` (Bartlett 1933), of
    as many columns as its rank.
    """
    rank = of.root.shape[1]
    a = np.tril(draw.standard_normal((rank, min(rank, count - 1))), k=-1)
    degrees = count - 1 - np.arange(a.shape[1])
    a[np.diag_indices(a.shape[1])] = np.sqrt(draw.chisquare(degrees))
    factor = of.root @ torch.from_numpy(a) / (count - 1) ** 0.5
    mean = of.mean + of.root @ torch.from_numpy(draw.standard_normal(rank)) / count**0.5
    return Moments(count, mean, factor @ factor.T)


def bias_warning(real: Moments, count: int) -> str | None:
    """What to tell of a distance from so few images, ``count`` not above the feature dimension; None if it is above."""
    dim = len(real.mean)
    if count > dim:
        return None
    return (
        f"{count} images are not more than the {dim} dimensions of a feature, and the Frechet distance is biased: a "
        f"perfect generator would score about {frechet_bias(real, count):.3g}. Take more, or look at "
        "the kernel distance."
    )


class Frechet(Measure):
    """:func:`frechet_distance` as ``fid``, and what it is called is for the extractor to say."""

    scores = ("fid",)

    @override
    def compute(self, real: FeatureSet, fake: FeatureSet) -> dict[str, float]:
        return {"fid": frechet_distance(real.moments, fake.moments)}


class FrechetInfinity(Measure):
    """``fid_inf``: the distance extrapolated to infinitely many generated images, which takes most of its bias away.

    Distances at several counts are fitted by a line in ``1 / count``. The line is a good one where the counts are well
    above the feature dimension; it may end a little below zero.

    Source: Chong & Forsyth 2020, sec. 4 (arXiv:1911.07023).

    Args:
        num_points: How many counts, evenly spaced from ``smallest`` of the images to all.
        smallest: Share of the images in the smallest count.
        seed: Seed of the subsets.

    Raises:
        ValueError: If there are fewer than two points, or the share is not between 0 and 1.
    """

    scores = ("fid_inf",)
    needs_embedding = True

    def __init__(self, num_points: int = 15, smallest: float = 0.1, seed: int = 0) -> None:
        if num_points < 2 or not 0 < smallest < 1:
            raise ValueError(
                f"FrechetInfinity: need num_points of at least 2 and smallest between 0 and 1, got {num_points} and "
                f"{smallest}."
            )
        self.num_points, self.smallest, self.seed = num_points, smallest, seed

    @override
    def compute(self, real: FeatureSet, fake: FeatureSet) -> dict[str, float]:
        x = embedding_of(fake, "FrechetInfinity")
        counts = [int(n) for n in torch.linspace(self.smallest * len(x), len(x), self.num_points, dtype=torch.float64)]
        if counts[0] < 2:
            raise ValueError(
                f"FrechetInfinity: the smallest subset needs at least two images, got {counts[0]} of {len(x)}. "
                "Generate more, or raise smallest."
            )
        generator = torch.Generator().manual_seed(self.seed)
        scores = []
        for n in counts:
            subset = x[torch.randperm(len(x), generator=generator)[:n]]
            scores.append(frechet_distance(real.moments, moments_of(subset)))
        design = torch.tensor([[1.0, 1.0 / n] for n in counts], dtype=torch.float64)
        target = torch.tensor(scores, dtype=torch.float64).unsqueeze(1)
        return {"fid_inf": float(torch.linalg.lstsq(design, target).solution[0, 0])}
