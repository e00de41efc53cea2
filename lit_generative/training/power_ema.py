"""Power-function averages of the weights, and how to combine stored ones into one of any length after training.

Source: Karras et al. 2024 (arXiv:2312.02696), sec. 3 and app. C. There the profiles are integrals over time; here they
are sums over updates, which is what a run of finite length computes, so a fit to a stored profile is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
LARGEST_SIGMA_REL = 12**-0.5
"""That of exponent 0, the plain mean of all updates."""


class Profile(NamedTuple):
    """How an average weighs the updates ``t``: by ``t**(gamma + 1) - (t - 1)**(gamma + 1)``, up to ``update``."""

    gamma: float
    """Exponent."""
    update: int
    """The last update in the average, counted from 1."""


def gamma_from_sigma_rel(sigma_rel: float) -> float:
    """Exponent of the power function whose standard deviation is ``sigma_rel`` of the training's length.

    Source: Karras et al. 2024, sec. 3.1: ``sigma_rel**2 = (gamma + 1) / ((gamma + 2)**2 * (gamma + 3))``, a cubic.

    Args:
        sigma_rel: Relative width of the average, between 0 and 0.2887; 0.05 to 0.15 is usual.

    Raises:
        ValueError: If it is out of range.
    """
    if not 0 < sigma_rel < LARGEST_SIGMA_REL:
        raise ValueError(f"sigma_rel must lie between 0 and {LARGEST_SIGMA_REL:.4f}, got {sigma_rel}. Try 0.1.")
    square = sigma_rel**-2
    return float(np.roots([1, 7, 16 - square, 12 - square]).real.max())


def live_share(gamma: float, update: int) -> float:
    """Share of the live weights in the average after an update: ``1 - (1 - 1 / t)**(gamma + 1)``, 1 at the first.

    Source: Karras et al. 2024, sec. 3.1, with the first update counted as 1.

    Args:
        gamma: Exponent.
        update: Number ``t`` of the update, from 1.
    """
    return float(1 - (1 - 1 / update) ** (gamma + 1))


def inner_products(rows: Sequence[Profile], columns: Sequence[Profile]) -> Array:
    """Sums over the updates of the product of two profiles.

    Source: Karras et al. 2024, app. C, with the sum in place of the integral.

    Args:
        rows: ``n`` profiles.
        columns: ``m`` profiles.

    Returns:
        ``(n, m)``.
    """
    ends = sorted({profile.update for profile in (*rows, *columns)})
    pairs = {(a.gamma, b.gamma) for a in rows for b in columns}
    sums = {pair: _sums(*pair, ends) for pair in pairs}
    result = np.empty((len(rows), len(columns)))
    for i, a in enumerate(rows):
        for j, b in enumerate(columns):
            end = min(a.update, b.update)
            overlap = (end / a.update) ** (a.gamma + 1) * (end / b.update) ** (b.gamma + 1)
            result[i, j] = overlap * sums[a.gamma, b.gamma][end]
    return result


def combine(stored: Sequence[Profile], target: Profile) -> tuple[Array, float]:
    """Weights of stored averages whose sum comes nearest to a target profile, by least squares.

    The weights sum to 1, which the paper leaves to the fit: what all updates have in common then stays as it is.

    Source: Karras et al. 2024, sec. 3.2 and app. C.

    Args:
        stored: Profiles there are, ``n``; none later than the target.
        target: Profile wanted.

    Returns:
        Weights ``(n,)``, and the norm of the difference of the profiles over the norm of the target's: 0 is exact.
    """
    weights = np.zeros(len(stored))
    if target in stored:
        weights[list(stored).index(target)] = 1
        return weights, 0.0
    scale = 1 / float(inner_products([target], [target])[0, 0])
    products = scale * inner_products(stored, stored)
    wanted = scale * inner_products(stored, [target])[:, 0]
    ones = np.ones((len(stored), 1))
    system = np.block([[products, ones], [ones.T, np.zeros((1, 1))]])
    weights = np.linalg.lstsq(system, np.append(wanted, 1), rcond=None)[0][:-1]
    square = 1 - 2 * weights @ wanted + weights @ products @ weights
    return weights, float(np.sqrt(max(square, 0.0)))  # rounding may make it negative


def _sums(a: float, b: float, ends: Sequence[int]) -> dict[int, float]:
    """Products of two profiles that end together, by their end; from end to end, since large powers would overflow."""
    power = a + b + 2
    result, previous, total = {}, 0, 0.0
    for end in ends:
        t = np.arange(previous + 1, end + 1, dtype=np.float64)
        shares = (1 - (1 - 1 / t) ** (a + 1)) * (1 - (1 - 1 / t) ** (b + 1))
        total = total * (previous / end) ** power + float((shares * (t / end) ** power).sum())
        result[end], previous = total, end
    return result
