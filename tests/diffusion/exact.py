"""Data ``N(MEAN, STD**2)`` in every value: the best denoiser and the probability-flow ODE are known."""

import math

import torch
from torch import nn

from lit_generative.diffusion.denoiser import Denoiser
from lit_generative.diffusion.parameterizations import CleanImage
from lit_generative.diffusion.samplers import Sampler
from lit_generative.diffusion.schedules import Level, NoiseSchedule, Time
from lit_generative.diffusion.spacings import Spacing
from lit_generative.tensor_ops import randn, sample_generators

MEAN, STD = 0.7, 0.3


class ExactImage(nn.Module):
    """The best guess of the image, in the precision of its input; counts its calls, and keeps the times it saw."""

    num_classes = None

    def __init__(self, schedule: NoiseSchedule) -> None:
        super().__init__()
        self.schedule = schedule
        self.times: list[Time] = []

    def forward(self, x_t, t, y=None):
        assert (t == t[0]).all()
        self.times.append(t[0].item())
        _, alpha, sigma = self.schedule.level(t[0].item())
        return MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x_t - alpha * MEAN)


class Given(Spacing):
    """The times of a test."""

    def __init__(self, times: list[Time]) -> None:
        self.given = times

    def times(self, schedule, num_steps):
        return self.given


def exact_denoiser(schedule: NoiseSchedule, clip: bool = False) -> Denoiser:
    return Denoiser(ExactImage(schedule), schedule, CleanImage(), clip=clip)


def walk(sampler: Sampler, schedule: NoiseSchedule, num: int = 3, seed: int = 0) -> list[tuple]:
    """Every step of a sampler, for points of the plane."""
    generators = sample_generators(seed, num)
    noise = lambda: randn((num, 2), generators)  # noqa: E731
    return list(sampler.trajectory(exact_denoiser(schedule), schedule.initial_scale * noise(), noise))


def assert_samples_depend_on_their_generators_alone(sampler: Sampler, schedule: NoiseSchedule) -> None:
    many, few = (walk(sampler, schedule, num)[-1][0] for num in (5, 2))
    torch.testing.assert_close(many[:2], few, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(walk(sampler, schedule, 5)[-1][0], many, rtol=0, atol=0)
    assert not torch.allclose(walk(sampler, schedule, 5, seed=1)[-1][0], many, atol=1e-2)


def on_path(level: Level, z: torch.Tensor) -> torch.Tensor:
    """Where the ODE carries the point that lies ``z`` standard deviations off the mean."""
    return level.alpha * MEAN + math.hypot(level.alpha * STD, level.sigma) * z
