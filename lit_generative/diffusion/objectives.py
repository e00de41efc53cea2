"""What the network minimizes: one value for each example."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor
from typing_extensions import override

from lit_generative.diffusion.bounds import Decoder, DiscretizedGaussian, vlb_term
from lit_generative.diffusion.parameterizations import Parameterization
from lit_generative.diffusion.schedules import DiscreteSchedule, NoiseSchedule
from lit_generative.diffusion.variances import between, training_variances
from lit_generative.diffusion.weightings import Uniform, Weighting
from lit_generative.recipe import Recorded
from lit_generative.tensor_ops import expand_like


@dataclass(frozen=True)
class Prediction:
    """What an objective is made of: a noisy batch, and what the network said of it.

    Args:
        x0: Clean data, ``(N, ...)``.
        eps: The noise in ``x_t``, same shape.
        x_t: The noisy batch, same shape.
        t: Its times, ``(N,)``.
        output: What the network predicts, same shape as ``x0``, float32.
        variance: What it says of the variance of the step down, same shape, if it does.
        schedule: Where ``t`` is from.
        parameterization: What ``output`` means.
    """

    x0: Tensor
    eps: Tensor
    x_t: Tensor
    t: Tensor
    output: Tensor
    variance: Tensor | None
    schedule: NoiseSchedule
    parameterization: Parameterization

    @cached_property
    def alpha_sigma(self) -> tuple[Tensor, Tensor]:
        """Factors of image and noise, ``(N,)``."""
        return self.schedule.alpha_sigma(self.t)

    @cached_property
    def x0_hat(self) -> Tensor:
        """The image that the output means, same shape as ``x0``."""
        alpha, sigma = (expand_like(value, self.x0) for value in self.alpha_sigma)
        return self.parameterization.to_x0(self.output, self.x_t, alpha, sigma)

    @cached_property
    def error(self) -> Tensor:
        """Squared error of the output, a mean over its values, ``(N,)``."""
        alpha, sigma = (expand_like(value, self.x0) for value in self.alpha_sigma)
        target = self.parameterization.target(self.x0, self.eps, alpha, sigma)
        return (self.output - target).square().flatten(start_dim=1).mean(dim=1)


class DenoisingObjective(Recorded, ABC):
    """A loss.

    Attributes:
        learns_variance: Whether the network must give twice the channels, for the variance of a step down.
    """

    learns_variance: bool = False

    @abstractmethod
    def loss(self, prediction: Prediction) -> Tensor:
        """What is minimized, ``(N,)``."""

    def check(self, schedule: NoiseSchedule) -> None:
        """Refuse a schedule that the loss cannot be had with.

        Raises:
            ValueError: If a bound has no numbered steps to be summed over.
        """

    def terms(self, prediction: Prediction) -> dict[str, Tensor]:  # noqa: ARG002
        """Parts of the loss to be logged by name, each ``(N,)``; none, unless a leaf says otherwise."""
        return {}

    def losses(self, prediction: Prediction) -> dict[str, Tensor]:
        """What is minimized, as ``loss``, and its parts, each computed once."""
        return {"loss": self.loss(prediction), **self.terms(prediction)}


class Simple(DenoisingObjective):
    """The weighted squared error of what the network predicts.

    Source: Ho et al. 2020, eq. 14 (arXiv:2006.11239), as a mean over pixels.

    Args:
        weighting: How much an error counts at each noise level; None counts all the same.
    """

    def __init__(self, weighting: Weighting | None = None) -> None:
        self.weighting = Uniform() if weighting is None else weighting

    @override
    def loss(self, prediction: Prediction) -> Tensor:
        alpha, sigma = prediction.alpha_sigma
        scale = prediction.parameterization.output_scale(alpha, sigma)
        return self.weighting.weight(alpha, sigma, scale) * prediction.error


class Hybrid(DenoisingObjective):
    """``L_simple + vlb_weight * L_vlb``: the mean learns from the first, the variance from the second alone.

    L_vlb is the bound on the negative log-likelihood, without the prior's constant, in bits per dimension: the number
    of noise levels times the term at the time drawn. In this unit the paper's code has it too; there a factor of
    ``num_timesteps / 1000`` stands for the weight of 0.001.

    Source: Nichol & Dhariwal 2021, eq. 16 (arXiv:2102.09672).

    Args:
        vlb_weight: The paper's lambda.
        weighting: Of L_simple, as in :class:`Simple`.
        decoder: What the last step says of the data; None for 8-bit pixels. Points and latents need
            :class:`~lit_generative.diffusion.bounds.ContinuousGaussian`.

    Raises:
        ValueError: If ``vlb_weight`` is not positive and finite; if the schedule has no steps, the network says nothing
            of the variance, or the decoder refuses the first batch.
    """

    learns_variance = True

    def __init__(
        self, vlb_weight: float = 0.001, weighting: Weighting | None = None, decoder: Decoder | None = None
    ) -> None:
        if not 0 < vlb_weight < math.inf:
            raise ValueError(
                f"Hybrid: vlb_weight must be positive and finite, got {vlb_weight}. Take Simple to learn no variance."
            )
        self.vlb_weight = vlb_weight
        self.simple = Simple(weighting)
        self.bound = VariationalBoundObjective(decoder)

    @override
    def check(self, schedule: NoiseSchedule) -> None:
        self.bound.check(schedule)

    @override
    def loss(self, prediction: Prediction) -> Tensor:
        return self.losses(prediction)["loss"]

    @override
    def losses(self, prediction: Prediction) -> dict[str, Tensor]:
        terms = self.terms(prediction)
        return {"loss": terms["simple"] + self.vlb_weight * terms["vlb_bits_per_dim"], **terms}

    @override
    def terms(self, prediction: Prediction) -> dict[str, Tensor]:
        frozen_mean = replace(prediction, output=prediction.output.detach())
        return {"simple": self.simple.loss(prediction), "vlb_bits_per_dim": self.bound.loss(frozen_mean)}


class VariationalBoundObjective(DenoisingObjective):
    """The bound on the negative log-likelihood, L_vlb, in bits per dimension, without the prior's constant.

    Its estimate is the number of noise levels times the term at the time drawn, which varies much between times:
    :class:`~lit_generative.diffusion.times.LossSecondMoment` draws them accordingly.

    Source: Ho et al. 2020, eq. 5 (arXiv:2006.11239), with the variance of Nichol & Dhariwal 2021, eq. 15
    (arXiv:2102.09672).

    Args:
        decoder: As in :class:`Hybrid`.

    Raises:
        ValueError: As in :class:`Hybrid`.
    """

    learns_variance = True

    def __init__(self, decoder: Decoder | None = None) -> None:
        self.decoder = DiscretizedGaussian() if decoder is None else decoder
        self._checked = False

    @override
    def check(self, schedule: NoiseSchedule) -> None:
        if not isinstance(schedule, DiscreteSchedule):
            raise _without_steps(schedule)

    @override
    def loss(self, prediction: Prediction) -> Tensor:
        x0, t, schedule, raw = prediction.x0, prediction.t, prediction.schedule, prediction.variance
        if not isinstance(schedule, DiscreteSchedule):
            raise _without_steps(schedule)
        if raw is None:
            raise ValueError(
                "L_vlb: the network must say something of the variance, in C more channels, and this one says nothing. "
                "Set its learned_variance to true."
            )
        if not self._checked:
            self.decoder.check(x0)
            self._checked = True
        log_beta, log_beta_tilde = (expand_like(value, x0) for value in training_variances(schedule, t))
        log_variance = between(raw, log_beta, log_beta_tilde)
        nats = vlb_term(x0, prediction.x0_hat, t, log_variance, schedule, self.decoder)
        return schedule.num_timesteps * nats / (x0[0].numel() * math.log(2))


def _without_steps(schedule: NoiseSchedule) -> ValueError:
    return ValueError(
        f"L_vlb: the bound is a sum over numbered steps, and {type(schedule).__name__} has none. Take a discrete "
        "schedule, or the objective Simple."
    )
