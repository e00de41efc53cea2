"""A discriminator that judges overlapping patches of an image, each by a logit of its own.

Source: Isola et al. 2017 (arXiv:1611.07004), sec. 3.2.2 and app. 6.1.2: 4x4 convolutions, strided but for the last two,
leaky ReLU of slope 0.2, batch norm on all but the first and the last; weights from ``N(0, 0.02**2)``.
"""

from __future__ import annotations

from torch import Tensor, nn

from lit_generative.networks.checks import check_shape
from lit_generative.recipe import Recorded

_MAX_WIDENING = 8


class PatchDiscriminator(Recorded, nn.Module):
    """Images to a map of logits; with three stages each sees 70 x 70 pixels, as in the paper.

    Args:
        image_size: Height and width in pixels; at least ``3 * 2**num_stages``.
        channels: Image channels.
        width: Channels of the first stage; each further layer doubles them, up to ``8 * width``.
        num_stages: How often the size is halved.
        batch_norm: False if a verdict shall not depend on the rest of the batch.

    Raises:
        ValueError: If there is no stage, or ``image_size`` leaves no patch.
    """

    def __init__(
        self, image_size: int, channels: int, width: int = 64, num_stages: int = 3, batch_norm: bool = True
    ) -> None:
        super().__init__()
        if num_stages < 1:
            raise ValueError(f"PatchDiscriminator: num_stages must be at least 1, got {num_stages}.")
        if image_size < 3 * 2**num_stages:
            raise ValueError(
                f"PatchDiscriminator: image_size must be at least {3 * 2**num_stages} for num_stages={num_stages}, got "
                f"{image_size}. Take fewer stages."
            )
        self.sample_shape = (channels, image_size, image_size)
        self.num_classes: int | None = None
        widths = [width * min(2**i, _MAX_WIDENING) for i in range(num_stages + 1)]
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(zip([channels, *widths[:-1]], widths, strict=True)):
            normalized = batch_norm and i > 0
            stride = 2 if i < num_stages else 1
            layers.append(nn.Conv2d(before, after, 4, stride=stride, padding=1, bias=not normalized))
            layers += [nn.BatchNorm2d(after)] if normalized else []
            layers.append(nn.LeakyReLU(0.2, inplace=True))
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.layers.apply(_initialize)

    def forward(self, x: Tensor) -> Tensor:
        """Judge images.

        Args:
            x: Images in ``[-1, 1]``, ``(N, C, H, W)``.

        Returns:
            Logits, large for real, ``(N, h, w)`` with ``h = H / 2**num_stages - 2`` (rounded down before the 2).

        Raises:
            ValueError: If ``x`` has another shape.
        """
        check_shape(self, x, self.sample_shape)
        logits: Tensor = self.layers(x).squeeze(dim=1)
        return logits


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
