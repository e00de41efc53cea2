"""What the decoder's output means: log-likelihoods of images in ``[-1, 1]``, in nats per example.

The Gaussians whose variance is found are in ``gaussians.py``, distributions of 8-bit pixels in ``discretized.py``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lit_generative.recipe import Recorded
from lit_generative.tensor_ops import sum_per_example

TOLERANCE = 1e-4


class Likelihood(Recorded, ABC):
    """Distribution of an image, given what the decoder says of it: P numbers for each of its values."""

    parameters_per_value: int = 1
    """P: the decoder gives P * C channels, all C of the first number before those of the second."""

    discrete: bool = False
    """Whether ``log_prob`` is the log-probability of 8-bit pixels, so that bits per dimension are defined."""

    @abstractmethod
    def log_prob(self, output: Tensor, x: Tensor) -> Tensor:
        """Log-likelihood of ``x``.

        Args:
            output: The decoder's output, ``(N, P * C, H, W)`` (any real numbers).
            x: Images in ``[-1, 1]``, ``(N, C, H, W)``.

        Returns:
            Nats per example, ``(N,)``: summed over pixels, never averaged.

        Raises:
            ValueError: If the shapes do not fit each other.
        """

    @abstractmethod
    def mean(self, output: Tensor) -> Tensor:
        """Expected image in ``[-1, 1]``, ``(N, C, H, W)``."""

    def check(self, x: Tensor) -> None:
        """Refuse images that cannot be scored. Reads numbers off the device: for a first batch, not for each.

        Args:
            x: Images, ``(N, C, H, W)``.

        Raises:
            ValueError: If a value is none that the distribution knows.
        """

    def unpack(self, output: Tensor, x: Tensor | None = None) -> Tensor:
        """Tell the decoder's numbers apart.

        Args:
            output: The decoder's output, ``(N, P * C, H, W)``.
            x: The images it shall describe, ``(N, C, H, W)``, if there are some.

        Returns:
            ``(P, N, C, H, W)``.

        Raises:
            ValueError: If P does not divide the channels, or the shape does not fit ``x``.
        """
        num, got = self.parameters_per_value, tuple(output.shape)
        image = (got[0], got[1] // num, *got[2:]) if x is None else tuple(x.shape)
        expected = (image[0], num * image[1], *image[2:])
        if got != expected:
            given = "" if x is None else f", {expected} for images {image}"
            raise ValueError(
                f"{type(self).__name__}: the decoder must give {num} numbers for each value of the image{given}, "
                f"got {got}. Build it with the channels and image_size of the data and with "
                f"parameters_per_value={num}, as ConvDecoder takes them."
            )
        return output.unflatten(1, (num, got[1] // num)).movedim(1, 0)


class Bernoulli(Likelihood):
    """Each pixel, brought to ``[0, 1]``, is the probability of a one; the decoder gives logits.

    Exact for binary images; for grey levels it is the usual cross-entropy and no likelihood of the levels.

    Source: Kingma & Welling 2014, App. C.1 (arXiv:1312.6114).
    """

    @override
    def log_prob(self, output: Tensor, x: Tensor) -> Tensor:
        (logits,) = self.unpack(output, x)
        return -sum_per_example(F.binary_cross_entropy_with_logits(logits, 0.5 * (x + 1), reduction="none"))

    @override
    def mean(self, output: Tensor) -> Tensor:
        (logits,) = self.unpack(output)
        return 2 * torch.sigmoid(logits) - 1

    @override
    def check(self, x: Tensor) -> None:
        check_unit_interval(self, x)


class ContinuousBernoulli(Likelihood):
    """Each pixel, brought to ``[0, 1]``, has there a density proportional to ``exp(logit * pixel)``.

    Unlike :class:`Bernoulli` a likelihood of grey levels. It is a density, of pixels on ``[0, 1]``: its logarithm may
    be positive, and is ``log 2`` a value above that on ``[-1, 1]``.

    Written in logits, not in the paper's probabilities: these round to 0 or 1 beyond a logit of 16 in float32, where
    ``torch.distributions.ContinuousBernoulli`` no longer integrates to one.

    Source: Loaiza-Ganem & Cunningham 2019, sec. 3 (arXiv:1907.06845).
    """

    @override
    def log_prob(self, output: Tensor, x: Tensor) -> Tensor:
        (logits,) = self.unpack(output, x)
        log_bernoulli = -F.binary_cross_entropy_with_logits(logits, 0.5 * (x + 1), reduction="none")
        return sum_per_example(log_bernoulli + _log_normalizer(0.5 * logits))

    @override
    def mean(self, output: Tensor) -> Tensor:
        (logits,) = self.unpack(output)
        u = 0.5 * logits
        near_zero = u.abs() < _SERIES_BELOW
        safe = torch.where(near_zero, 1.0, u)
        # the paper's mean, of a pixel in [-1, 1]: coth(u) - 1/u
        return torch.where(near_zero, u / 3 - u**3 / 45 + 2 * u**5 / 945, 1 / safe.tanh() - 1 / safe)

    @override
    def check(self, x: Tensor) -> None:
        check_unit_interval(self, x)


class Gaussian(Likelihood):
    """Each pixel has a normal density around the decoder's output.

    Source: Kingma & Welling 2014, App. C.2 (arXiv:1312.6114), with a fixed variance.

    Args:
        sigma: Standard deviation, in units of the ``[-1, 1]`` scale.

    Raises:
        ValueError: If ``sigma`` is not positive.
    """

    def __init__(self, sigma: float = 0.1) -> None:
        check_positive(self, "sigma", sigma)
        self.sigma = sigma

    @override
    def log_prob(self, output: Tensor, x: Tensor) -> Tensor:
        (mean,) = self.unpack(output, x)
        return normal_log_density((x - mean) / self.sigma, math.log(self.sigma))

    @override
    def mean(self, output: Tensor) -> Tensor:
        (mean,) = self.unpack(output)
        return mean.clamp(-1, 1)


def normal_log_density(z: Tensor, log_sigma: Tensor | float) -> Tensor:
    """Log-density of independent normal values.

    Args:
        z: Their distance from the mean in standard deviations, ``(N, C, H, W)``.
        log_sigma: Logarithm of the standard deviation, broadcastable to ``z``.

    Returns:
        Nats per example, ``(N,)``.
    """
    return -sum_per_example(0.5 * z.square() + log_sigma + 0.5 * math.log(2 * math.pi))


def soft_floor(values: Tensor, floor: float) -> Tensor:
    """Bound ``values`` from below, smoothly: ``floor + softplus(values - floor)``, so that a gradient is left."""
    return floor + F.softplus(values - floor)


def check_positive(likelihood: Likelihood, name: str, value: float) -> None:
    """Refuse an argument that is not positive.

    Raises:
        ValueError: If ``value`` is zero, negative or NaN.
    """
    if not value > 0:
        raise ValueError(f"{type(likelihood).__name__}: {name} must be positive, got {value}.")


def check_first(likelihood: Likelihood, x: Tensor, stage: str, seen: set[str]) -> None:
    """:meth:`Likelihood.check` of the first batch of a stage alone, since it waits for the device.

    Args:
        likelihood: Whose images they are.
        x: Images, ``(N, C, H, W)``.
        stage: As in ``"train"``.
        seen: Stages whose first batch has passed; this one is added.

    Raises:
        ValueError: If a value is none that the distribution knows.
    """
    if stage not in seen:
        likelihood.check(x)
        seen.add(stage)


def with_state(module: nn.Module, *names: str) -> list[str]:
    """Those of a model's parts that hold parameters or buffers, as a likelihood or a prior may or may not.

    Args:
        module: The model.
        names: Its attributes; one that is no ``nn.Module`` holds nothing.
    """
    parts = {name: getattr(module, name) for name in names}
    return [name for name, part in parts.items() if isinstance(part, nn.Module) and part.state_dict()]


def check_unit_interval(likelihood: Likelihood, x: Tensor) -> None:
    """Refuse images that leave ``[0, 1]`` when they are brought there from ``[-1, 1]``.

    Raises:
        ValueError: If a value does, by more than 1e-4, or is NaN.
    """
    low, high = (float(value) for value in x.aminmax())
    if not (low >= -1 - 2 * TOLERANCE and high <= 1 + 2 * TOLERANCE):
        raise ValueError(
            f"{type(likelihood).__name__}: images must lie in [-1, 1], which is read as [0, 1], got values from "
            f"{low:.4g} to {high:.4g}. Scale the data, or use a Gaussian likelihood."
        )


_SERIES_BELOW = 0.1


def _log_normalizer(u: Tensor) -> Tensor:
    """The paper's ``log C`` at the logit ``2 * u``: ``log(2 * u / tanh(u))``, by its series where both are near 0."""
    near_zero = u.abs() < _SERIES_BELOW
    safe = torch.where(near_zero, 1.0, u)
    series = u**2 / 3 - 7 * u**4 / 90 + 62 * u**6 / 2835
    return math.log(2) + torch.where(near_zero, series, (safe / safe.tanh()).log())
