"""What the network predicts, and how to read image and noise from it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor
from typing_extensions import override

from lit_generative.diffusion.schedules import NoiseSchedule
from lit_generative.recipe import Recorded


class Parameterization(Recorded, ABC):
    """Conversions; ``alpha`` and ``sigma`` broadcast to ``x_t = alpha * x0 + sigma * eps``.

    The image is linear in the network's output: ``x0 = something + output_scale * output``.
    """

    @abstractmethod
    def target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """What the network shall give, same shape as ``x0``."""

    @abstractmethod
    def to_x0(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Clean image that the network's output means, same shape as ``x_t``."""

    @abstractmethod
    def output_scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """``|d x0 / d output|``: an error of the output is so much larger as an error of the image."""

    def scale_input(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:  # noqa: ARG002
        """What the network sees of ``x_t``, same shape: all of it, unless a leaf says otherwise."""
        return x_t

    def check(self, schedule: NoiseSchedule) -> None:
        """Refuse a schedule that the prediction cannot be read under; takes any, unless a leaf says otherwise.

        Raises:
            ValueError: If it does not fit.
        """


class Epsilon(Parameterization):
    """The network predicts the noise.

    Source: Ho et al. 2020, eq. 12 and 15 (arXiv:2006.11239).
    """

    @override
    def target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return eps

    @override
    def to_x0(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (x_t - sigma * output) / alpha

    @override
    def output_scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return sigma / alpha

    @override
    def check(self, schedule: NoiseSchedule) -> None:
        if schedule.level(schedule.even_times(1)[0]).alpha == 0:
            raise ValueError(
                f"Epsilon: this {type(schedule).__name__} leaves nothing of the image at its noisiest time, where "
                "samplers start (alpha is 0): a network that finds the noise there says nothing of the image. Predict "
                "Velocity, FlowVelocity, CleanImage or EDMPreconditioning."
            )


class CleanImage(Parameterization):
    """The network predicts the image.

    Source: Ho et al. 2020, sec. 3.2 (arXiv:2006.11239); Salimans & Ho 2022, sec. 4 (arXiv:2202.00512).
    """

    @override
    def target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return x0

    @override
    def to_x0(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return output

    @override
    def output_scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return torch.ones_like(alpha)


class Velocity(Parameterization):
    """The network predicts ``v = alpha * eps - sigma * x0``.

    Made for schedules that preserve the variance; the division by ``alpha**2 + sigma**2``, then 1, makes it right for
    others too.

    Source: Salimans & Ho 2022, App. D (arXiv:2202.00512).
    """

    @override
    def target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return alpha * eps - sigma * x0

    @override
    def to_x0(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (alpha * x_t - sigma * output) / (alpha.square() + sigma.square())

    @override
    def output_scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return sigma / (alpha.square() + sigma.square())


class FlowVelocity(Parameterization):
    """The network predicts ``u = eps - x0``, the direction of the straight line from image to noise.

    Under :class:`~lit_generative.diffusion.continuous.RectifiedFlow` without shift that is ``d x_t / dt``; it can be
    read under any schedule, since ``x_t - sigma * u = (alpha + sigma) * x0``.

    Source: Liu et al. 2022, eq. 1 (arXiv:2209.03003); Lipman et al. 2023, sec. 4.1 (arXiv:2210.02747).
    """

    @override
    def target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return eps - x0

    @override
    def to_x0(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (x_t - sigma * output) / (alpha + sigma)

    @override
    def output_scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return sigma / (alpha + sigma)


class EDMPreconditioning(Parameterization):
    """The network predicts what makes ``x0 = c_skip * x_t + c_out * output``, and sees ``c_in * x_t``.

    Input and target have unit variance at every time if the data has variance ``sigma_data**2``; where there is little
    noise the image is nearly ``x_t``, and the network's errors count little.

    Source: Karras et al. 2022, eq. 7 and table 1, "network and preconditioning" (arXiv:2206.00364), for
    ``x_t / alpha`` with noise ``sigma / alpha``. Multiplied out, nothing is divided by ``alpha``, which may be 0. Their
    ``c_noise`` is the schedule's time here.

    Args:
        sigma_data: Standard deviation of the data.

    Raises:
        ValueError: If ``sigma_data`` is not positive and finite.
    """

    def __init__(self, sigma_data: float = 0.5) -> None:
        if not 0 < sigma_data < math.inf:
            raise ValueError(f"EDMPreconditioning: sigma_data must be positive and finite, got {sigma_data}.")
        self.sigma_data = sigma_data

    @override
    def target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        # (x0 - c_skip * x_t) / c_out; written so, it does not lose its digits where there is little noise.
        return (sigma / self.sigma_data * x0 - alpha * self.sigma_data * eps) / self._std(alpha, sigma)

    @override
    def to_x0(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        skip = alpha * self.sigma_data**2 / self._std(alpha, sigma).square()
        return skip * x_t + self.output_scale(alpha, sigma) * output

    @override
    def output_scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return sigma * self.sigma_data / self._std(alpha, sigma)

    @override
    def scale_input(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return x_t / self._std(alpha, sigma)

    def _std(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Standard deviation of ``x_t``."""
        return torch.hypot(alpha * self.sigma_data, sigma)
