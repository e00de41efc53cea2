"""How images come to the size of a network; each way gives another score.

Source: Parmar et al. 2022, On Aliased Resizing and Surprising Subtleties in GAN Evaluation (arXiv:2104.11222).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override


class Resize(ABC):
    """Brings pixels to a square size."""

    name: str
    """Part of an extractor's record: ``tf1``."""

    @abstractmethod
    def __call__(self, images: Tensor, size: int) -> Tensor:
        """Resize.

        Args:
            images: uint8 ``(N, C, H, W)``.
            size: New height and width in pixels.

        Returns:
            float32 ``(N, C, size, size)``, levels 0 to 255, not rounded.
        """


class TF1Resize(Resize):
    """Bilinear without antialiasing as in TensorFlow 1, which published FIDs use.

    Output pixel ``i`` lies at ``i * H / size``: no half-pixel shift, and beyond the last pixel its value is repeated.
    The weights are those of two matrices, so the whole is two matrix products, on a CPU many times as fast as
    gathering four neighbours. Source: TensorFlow 1's ``resize_bilinear`` with ``align_corners=False``.
    """

    name = "tf1"

    def __init__(self) -> None:
        self._matrices: dict[tuple[int, int, torch.device], Tensor] = {}

    @override
    def __call__(self, images: Tensor, size: int) -> Tensor:
        rows, columns = (self._matrix(n, size, images.device) for n in images.shape[-2:])
        return rows @ (images.float() @ columns.T)

    def _matrix(self, old: int, new: int, device: torch.device) -> Tensor:
        """Weights ``(new, old)``; at most two per row are not zero."""
        key = (old, new, device)
        if key not in self._matrices:
            place = torch.arange(new, dtype=torch.float32) * torch.tensor(old / new, dtype=torch.float32)
            low = place.long().clamp(max=old - 1)
            share = (place - low).unsqueeze(1)
            lower, upper = F.one_hot(low, old), F.one_hot((low + 1).clamp(max=old - 1), old)
            self._matrices[key] = ((1 - share) * lower + share * upper).to(device)
        return self._matrices[key]


class CleanResize(Resize):
    """Pillow's antialiased bicubic filter on float pixels, one channel at a time.

    Runs on the CPU; what overshoots 0 or 255 is cut off. Source: Parmar et al. 2022, sec. 3, the "clean" mode of their
    clean-fid.
    """

    name = "clean"

    @override
    def __call__(self, images: Tensor, size: int) -> Tensor:
        planes = images.detach().cpu().flatten(end_dim=1).float().numpy()
        shape = (*images.shape[:2], size, size)
        resized = [np.asarray(Image.fromarray(p).resize((size, size), Image.Resampling.BICUBIC)) for p in planes]
        return torch.from_numpy(np.array(resized, np.float32)).reshape(shape).clamp(0, 255).to(images.device)


class AntialiasResize(Resize):
    """Bilinear and antialiased, pixel centres at one half: torchmetrics' default since 1.8."""

    name = "antialias"

    @override
    def __call__(self, images: Tensor, size: int) -> Tensor:
        return F.interpolate(images.float(), size=(size, size), mode="bilinear", antialias=True)


class BicubicResize(Resize):
    """Bicubic and antialiased in torch; overshoots beyond 0 and 255 at edges are kept, as in EDM2's FD-DINOv2."""

    name = "bicubic"

    @override
    def __call__(self, images: Tensor, size: int) -> Tensor:
        return F.interpolate(images.float(), size=(size, size), mode="bicubic", antialias=True)
