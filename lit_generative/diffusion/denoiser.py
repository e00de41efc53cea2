"""The network as samplers see it: a function from a noisy batch to its guess of image and noise."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lit_generative.diffusion.guidance import Guidance
from lit_generative.diffusion.parameterizations import Parameterization
from lit_generative.diffusion.schedules import Level, NoiseSchedule
from lit_generative.tensor_ops import expand_like, to_float32


class Guess(NamedTuple):
    """What the network makes of a noisy batch, float32."""

    x0: Tensor
    """The image, ``(N, ...)``."""
    eps: Tensor
    """The noise, same shape: ``x_t = alpha * x0 + sigma * eps``."""
    variance: Tensor | None = None
    """What the network says of the variance of the step down, same shape, if it was trained to."""


class Denoiser:
    """Network, schedule, parameterization and label, bound together for one walk of a sampler.

    Args:
        network: ``network(x_t, t, y)``.
        schedule: Gives alpha and sigma.
        parameterization: Says what the network predicts.
        y: Labels, ``(N,)``, or None.
        clip: Keep the guess of the image in ``[-1, 1]``.
        guidance: How the network's predictions are combined; None takes its one prediction.
        condition: What the network sees beside ``x_t``, ``(N, C', H, W)``.
        self_conditioning: Also show it its last guess of the image, at first zero.
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: NoiseSchedule,
        parameterization: Parameterization,
        y: Tensor | None = None,
        clip: bool = True,
        guidance: Guidance | None = None,
        condition: Tensor | None = None,
        self_conditioning: bool = False,
    ) -> None:
        self.network = network
        self.schedule = schedule
        self.parameterization = parameterization
        self.y = y
        self.clip = clip
        self.guidance = guidance
        self.condition = condition
        self.self_conditioning = self_conditioning
        self._last_x0: Tensor | None = None

    def __call__(self, x_t: Tensor, level: Level) -> Guess:
        """Guess image and noise of ``x_t``, ``(N, ...)``, at its noise level."""
        alpha, sigma = (torch.tensor(v, dtype=x_t.dtype, device=x_t.device) for v in (level.alpha, level.sigma))
        inputs = self._see(x_t, alpha, sigma, self._last_x0)
        output, variance = self._predict(inputs, level, x_t.shape[1])
        x0 = self._read(output, x_t, alpha, sigma)
        self._last_x0 = x0
        return Guess(x0, (x_t - alpha * x0) / sigma, variance)

    def predict(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the network itself says, without guidance, for a loss.

        With self-conditioning it sees its own first guess in half of the calls and zeros in the others (Chen et al.
        2023, algorithm 1, arXiv:2208.04202); no gradient goes through that guess.

        Args:
            x_t: Noisy batch, ``(N, ...)``.
            t: Its times, ``(N,)``.

        Returns:
            Its prediction, the shape of ``x_t``, and what it says of the variance, if anything.
        """
        alpha, sigma = (expand_like(value, x_t) for value in self.schedule.alpha_sigma(t))
        last_x0 = None
        if self.self_conditioning and torch.rand(()) < 0.5:
            with torch.no_grad():
                inputs = self._see(x_t, alpha, sigma, None)
                first, _ = split_output(to_float32(self.network(inputs, t, self.y)), x_t.shape[1])
                last_x0 = self._read(first, x_t, alpha, sigma)
        output = to_float32(self.network(self._see(x_t, alpha, sigma, last_x0), t, self.y))
        return split_output(output, x_t.shape[1])

    def _see(self, x_t: Tensor, alpha: Tensor, sigma: Tensor, last_x0: Tensor | None) -> Tensor:
        """The network's input: ``x_t`` as the parameterization scales it, and what it sees beside."""
        inputs = [self.parameterization.scale_input(x_t, alpha, sigma)]
        if self.condition is not None:
            inputs.append(self.condition)
        if self.self_conditioning:
            inputs.append(torch.zeros_like(x_t) if last_x0 is None else last_x0)
        return inputs[0] if len(inputs) == 1 else torch.cat(inputs, dim=1)

    def _read(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The image that the output means."""
        x0 = self.parameterization.to_x0(output, x_t, alpha, sigma)
        return x0.clamp(-1, 1) if self.clip else x0

    def _predict(self, inputs: Tensor, level: Level, channels: int) -> tuple[Tensor, Tensor | None]:
        """The prediction of the first ``channels``, and what is said of the variance, if anything."""
        times = self.schedule.as_tensor(level.t, len(inputs), inputs.device)
        if self.guidance is None or not self.guidance.active(level):
            output = to_float32(self.network(inputs, times, self.y))
            return split_output(output, channels)
        null_class = getattr(self.network, "num_classes", None)
        good, bad = (
            split_output(to_float32(o), channels)
            for o in self.guidance.evaluate(self.network, inputs, times, self.y, null_class)
        )
        return self.guidance.combine(good[0], bad[0]), good[1]


def split_output(output: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    """Prediction, and what follows it if the network says something of the variance: each ``(N, channels, ...)``."""
    return output[:, :channels], output[:, channels:] if output.shape[1] > channels else None
