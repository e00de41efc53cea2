"""Terms on the discriminator's gradient with respect to its input, added to its loss."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import override

from lit_generative.recipe import Recorded
from lit_generative.tensor_ops import expand_like

Discriminator = Callable[[Tensor], Tensor]
"""Images ``(N, ...)`` to logits ``(N,)``, or ``(N / m,)`` if it judges m at a time; labels are in it."""


class Penalty(Recorded, ABC):
    """Added at every ``every_n_steps``-th update of the discriminator, and then that many times as strong.

    So its mean over the updates does not depend on ``every_n_steps`` (lazy regularization: Karras et al. 2020, App. B,
    arXiv:1912.04958). Adam's rate and betas stay as they are given, unlike there.
    """

    every_n_steps: int = 1

    @property
    def name(self) -> str:
        """What it is logged as: ``gradient_penalty``, ``r1``."""
        return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(self).__name__).lower()

    def due(self, step: int) -> bool:
        """Whether it is added at the discriminator's update ``step``, counted from 0."""
        return step % self.every_n_steps == 0

    def share(self, step: int) -> float:  # noqa: ARG002  most do not change
        """How much of its strength it has at the discriminator's update ``step``; a factor."""
        return 1.0

    @abstractmethod
    def compute(self, discriminator: Discriminator, x: Tensor, x_hat: Tensor) -> Tensor:
        """The weighted term, for one update at which it is due.

        Args:
            discriminator: Images to logits.
            x: Data, ``(N, ...)`` float32.
            x_hat: Samples, ``(N, ...)`` float32, without a graph.

        Returns:
            One value for each logit, with a graph to the discriminator's weights.
        """


class GradientPenalty(Penalty):
    """``(|grad D| - target)^2`` somewhere between an image and a sample: what keeps a critic 1-Lipschitz (WGAN-GP).

    Source: Gulrajani et al. 2017, eq. 3 (arXiv:1704.00028); one-sided: Petzka et al. 2018 (arXiv:1709.08894).

    Args:
        weight: Strength, the paper's lambda.
        one_sided: Whether norms below ``target`` are free.
        target: The norm aimed at.
        every_n_steps: Updates of the discriminator from one use to the next.

    Raises:
        ValueError: If ``weight`` is not positive, ``target`` negative, or ``every_n_steps`` below 1.
    """

    def __init__(
        self, weight: float = 10.0, one_sided: bool = False, target: float = 1.0, every_n_steps: int = 1
    ) -> None:
        _check("GradientPenalty", "weight", weight, every_n_steps, target)
        self.weight = weight
        self.one_sided = one_sided
        self.target = target
        self.every_n_steps = every_n_steps

    @override
    def compute(self, discriminator: Discriminator, x: Tensor, x_hat: Tensor) -> Tensor:
        if x.shape != x_hat.shape:
            raise ValueError(
                f"GradientPenalty: each image is joined to a sample, so both must have one shape, got {tuple(x.shape)} "
                f"and {tuple(x_hat.shape)}. Draw as many samples as there are images."
            )
        excess = _norm(discriminator, torch.lerp(x, x_hat, _share(x))) - self.target
        if self.one_sided:
            excess = excess.relu()
        return self.weight * self.every_n_steps * excess.square()


class DRAGAN(Penalty):
    """``(|grad D| - target)^2`` near the data only, which needs no samples.

    Source: Kodali et al. 2017 (arXiv:1705.07215), with the noise of the authors' code: uniform, of a reach that follows
    the batch, and a part of it drawn for each image. The paper writes Gaussian noise of a fixed size.

    Args:
        weight: Strength, the paper's lambda.
        std_scale: Reach of the noise, in standard deviations of all values of the batch.
        target: The norm aimed at, the paper's k.
        every_n_steps: Updates of the discriminator from one use to the next.

    Raises:
        ValueError: If ``weight`` or ``std_scale`` is not positive, ``target`` negative, or ``every_n_steps`` below 1.
    """

    def __init__(
        self, weight: float = 10.0, std_scale: float = 0.5, target: float = 1.0, every_n_steps: int = 1
    ) -> None:
        _check("DRAGAN", "weight", weight, every_n_steps, target)
        if std_scale <= 0:
            raise ValueError(f"DRAGAN: std_scale must be positive, got {std_scale}. For the data itself there is R1.")
        self.weight = weight
        self.std_scale = std_scale
        self.target = target
        self.every_n_steps = every_n_steps

    @override
    def compute(self, discriminator: Discriminator, x: Tensor, x_hat: Tensor) -> Tensor:
        noise = self.std_scale * x.std(correction=0) * torch.rand_like(x)
        excess = _norm(discriminator, x + _share(x) * noise) - self.target
        return self.weight * self.every_n_steps * excess.square()


