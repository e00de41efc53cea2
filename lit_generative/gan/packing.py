"""A discriminator that judges several images at a time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lit_generative.recipe import Recorded


class Packing(Recorded, nn.Module):
    """Joins ``num_packed`` images in a row along their channels, and gives one verdict on all: repeats give fakes away.

    A batch must be a multiple of ``num_packed`` in training. In evaluation mode a last pack that is not full is filled
    with the batch's first images, so that held-out sets of any size are judged.

    Source: Lin et al. 2018, PacGAN, sec. 2 (arXiv:1712.04086). The paper draws each pack anew; a shuffled batch does.

    Args:
        discriminator: Built for ``num_packed`` times the channels (or features of a point), and without classes: a
            pack holds images of several. Its ``sample_shape`` becomes this module's, divided, and is None from then on.
        num_packed: Images in a pack; the paper uses 2 to 4.

    Raises:
        ValueError: If ``num_packed`` is below 1, or the discriminator has classes or other channels.
    """

    def __init__(self, discriminator: nn.Module, num_packed: int) -> None:
        super().__init__()
        name = type(discriminator).__name__
        if num_packed < 1:
            raise ValueError(f"Packing: num_packed must be at least 1, got {num_packed}. The paper uses 2 to 4.")
        num_classes = getattr(discriminator, "num_classes", None)
        if num_classes is not None:
            raise ValueError(
                f"Packing: needs an unconditional discriminator, for a pack holds images of several classes, got a "
                f"{name} with num_classes={num_classes}. Leave num_classes out, or Packing."
            )
        self.num_classes: int | None = None
        self.num_packed = num_packed
        shape = getattr(discriminator, "sample_shape", None)
        if isinstance(shape, tuple):
            if shape[0] % num_packed:
                raise ValueError(
                    f"Packing: the discriminator must take num_packed={num_packed} times the data's channels, got a "
                    f"{name} for shape {shape}. Multiply its channels (of points: input_dim) by {num_packed}."
                )
            self.sample_shape = (shape[0] // num_packed, *shape[1:])
            for module in discriminator.modules():  # what is compared with the data is this module's shape, not theirs
                if getattr(module, "sample_shape", None) == shape:
                    module.sample_shape = None  # type: ignore[assignment]
        self.discriminator = discriminator

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Judge packs.

        Args:
            x: Images ``(N, C, H, W)`` or points ``(N, D)``.
            y: None: packs have no class.

        Returns:
            Logits ``(N / num_packed,)``; the i-th is on the i-th ``num_packed`` images in a row.

        Raises:
            ValueError: If ``y`` is given, or ``N`` is no multiple of ``num_packed`` in training.
        """
        m = self.num_packed
        if y is not None:
            raise ValueError(f"Packing: packs have no class, got labels of shape {tuple(y.shape)}. Pass y=None.")
        if missing := -len(x) % m:
            if self.training:
                raise ValueError(
                    f"Packing: {len(x)} images do not fill packs of {m}. Make the data's batch_size a multiple of {m} "
                    "times discriminator_steps times accumulate_grad_batches, with drop_last."
                )
            x = torch.cat([x, x[torch.arange(missing, device=x.device) % len(x)]])
        packs = x.reshape(len(x) // m, m * x.shape[1], *x.shape[2:])
        logits: Tensor = self.discriminator(packs)
        return logits
