"""Adaptive discriminator augmentation (ADA): as much augmentation as overfitting asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
import torch.distributed
from torch import Tensor
from typing_extensions import override

from lit_generative.gan.augmentation.base import Augmentation
from lit_generative.gan.augmentation.draws import Draws
from lit_generative.gan.augmentation.recoloring import recolor
from lit_generative.gan.augmentation.warping import warp
from lit_generative.tensor_ops import full_precision, to_float32

Geometry = Literal["x_flip", "rotate_90", "translate_integer", "scale", "rotate", "scale_anisotropic", "translate"]
Color = Literal["brightness", "contrast", "luma_flip", "hue", "saturation"]
Operation = Literal[Geometry, Color]
OPERATIONS: tuple[Operation, ...] = (*get_args(Geometry), *get_args(Color))


class AdaptiveAugmentation(Augmentation):
    """Each operation acts on an image with probability ``p``, which rises while the discriminator overfits.

    Overfitting is measured by ``r_t = E[sign(D(real))]``, near 1 when all data is judged real with certainty. After
    ``interval`` updates of the discriminator, ``p`` goes up if ``r_t`` is above ``target``, and down if it is below.

    Source: Karras et al. 2020, sec. 3 and app. B (arXiv:2006.06676); their set "bgc". It is for losses whose logit is 0
    where the discriminator is undecided: not Wasserstein, nor the relativistic ones.

    Augmentations do not leak into samples while ``p`` is below about 0.8 (sec. 2.2); above, an operation that acts
    on nearly every image is learned as part of the data. Leave out what the data's meaning does not bear, as ``x_flip``
    for digits: then a leak does no harm.

    On a grey image only brightness, contrast and luma flip of the colours are there. It acts in validation too, where
    the discriminator is asked about images of the kind it knows.

    With ``Trainer(deterministic=True)`` on a GPU torch refuses the gradient of resampling: use ``deterministic: warn``,
    or colour operations alone.

    Args:
        target: ``r_t`` that ``p`` steers to.
        interval: Updates of the discriminator between two changes of ``p``.
        adjust_images: Real images in which ``p`` can go from 0 to 1.
        initial_p: ``p`` at the start.
        operations: Which; all of them by default.

    Attributes:
        p: Probability of each operation, a scalar.
        overfitting: The last ``r_t``, a scalar; 0 until there is one.

    Raises:
        ValueError: If a number is out of range, or an operation unknown; for batches of points, images that are
            neither grey nor RGB under colour operations, and images that are not square under ``rotate_90``.
    """

    p: Tensor
    overfitting: Tensor
    signs: Tensor
    images: Tensor
    observations: Tensor

    def __init__(
        self,
        target: float = 0.6,
        interval: int = 4,
        adjust_images: int = 500_000,
        initial_p: float = 0.0,
        operations: Sequence[Operation] = OPERATIONS,
    ) -> None:
        super().__init__()
        if not -1 < target < 1:
            raise ValueError(
                f"AdaptiveAugmentation: target must lie between -1 and 1, got {target}. The paper's is 0.6."
            )
        for name, count in (("interval", interval), ("adjust_images", adjust_images)):
            if count < 1:
                raise ValueError(f"AdaptiveAugmentation: {name} must be at least 1, got {count}.")
        if not 0 <= initial_p <= 1:
            raise ValueError(f"AdaptiveAugmentation: initial_p must lie in [0, 1], got {initial_p}.")
        if not operations or any(name not in OPERATIONS for name in operations):
            raise ValueError(
                f"AdaptiveAugmentation: operations must be some of {OPERATIONS}, got {list(operations)}. "
                "Leave the augmentation out for none."
            )
        self.target = target
        self.interval = interval
        self.adjust_images = adjust_images
        self.operations = list(operations)
        self.register_buffer("p", torch.tensor(float(initial_p)))
        self.register_buffer("overfitting", torch.tensor(0.0))
        self.register_buffer("signs", torch.zeros(2))  # their sum and their number since p last changed
        self.register_buffer("images", torch.tensor(0, dtype=torch.int64))
        self.register_buffer("observations", torch.tensor(0, dtype=torch.int64))
        self._observations: int | None = None  # the same, where asking makes nobody wait

    # ---- images

    @override
    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        with full_precision(x.device):
            images: Tensor = to_float32(x)
            draws = Draws(images, self.p)
            if any(name in get_args(Geometry) for name in self.operations):
                images = warp(images, draws, self.operations)
            if any(name in get_args(Color) for name in self.operations):
                images = recolor(images, draws, self.operations)
        return images.to(x.dtype)

    def _check(self, x: Tensor) -> None:
        if x.ndim != 4:
            raise ValueError(
                f"AdaptiveAugmentation: needs images (N, C, H, W), got {tuple(x.shape)}. Leave it out for points."
            )
        _, C, H, W = x.shape
        colors = [name for name in self.operations if name in get_args(Color)]
        if colors and C not in (1, 3):
            raise ValueError(f"AdaptiveAugmentation: {colors} need 1 or 3 channels, got {C}. Leave them out.")
        if H != W and "rotate_90" in self.operations:
            raise ValueError(
                f"AdaptiveAugmentation: rotate_90 needs square images, got {H}x{W}. Leave it out of operations."
            )

    # ---- controller

    @override
    @torch.no_grad()
    def observe(self, real_logits: Tensor, num_images: int) -> None:
        signs = torch.zeros_like(self.signs)
        signs[0] = real_logits.sign().sum()
        signs[1] = len(real_logits)
        # At each update: DDP gives every process the first one's buffers before each step, so sums of their own would
        # be lost, and a checkpoint holds the first one's alone.
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(signs)
        self.signs += signs
        self.images += num_images
        self.observations += 1
        if self._observations is None:
            self._observations = int(self.observations)
        else:
            self._observations += 1
        if self._observations >= self.interval:
            self._adjust()

    @override
    def quantities(self) -> dict[str, Tensor]:
        return {"augmentation_p": self.p, "overfitting": self.overfitting}

    def _adjust(self) -> None:
        self.overfitting.copy_(self.signs[0] / self.signs[1])
        step = (self.overfitting - self.target).sign() * self.images / self.adjust_images
        self.p.add_(step).clamp_(0.0, 1.0)
        for buffer in (self.signs, self.images, self.observations):
            buffer.zero_()
        self._observations = 0

    @override
    def _load_from_state_dict(self, state_dict: Mapping[str, Any], *args: Any) -> None:  # type: ignore[override]
        super()._load_from_state_dict(state_dict, *args)
        self._observations = None
