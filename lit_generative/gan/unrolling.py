"""A generator that looks ahead."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from lit_generative.recipe import Recorded

Weights = Mapping[str, Tensor]
"""A network's parameters by name."""


class Unrolling(Recorded):
    """The generator learns from the discriminator that would come after ``steps`` more updates on the same batch.

    The gradient goes through those updates, so that the generator feels how the discriminator would answer, and gains
    nothing by crowding its samples where the present one is wrong. The discriminator itself stays where it is.

    Source: Metz et al. 2017, sec. 2.2, eq. 4 to 6 (arXiv:1611.02163). As written there, the updates are those of plain
    gradient descent, whatever the discriminator's own optimizer is. Penalties are no part of them.

    Args:
        steps: Updates to look ahead, the paper's K; each costs about three passes of the discriminator, and its memory.
        lr: Their learning rate.

    Raises:
        ValueError: If ``steps`` is below 1 or ``lr`` not positive.
    """

    def __init__(self, steps: int = 5, lr: float = 0.1) -> None:
        if steps < 1:
            raise ValueError(f"Unrolling: steps must be at least 1, got {steps}. Leave the unrolling out for none.")
        if lr <= 0:
            raise ValueError(f"Unrolling: lr must be positive, got {lr}.")
        self.steps, self.lr = steps, lr

    def look_ahead(self, discriminator: nn.Module, loss: Callable[[Weights], Tensor]) -> Weights:
        """The discriminator's weights after its next updates.

        Args:
            discriminator: Is not changed, nor do its parameters get a gradient.
            loss: The discriminator's loss with given weights, a scalar with a graph to the samples.

        Returns:
            Its parameters by name, with a graph to whatever ``loss`` depends on.
        """
        weights = {name: p.detach().requires_grad_() for name, p in discriminator.named_parameters()}
        with torch.enable_grad():
            for _ in range(self.steps):
                slopes = torch.autograd.grad(loss(weights), list(weights.values()), create_graph=True)
                weights = {name: w - self.lr * g for (name, w), g in zip(weights.items(), slopes, strict=True)}
        return weights
