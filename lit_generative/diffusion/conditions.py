"""Images that the network sees beside the noisy one, joined to its channels."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from lit_generative.recipe import Recorded


class Condition(Recorded, ABC):
    """What is made of a clean image, to be shown to the network."""

    @abstractmethod
    def of(self, x0: Tensor) -> Tensor:
        """From images ``(N, C, H, W)`` in ``[-1, 1]`` to ``(N, C', H, W)``."""


class SuperResolution(Condition):
    """The image at a lower resolution, brought back to full size.

    Each pixel of the small image is the mean of a square of ``scale * scale`` pixels. Enlarging is bicubic, with
    Pillow's kernel, so values may leave ``[-1, 1]`` a little at edges. The papers shrink with a bicubic filter, too;
    the mean is what a sensor of larger pixels sees.

    Source: Saharia et al. 2021, sec. 2 (arXiv:2104.07636); Ho et al. 2022, sec. 2.3 (arXiv:2106.15282), without their
    noise on the condition.

    Args:
        scale: Full size by small size, at least 2.

    Raises:
        ValueError: If ``scale`` is below 2.
    """

    def __init__(self, scale: int) -> None:
        if scale < 2:
            raise ValueError(f"SuperResolution: scale must be at least 2, got {scale}.")
        self.scale = scale

    @override
    def of(self, x0: Tensor) -> Tensor:
        return self.enlarge(self.shrink(x0))

    def shrink(self, x0: Tensor) -> Tensor:
        """Means over squares: ``(N, C, H, W)`` to ``(N, C, H / scale, W / scale)``.

        Raises:
            ValueError: If ``scale`` does not divide height and width.
        """
        if x0.ndim != 4 or x0.shape[2] % self.scale or x0.shape[3] % self.scale:
            raise ValueError(
                f"SuperResolution: needs images (N, C, H, W) whose sides are multiples of scale={self.scale}, got "
                f"{tuple(x0.shape)}."
            )
        return F.avg_pool2d(x0, self.scale)

    def small_shape(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """``(C, h, w)`` of the small version of an image ``(C, H, W)``."""
        channels, height, width = shape
        return channels, height // self.scale, width // self.scale

    def check_small(self, low: Tensor, shape: tuple[int, ...]) -> None:
        """Refuse small images ``(N, C, h, w)`` that do not enlarge to ``(N, *shape)``.

        Raises:
            ValueError: If they do not.
        """
        small = self.small_shape(shape)
        if tuple(low.shape[1:]) != small:
            raise ValueError(
                f"SuperResolution: needs small images of shape (N, {', '.join(map(str, small))}), got "
                f"{tuple(low.shape)}. Bring them to that size."
            )

    def enlarge(self, low: Tensor) -> Tensor:
        """The condition that a small image is: ``(N, C, h, w)`` in ``[-1, 1]`` to ``(N, C, h * scale, w * scale)``."""
        # torch's other bicubic kernel, without antialias, bends ramps.
        return F.interpolate(low, scale_factor=self.scale, mode="bicubic", antialias=True)
