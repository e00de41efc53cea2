"""What is done to the discriminator's weights after each of its updates."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from typing_extensions import override

from lit_generative.recipe import Recorded


class Constraint(Recorded, ABC):
    """Keeps the discriminator in a set of functions."""

    @abstractmethod
    def apply(self, discriminator: nn.Module) -> None:
        """Change its weights in place."""


class WeightClipping(Constraint):
    """Clips every trained parameter to ``[-limit, limit]``, which makes the critic Lipschitz; buffers stay as they are.

    Source: Arjovsky et al. 2017, algorithm 1 (arXiv:1701.07875).

    Args:
        limit: Largest absolute value of a weight.

    Raises:
        ValueError: If ``limit`` is not positive.
    """

    def __init__(self, limit: float = 0.01) -> None:
        if limit <= 0:
            raise ValueError(f"WeightClipping: limit must be positive, got {limit}. The paper uses 0.01.")
        self.limit = limit

    @override
    @torch.no_grad()
    def apply(self, discriminator: nn.Module) -> None:
        trained: list[Tensor] = [p for p in discriminator.parameters() if p.requires_grad]
        if trained:
            torch._foreach_clamp_min_(trained, -self.limit)
            torch._foreach_clamp_max_(trained, self.limit)
