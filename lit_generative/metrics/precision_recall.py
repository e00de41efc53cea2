"""Fidelity and diversity apart: precision, recall, density and coverage."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from lit_generative.metrics.feature_set import FeatureSet
from lit_generative.metrics.measures import Measure, choose_rows, embedding_of

BLOCK = 128  # distances of a block stay in the cache


def precision_recall_density_coverage(real: Tensor, fake: Tensor, k: int) -> dict[str, float]:
    """Balls around each image that reach to its ``k``-th nearest neighbour in its own set, edge included.

    * precision: share of generated images in a ball of a real one; recall: the same with the sets exchanged.
    * density: balls of real images a generated one lies in, over ``k``; may exceed 1.
    * coverage: share of real images with a generated one in their ball.

    Source: Kynkaanniemi et al. 2019 (arXiv:1904.06991); Naeem et al. 2020 (arXiv:2002.09797).

    Args:
        real: Features, ``(n, D)`` float64, ``n`` above ``k``.
        fake: Features, ``(m, D)``, ``m`` above ``k``.
        k: Which neighbour.

    Raises:
        ValueError: If a set has no ``k``-th neighbour.
    """
    if min(len(real), len(fake)) <= k:
        raise ValueError(
            f"precision_recall_density_coverage: needs more than k={k} images, got {len(real)} real and {len(fake)} "
            "generated. Add images, or lower k."
        )
    # Distances come from |a|^2 + |b|^2 - 2 a.b, which is exact enough near the origin only.
    centre = real.mean(dim=0)
    real, fake = real - centre, fake - centre
    real_radius, fake_radius = _radii(real, k), _radii(fake, k)
    precise, density = 0, 0
    recalled = torch.zeros(len(real), dtype=torch.bool)
    covered = torch.zeros(len(real), dtype=torch.bool)
    for block, radius in zip(fake.split(BLOCK), fake_radius.split(BLOCK), strict=True):
        distance = _squared_distances(block, real)
        in_real_ball = distance <= real_radius
        precise += int(in_real_ball.any(dim=1).sum())
        density += int(in_real_ball.sum())
        covered |= in_real_ball.any(dim=0)
        recalled |= (distance <= radius.unsqueeze(1)).any(dim=0)
    return {
        "precision": precise / len(fake),
        "recall": float(recalled.double().mean()),
        "density": density / (k * len(fake)),
        "coverage": float(covered.double().mean()),
    }


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    squares = a.square().sum(dim=1, keepdim=True) + b.square().sum(dim=1)
    return squares.addmm_(a, b.T, alpha=-2.0).clamp_min_(0.0)


def _radii(x: Tensor, k: int) -> Tensor:
    """Squared distance to the ``k``-th nearest other row, ``(N,)``, and a rounding's worth more.

    Copies lie on the edge of a ball, often one of radius zero: rounding must not put them outside.
    """
    radii = []
    for start in range(0, len(x), BLOCK):
        distance = _squared_distances(x[start : start + BLOCK], x)
        own = torch.arange(len(distance))
        distance[own, start + own] = float("inf")
        radii.append(distance.topk(k, dim=1, largest=False, sorted=True).values[:, -1])
    radius = torch.cat(radii)
    slack = 4 * x.shape[1] * torch.finfo(x.dtype).eps
    return radius + slack * (radius + x.square().sum(dim=1))


class PrecisionRecall(Measure):
    """:func:`precision_recall_density_coverage` as ``precision``, ``recall``, ``density`` and ``coverage``.

    Args:
        k: Which neighbour; 3 in Kynkaanniemi et al., 5 in Naeem et al.
        max_samples: Images of each set at most; more are drawn from at random, always the same ones.

    Raises:
        ValueError: If ``k`` is below 1, or not below ``max_samples``.
    """

    scores = ("precision", "recall", "density", "coverage")
    needs_embedding = True

    def __init__(self, k: int = 5, max_samples: int = 10_000) -> None:
        if not 1 <= k < max_samples:
            raise ValueError(f"PrecisionRecall: need 1 <= k < max_samples, got {k} and {max_samples}.")
        self.k, self.max_samples = k, max_samples

    @override
    def compute(self, real: FeatureSet, fake: FeatureSet) -> dict[str, float]:
        x, y = (choose_rows(embedding_of(data, "PrecisionRecall"), self.max_samples).double() for data in (real, fake))
        return precision_recall_density_coverage(x, y, self.k)
