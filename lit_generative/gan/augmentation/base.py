"""What an augmentation is."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from lit_generative.recipe import Recorded


class Augmentation(Recorded, nn.Module, ABC):
    """Changes images, real ones and samples alike, before the discriminator sees them."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Change images ``(N, C, H, W)``, or points ``(N, 2)``, differentiably."""

    def observe(self, real_logits: Tensor, num_images: int) -> None:
        """Look at an update of the discriminator.

        Args:
            real_logits: Verdicts on data, in this process, ``(N,)``.
            num_images: Real images of the update, over all processes.
        """

    def quantities(self) -> dict[str, Tensor]:
        """Scalars by name, to be logged with the losses; none unless an augmentation adapts itself."""
        return {}
