"""Flows: invertible maps that make a more flexible posterior of a Gaussian one."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lit_generative.recipe import Recorded

_GATE_BIAS = 2.0


class Flow(Recorded, nn.Module, ABC):
    """An invertible map of latents, whose change of volume is known.

    Attributes:
        latent_dim: Length of the latent, D.
    """

    latent_dim: int

    @abstractmethod
    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Move latents.

        Args:
            z: ``(K, N, D)``.

        Returns:
            The latents moved, ``(K, N, D)``, and ``log |det|`` of the Jacobian ``d moved / d z``, nats, ``(K, N)``.
        """


class InverseAutoregressiveFlow(Flow):
    """Steps that scale and move each dimension by what the dimensions before it say (IAF).

    A step is ``z' = sigmoid(s) * z + (1 - sigmoid(s)) * m``, with ``m`` and ``s`` of a masked perceptron: those of a
    dimension depend on the dimensions before it. Its Jacobian is triangular, so that ``log |det|`` is the sum of
    ``log sigmoid(s)``. The order of the dimensions is reversed from step to step, by the masks; each dimension keeps
    its place. The gate's bias starts at 2, so that a step begins near the identity.

    Here ``m`` and ``s`` see nothing of the image beside ``z``: the paper's encoder gives a context too, ours mean and
    logvar alone. One flow for all images is, up to a change of variables, an autoregressive prior that is learned
    under a Gaussian posterior (Chen et al. 2017, sec. 3.2, arXiv:1611.02731).

    Source: Kingma et al. 2016, sec. 4 and alg. 1 (arXiv:1606.04934); the masks: Germain et al. 2015, sec. 4
    (arXiv:1502.03509).

    Args:
        latent_dim: Length of the latent, D.
        hidden_dim: Width of the hidden layer of each step.
        num_steps: How many steps.

    Raises:
        ValueError: If a number is below 1, or ``hidden_dim`` below ``latent_dim - 1``.
    """

    def __init__(self, latent_dim: int, hidden_dim: int = 64, num_steps: int = 4) -> None:
        super().__init__()
        for name, value in (("latent_dim", latent_dim), ("hidden_dim", hidden_dim), ("num_steps", num_steps)):
            if value < 1:
                raise ValueError(f"InverseAutoregressiveFlow: {name} must be at least 1, got {value}.")
        if hidden_dim < latent_dim - 1:
            raise ValueError(
                f"InverseAutoregressiveFlow: hidden_dim must be at least latent_dim - 1 = {latent_dim - 1}, one unit "
                f"for each dimension that others depend on, got {hidden_dim}. Widen it."
            )
        self.latent_dim = latent_dim
        order = torch.arange(latent_dim)
        self.steps = nn.ModuleList(_Step(order if i % 2 == 0 else order.flip(0), hidden_dim) for i in range(num_steps))

    @override
    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        log_det = z.new_zeros(z.shape[:-1])
        for step in self.steps:
            z, change = step(z)
            log_det = log_det + change
        return z, log_det


class _Step(nn.Module):
    """One step, in which dimension ``i`` depends on those of smaller ``order``, ``(D,)``."""

    def __init__(self, order: Tensor, hidden_dim: int) -> None:
        super().__init__()
        unit_order = torch.arange(hidden_dim) % max(len(order) - 1, 1)
        self.hidden = _MaskedLinear(unit_order[:, None] >= order)
        self.output = _MaskedLinear(torch.cat([order, order])[:, None] > unit_order)
        with torch.no_grad():
            self.output.bias[len(order) :] = _GATE_BIAS

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        m, s = self.output(F.elu(self.hidden(z))).chunk(2, dim=-1)
        return torch.lerp(m, z, s.sigmoid()), F.logsigmoid(s).sum(dim=-1)


class _MaskedLinear(nn.Linear):
    """A linear layer with connections only where ``mask``, ``(outputs, inputs)``, says so."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__(mask.shape[1], mask.shape[0])
        self.register_buffer("mask", mask, persistent=False)

    @override
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight * self.mask, self.bias)
