"""A model of ``N(mean, std**2)`` in every value, whose network knows the answer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lit_generative.diffusion.module import DDPM
from lit_generative.diffusion.parameterizations import Epsilon
from lit_generative.diffusion.samplers import DDPMSampler
from lit_generative.diffusion.schedules import CosineSchedule, NoiseSchedule
from lit_generative.recipe import Recorded
from tests.tiny import ADAM

MEAN, STD = 0.2, 0.3


class GaussianNoise(Recorded, nn.Module):
    """The best guess of the noise."""

    num_classes = None

    def __init__(self, schedule: NoiseSchedule, sample_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.schedule, self.sample_shape = schedule, tuple(sample_shape)
        self.weight = nn.Parameter(torch.zeros(()))  # an optimizer wants one

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        alpha, sigma = (v.reshape(-1, *[1] * (x_t.ndim - 1)) for v in self.schedule.alpha_sigma(t))
        return sigma * (x_t - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2) + self.weight


def gaussian_ddpm(sample_shape: tuple[int, ...], num_timesteps: int = 100, **options) -> DDPM:
    schedule = options.pop("schedule", None) or CosineSchedule(num_timesteps)
    network = GaussianNoise(schedule, sample_shape)
    return DDPM(network, schedule, Epsilon(), DDPMSampler(5), ADAM, **options)
