"""Noise on what the discriminator sees, so that data and samples overlap while they lie far apart."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from lit_generative.gan.augmentation.base import Augmentation


class InstanceNoise(Augmentation):
    """Gaussian noise on data and samples alike, which fades linearly as images are seen.

    Source: Arjovsky & Bottou 2017, sec. 3 (arXiv:1701.04862); Sonderby et al. 2017, sec. 3.4 (arXiv:1610.04490).

    Args:
        std: Standard deviation at the start, where images lie in ``[-1, 1]``.
        anneal_images: Real images after which there is none; None keeps it.

    Raises:
        ValueError: If ``std`` is not positive, or ``anneal_images`` below 1.
    """

    images: Tensor

    def __init__(self, std: float = 0.1, anneal_images: int | None = None) -> None:
        super().__init__()
        if std <= 0:
            raise ValueError(f"InstanceNoise: std must be positive, got {std}. Leave the augmentation out for none.")
        if anneal_images is not None and anneal_images < 1:
            raise ValueError(f"InstanceNoise: anneal_images must be at least 1, got {anneal_images}.")
        self.std, self.anneal_images = std, anneal_images
        self.register_buffer("images", torch.tensor(0, dtype=torch.int64))  # on the device: nothing waits for it

    @override
    def forward(self, x: Tensor) -> Tensor:
        share = 1.0 if self.anneal_images is None else (1 - self.images / self.anneal_images).clamp_min(0.0)
        return x + self.std * share * torch.randn_like(x)

    @override
    def observe(self, real_logits: Tensor, num_images: int) -> None:
        self.images += num_images
