"""The network as samplers see it: a function from a noisy batch to its guess of image and noise."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lit_generative.diffusion.parameterizations import Parameterization
from lit_generative.diffusion.schedules import NoiseSchedule
from lit_generative.tensor_ops import expand_like


class Denoiser:
    """Network, schedule, parameterization and label, bound together for one call of a sampler.

    Args:
        network: ``network(x_t, t, y)``.
        schedule: Gives alpha and sigma.
        parameterization: Says what the network predicts.
        y: Labels, ``(N,)``, or None.
        clip: Keep the guess of the image in ``[-1, 1]``.
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: NoiseSchedule,
        parameterization: Parameterization,
        y: Tensor | None = None,
        clip: bool = True,
    ) -> None:
        self.network = network
        self.schedule = schedule
        self.parameterization = parameterization
        self.y = y
        self.clip = clip

    def __call__(self, x_t: Tensor, t: int) -> tuple[Tensor, Tensor]:
        """Guess image and noise.

        Args:
            x_t: Noisy batch, ``(N, ...)``.
            t: Its time, in ``[0, num_timesteps)``.

        Returns:
            ``x0`` and ``eps``, each the shape of ``x_t``, float32, with ``x_t = alpha * x0 + sigma * eps``.
        """
        times = torch.full((len(x_t),), t, device=x_t.device)
        alpha, sigma = (expand_like(value, x_t) for value in self.schedule.alpha_sigma(times))
        output = self.network(x_t, times, self.y).float()
        x0 = self.parameterization.to_x0(output, x_t, alpha, sigma)
        if self.clip:
            x0 = x0.clamp(-1, 1)
        return x0, (x_t - alpha * x0) / sigma
