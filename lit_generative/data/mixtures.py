"""Two-dimensional Gaussian mixtures, on which mode collapse can be seen and counted."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lit_generative.data.batches import InMemoryExamples
from lit_generative.data.resumable import ResumableDataModule
from lit_generative.data.splits import Splits, check_fraction, split_indices
from lit_generative.tensor_ops import derive_seed


class GaussianMixture(ResumableDataModule):
    """Points from round Gaussians of equal weight, drawn once; a batch is ``{"image": (N, 2), "label": (N,)}``.

    The points are float32, the label is the index of the Gaussian a point was drawn from. They depend on
    ``split_seed`` only.

    Args:
        centers: Means, ``(K, 2)``.
        std: Standard deviation along each axis.
        num_samples: Number of points, all splits together.
        test_fraction: Part of all points to test on, in ``[0, 1)``. ``val_fraction`` is taken from the rest.
        kwargs: Arguments of :class:`~lit_generative.data.resumable.ResumableDataModule`.

    Attributes:
        centers: Means, ``(K, 2)`` float32.
        std: Standard deviation along each axis.

    Raises:
        ValueError: If ``std`` is negative, ``num_samples`` below 1, or ``test_fraction`` not in ``[0, 1)``.
    """

    def __init__(
        self,
        centers: Tensor,
        std: float,
        num_samples: int = 20_000,
        test_fraction: float = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if std < 0:
            raise ValueError(f"{self._name}: std must not be negative, got {std}.")
        if num_samples < 1:
            raise ValueError(f"{self._name}: num_samples must be at least 1, got {num_samples}.")
        check_fraction(self._name, "test_fraction", test_fraction)
        self.centers, self.std = centers, std
        self.num_samples, self.test_fraction = num_samples, test_fraction

    @property
    @override
    def num_classes(self) -> int:
        return len(self.centers)

    @property
    @override
    def sample_shape(self) -> tuple[int, ...]:
        return (2,)

    @override
    def load_splits(self) -> Splits:
        generator = torch.Generator().manual_seed(derive_seed("mixture", self.split_seed))
        label = torch.randint(len(self.centers), (self.num_samples,), generator=generator)
        points = self.centers[label] + self.std * torch.randn(self.num_samples, 2, generator=generator)
        rest, test = split_indices(self.num_samples, self.test_fraction, self.split_seed, "test")
        train, val = split_indices(len(rest), self.val_fraction, self.split_seed, "val")
        return Splits(*(InMemoryExamples(points[part], label[part]) for part in (rest[train], rest[val], test)))


class RingMixture(GaussianMixture):
    """Gaussians on a circle.

    Source: the 2D ring of Lin et al. 2018, PacGAN (arXiv:1712.04086): 8 modes, radius 1, standard deviation 0.01.

    Args:
        num_modes: Number of Gaussians.
        radius: Radius of the circle.
        std: Standard deviation along each axis.
        kwargs: Arguments of :class:`GaussianMixture` but ``centers``.

    Raises:
        ValueError: If ``num_modes`` is below 1, or ``radius`` not positive.
    """

    def __init__(self, num_modes: int = 8, radius: float = 1.0, std: float = 0.01, **kwargs: Any) -> None:
        if num_modes < 1:
            raise ValueError(f"RingMixture: num_modes must be at least 1, got {num_modes}.")
        if radius <= 0:
            raise ValueError(f"RingMixture: radius must be positive, got {radius}.")
        angles = torch.arange(num_modes) * (2 * math.pi / num_modes)
        super().__init__(centers=radius * torch.stack([angles.cos(), angles.sin()], dim=1), std=std, **kwargs)


class GridMixture(GaussianMixture):
    """Gaussians on a square grid around the origin.

    Source: the 2D grid of Lin et al. 2018, PacGAN (arXiv:1712.04086): 5 x 5 modes, spacing 2, standard deviation 0.05.
    Both lengths are divided by 4 here, so that the centers lie in ``[-1, 1]``.

    Args:
        side: Number of Gaussians along each axis.
        spacing: Distance of neighbours.
        std: Standard deviation along each axis.
        kwargs: Arguments of :class:`GaussianMixture` but ``centers``.

    Raises:
        ValueError: If ``side`` is below 1, or ``spacing`` not positive.
    """

    def __init__(self, side: int = 5, spacing: float = 0.5, std: float = 0.0125, **kwargs: Any) -> None:
        if side < 1:
            raise ValueError(f"GridMixture: side must be at least 1, got {side}.")
        if spacing <= 0:
            raise ValueError(f"GridMixture: spacing must be positive, got {spacing}.")
        axis = (torch.arange(side) - (side - 1) / 2) * spacing
        super().__init__(centers=torch.cartesian_prod(axis, axis), std=std, **kwargs)
