"""How near one image is to another."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

SSIM_WINDOW = 11
"""Side of the Gaussian window, in pixels."""


def mean_squared_error(a: Tensor, b: Tensor) -> Tensor:
    """Of each two images ``(N, C, H, W)``: ``(N,)``, in squared units of theirs.

    Raises:
        ValueError: If their shapes differ.
    """
    _check(a, b)
    return (a - b).square().flatten(start_dim=1).mean(dim=1)


def psnr(a: Tensor, b: Tensor, data_range: float = 2.0) -> Tensor:
    """Peak signal-to-noise ratio ``10 log10(range^2 / MSE)`` of each two images ``(N, C, H, W)``: dB, ``(N,)``.

    Infinite where they are equal. Papers give the mean over images, which is not the PSNR of the mean squared error.

    Args:
        a: Images.
        b: Others.
        data_range: Largest value less smallest; 2 for ``[-1, 1]``.

    Raises:
        ValueError: If the shapes differ.
    """
    return 10 * torch.log10(data_range**2 / mean_squared_error(a, b))


def ssim(a: Tensor, b: Tensor, data_range: float = 2.0) -> Tensor:
    """Structural similarity of each two images ``(N, C, H, W)``: ``(N,)``, 1 where they are equal.

    Windows are Gaussian, 11 x 11 with a deviation of 1.5 pixels, in each channel alone, and lie wholly within the
    image, as in the paper and in scikit-image; torchmetrics' own mean counts those over a mirrored border, too.
    ``K1 = 0.01``, ``K2 = 0.03``.

    Source: Wang et al. 2004, sec. III-B and III-C (IEEE Transactions on Image Processing 13).

    Args:
        a: Images.
        b: Others.
        data_range: As in :func:`psnr`.

    Raises:
        ValueError: If the shapes differ, or a side is below 11 pixels.
    """
    _check(a, b)
    if min(a.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(f"ssim: images must have at least {SSIM_WINDOW} pixels a side, got {tuple(a.shape[-2:])}.")
    _, everywhere = structural_similarity_index_measure(
        a, b, data_range=data_range, reduction="none", return_full_image=True
    )
    border = SSIM_WINDOW // 2
    return everywhere[..., border:-border, border:-border].flatten(start_dim=1).mean(dim=1)


def _check(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape or a.ndim != 4:
        raise ValueError(
            f"fidelity: needs two batches of images of one shape (N, C, H, W), got {tuple(a.shape)} and "
            f"{tuple(b.shape)}."
        )