class R1(Penalty):
    """``gamma / 2 |grad D|^2`` at the data.

    Source: Mescheder, Geiger & Nowozin 2018, eq. 9 (arXiv:1801.04406).

    Args:
        gamma: Strength; larger images want a larger one.
        every_n_steps: Updates of the discriminator from one use to the next; 16 in StyleGAN2.

    Raises:
        ValueError: If ``gamma`` is not positive, or ``every_n_steps`` below 1.
    """

    def __init__(self, gamma: float, every_n_steps: int = 1) -> None:
        _check("R1", "gamma", gamma, every_n_steps)
        self.gamma = gamma
        self.every_n_steps = every_n_steps

    @override
    def compute(self, discriminator: Discriminator, x: Tensor, x_hat: Tensor) -> Tensor:
        return 0.5 * self.gamma * self.every_n_steps * _squared_norm(discriminator, x)


class R2(Penalty):
    """``gamma / 2 |grad D|^2`` at the samples.

    Source: Mescheder, Geiger & Nowozin 2018, sec. 4.1 (arXiv:1801.04406).

    Args:
        gamma: Strength; larger images want a larger one.
        every_n_steps: Updates of the discriminator from one use to the next.

    Raises:
        ValueError: If ``gamma`` is not positive, or ``every_n_steps`` below 1.
    """

    def __init__(self, gamma: float, every_n_steps: int = 1) -> None:
        _check("R2", "gamma", gamma, every_n_steps)
        self.gamma = gamma
        self.every_n_steps = every_n_steps

    @override
    def compute(self, discriminator: Discriminator, x: Tensor, x_hat: Tensor) -> Tensor:
        return 0.5 * self.gamma * self.every_n_steps * _squared_norm(discriminator, x_hat)


def has_batch_norm(module: nn.Module) -> bool:
    """Whether a verdict depends on the rest of its batch, so that a penalty for each example means little."""
    return any(isinstance(layer, _BatchNorm) for layer in module.modules())


def _share(x: Tensor) -> Tensor:
    """Uniform in ``[0, 1)``, one for each example: ``(N, 1, ..., 1)``."""
    return expand_like(torch.rand(len(x), device=x.device, dtype=x.dtype), x)


def _squared_norm(discriminator: Discriminator, inputs: Tensor) -> Tensor:
    """Squared norm of each logit's gradient with respect to all that it judges: ``(N,)``, or ``(N / m,)``."""
    inputs = inputs.detach().requires_grad_()
    logits = discriminator(inputs)
    (gradient,) = torch.autograd.grad(logits.sum(), inputs, create_graph=True)
    return gradient.reshape(len(logits), -1).square().sum(dim=1)


def _norm(discriminator: Discriminator, inputs: Tensor) -> Tensor:
    # The root's slope is infinite at zero, where a new or a saturated discriminator may be.
    return (_squared_norm(discriminator, inputs) + 1e-12).sqrt()


def _check(who: str, name: str, strength: float, every_n_steps: int, target: float = 0.0) -> None:
    if strength <= 0:
        raise ValueError(f"{who}: {name} must be positive, got {strength}. Leave the penalty out to turn it off.")
    if target < 0:
        raise ValueError(f"{who}: target is a norm, so it must not be negative, got {target}. The paper uses 1.")
    if every_n_steps < 1:
        raise ValueError(f"{who}: every_n_steps must be at least 1, got {every_n_steps}. 1 is at every update.")
