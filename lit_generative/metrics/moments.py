"""Mean and covariance of features: streamed in float64, added over batches and processes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lit_generative.metrics.processes import sum_over_processes

BLOCK = 4096  # rows in float64 at a time


class FeatureSums:
    """``n``, ``sum d`` and ``sum d d^T`` on the CPU, with ``d`` the difference from the first feature seen.

    Without that difference, copies of one image would have a covariance of pure rounding, whose square root is not
    small; and float32 sums would cost up to 5 % of a covariance.

    Args:
        dim: Length ``D`` of a feature.
    """

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.origin = torch.zeros(dim, dtype=torch.float64)
        self.total = torch.zeros(dim, dtype=torch.float64)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64)

    @torch.no_grad()
    def update(self, features: Tensor) -> None:
        """Add a batch ``(N, D)``."""
        x = features.cpu().double()  # in this order: some devices have no float64
        if self.count == 0 and len(x):
            self.origin = x[0].clone()
        d = x - self.origin
        self.count += len(x)
        self.total += d.sum(dim=0)
        self.outer.addmm_(d.T, d)

    def moments(self) -> Moments:
        """Those of all processes together; every process must call it.

        Raises:
            ValueError: If there are fewer than two features in all.
        """
        count = torch.tensor([self.count], dtype=torch.float64)
        everywhere = sum_over_processes(torch.cat([count, self.total + self.count * self.origin]))
        n = int(everywhere[0])
        if n < 2:
            raise ValueError(f"Moments: a covariance needs at least two images, got {n}. Add images before computing.")
        mean = everywhere[1:] / n
        # Processes have different origins; about the common mean their sums of squares can be added.
        shift = mean - self.origin
        mixed = torch.outer(self.total, shift)
        about_mean = self.outer - mixed - mixed.T + self.count * torch.outer(shift, shift)
        cov = sum_over_processes(about_mean) / (n - 1)
        return Moments(n, mean, (cov + cov.T) / 2)


@dataclass(eq=False)
class Moments:
    """Mean and unbiased covariance of ``count`` features."""

    count: int
    mean: Tensor
    """``(D,)`` float64."""
    cov: Tensor
    """``(D, D)`` float64, symmetric."""

    @cached_property
    def root(self) -> Tensor:
        """``R``, ``(D, r)`` with ``cov = R R^T`` and ``r`` the rank; its directions of pure rounding are left out."""
        values, vectors = torch.linalg.eigh(self.cov)
        kept = _above_rounding(values)
        return vectors[:, kept] * values[kept].sqrt()


def moments_of(x: Tensor) -> Moments:
    """Moments of the rows ``(N, D)``, ``N`` at least 2, of this process alone; float64 a block at a time."""
    mean = x.mean(dim=0, dtype=torch.float64)
    outer = mean.new_zeros(len(mean), len(mean))
    for block in x.split(BLOCK):
        d = block.double() - mean
        outer.addmm_(d.T, d)
    return Moments(len(x), mean, (outer + outer.T) / (2 * (len(x) - 1)))


def trace_sqrt_product(a: Moments, b: Moments) -> Tensor:
    """``tr sqrt(cov_a cov_b)`` as the sum of the square roots of the eigenvalues of ``R_a^T cov_b R_a``.

    The product of two covariances is not symmetric, this one is: exact, without a matrix square root, and with a
    cached ``R_a`` one symmetric eigenvalue problem. A scalar, float64.
    """
    values = torch.linalg.eigvalsh(a.root.T @ b.cov @ a.root)
    # A square root would make 1e-8 of each direction's 1e-16 of rounding.
    return values[_above_rounding(values)].sqrt().sum()


def _above_rounding(values: Tensor) -> Tensor:
    largest = values[-1] if len(values) else torch.tensor(0.0)
    return values > largest * len(values) * torch.finfo(torch.float64).eps
