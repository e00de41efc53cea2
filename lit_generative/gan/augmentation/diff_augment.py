"""Differentiable augmentation of a fixed strength, for few images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from lit_generative.gan.augmentation.base import Augmentation
from lit_generative.tensor_ops import expand_like

Policy = Literal["color", "translation", "cutout"]
POLICIES = ("color", "translation", "cutout")


class DiffAugment(Augmentation):
    """Each image is changed by its own draw, always, in the order of the policy.

    * ``color``: brightness by up to a quarter of the range, saturation by a factor of 0 to 2, contrast of 0.5 to 1.5.
    * ``translation``: by up to an eighth of the size along each axis; black comes in.
    * ``cutout``: a square of half the size becomes grey.

    Source: Zhao et al. 2020, sec. 3.2 and app. (arXiv:2006.10738). On a grey image saturation does nothing.

    Args:
        policy: Which, in which order.

    Raises:
        ValueError: If it is empty or names something else.
    """

    def __init__(self, policy: Sequence[Policy] = POLICIES) -> None:  # type: ignore[assignment]
        super().__init__()
        if not policy or any(name not in POLICIES for name in policy):
            raise ValueError(f"DiffAugment: policy must be some of {POLICIES}, got {list(policy)}.")
        self.policy = list(policy)

    @override
    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4:
            raise ValueError(f"DiffAugment: needs images (N, C, H, W), got {tuple(x.shape)}. Leave it out for points.")
        steps = {"color": change_color, "translation": translate, "cutout": cut_out}
        for name in self.policy:
            x = steps[name](x)
        return x


def change_color(x: Tensor) -> Tensor:
    """Brightness, then saturation, then contrast, drawn for each of the images ``(N, C, H, W)``."""
    brightness, saturation, contrast = torch.rand(3, len(x), device=x.device, dtype=x.dtype)
    x = x + expand_like(brightness - 0.5, x)
    grey = x.mean(dim=1, keepdim=True)
    x = grey + expand_like(2 * saturation, x) * (x - grey)
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    return mean + expand_like(contrast + 0.5, x) * (x - mean)


def translate(x: Tensor) -> Tensor:
    """Move each image by whole pixels; what comes in is black (-1)."""
    N, _, H, W = x.shape
    rows, inside_rows = _moved(N, H, x.device)
    columns, inside_columns = _moved(N, W, x.device)
    batch = torch.arange(N, device=x.device)[:, None, None]
    moved = x.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    inside = (inside_rows[:, :, None] & inside_columns[:, None, :]).unsqueeze(1)
    return torch.where(inside, moved, -torch.ones_like(moved))


def _moved(num: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where each pixel along an axis comes from, ``(N, size)``, and whether that lies in the image."""
    reach = (size + 4) // 8
    shift = torch.randint(-reach, reach + 1, (num, 1), device=device)
    source = torch.arange(size, device=device) + shift
    return source.clamp(0, size - 1), (source >= 0) & (source < size)


def cut_out(x: Tensor) -> Tensor:
    """Grey (0) in a square of half the size, whose centre lies anywhere."""
    N, _, H, W = x.shape
    outside = ~(_within(N, H, x.device)[:, :, None] & _within(N, W, x.device)[:, None, :]).unsqueeze(1)
    return x * outside


def _within(num: int, size: int, device: torch.device) -> Tensor:
    length = (size + 1) // 2
    start = torch.randint(1 - length, size, (num, 1), device=device)
    place = torch.arange(size, device=device)
    return (place >= start) & (place < start + length)
