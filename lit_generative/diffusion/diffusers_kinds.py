"""What the schedulers of diffusers mean by times, samples and a network's output: three kinds."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lit_generative.diffusion.denoiser import Guess
from lit_generative.diffusion.parameterizations import (
    CleanImage,
    EDMPreconditioning,
    Epsilon,
    FlowVelocity,
    Parameterization,
    Velocity,
)
from lit_generative.diffusion.samplers import at_first_level
from lit_generative.diffusion.schedules import DiscreteSchedule, Level, NoiseSchedule

PREDICTIONS: dict[str, Parameterization] = {"epsilon": Epsilon(), "sample": CleanImage(), "v_prediction": Velocity()}
"""What a scheduler that takes betas may be told that the network predicts."""


class SchedulerKind(ABC):
    """How to walk with one class of schedulers.

    Args:
        scheduler_class: Of diffusers.
        config: Its settings, without ``trained_betas``.

    Raises:
        ValueError: If it expects of the network what this kind does not.
    """

    def __init__(self, scheduler_class: type, config: dict[str, Any]) -> None:
        self.scheduler_class, self.config = scheduler_class, config
        self.name = f"DiffusersSampler: {scheduler_class.__name__}"
        self.parameterization = self._parameterization()

    @abstractmethod
    def _parameterization(self) -> Parameterization:
        """What a step takes for the network's output."""

    @abstractmethod
    def walk(self, schedule: NoiseSchedule, num_steps: int, device: torch.device | str) -> tuple[Any, list[Level]]:
        """A fresh scheduler that walks down the schedule, and where it calls the network.

        Of each call that is the scheduler's own noise, and the schedule's nearest time.

        Raises:
            ValueError: If it cannot, or does not say.
        """

    @abstractmethod
    def start(self, x_t: Tensor, scheduler: Any, schedule: NoiseSchedule, first: Level) -> Tensor:
        """What it begins with, of the schedule's initial noise ``(N, ...)``."""

    @abstractmethod
    def shown(self, sample: Tensor, scheduler: Any, time: Tensor) -> Tensor:
        """The ``x_t`` that the network sees, of what the scheduler walks with, ``(N, ...)``."""

    def output(self, guess: Guess, level: Level) -> Tensor:
        """The guess as a step expects it from a network, ``(N, ...)``.

        Raises:
            ValueError: If it lacks a variance that the step needs.
        """
        alpha, sigma = (torch.tensor(v, dtype=torch.float64) for v in (level.alpha, level.sigma))
        return self.parameterization.target(guess.x0, guess.eps, alpha, sigma)

    def _fresh(self, num_steps: int, device: torch.device | str, **ours: Any) -> Any:
        """A scheduler with its timesteps set, and settings of ours in place of its own."""
        scheduler: Any = self.scheduler_class(**self.config | ours)
        scheduler.set_timesteps(num_steps, device=device)
        return scheduler

    def _one_of(self, accepted: dict[str, Parameterization], default: str) -> Parameterization:
        chosen = self.config.get("prediction_type", default)
        if chosen not in accepted:
            raise ValueError(
                f"{self.name}'s prediction_type must be one of {', '.join(accepted)}, got {chosen!r}. What the network "
                "predicts does not matter: all are known."
            )
        return accepted[chosen]


class ByBetas(SchedulerKind):
    """Schedulers that keep the variance, at numbered steps; a continuous schedule is cut into as many as they have."""

    @override
    def _parameterization(self) -> Parameterization:
        return self._one_of(PREDICTIONS, "epsilon")

    @override
    def walk(self, schedule: NoiseSchedule, num_steps: int, device: torch.device | str) -> tuple[Any, list[Level]]:
        steps = self._numbered(schedule)
        try:
            steps.even_times(num_steps)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None
        ours = {"num_train_timesteps": steps.num_timesteps, "clip_sample": False}
        ours = {key: value for key, value in ours.items() if key in self.config}
        scheduler = self._fresh(num_steps, device, trained_betas=steps.betas.tolist(), **ours)
        alphas_cumprod = getattr(scheduler, "alphas_cumprod", torch.zeros(()))
        if not torch.allclose(alphas_cumprod.double(), steps.alphas_cumprod, rtol=1e-3, atol=1e-12):
            raise ValueError(
                f"{self.name} does not keep to the betas it is given. Choose another, or leave out its "
                "rescale_betas_zero_snr: our schedules have zero_terminal_snr."
            )
        levels = self._levels(scheduler, steps)
        if steps is schedule:
            return scheduler, levels
        return scheduler, [level._replace(t=schedule.nearest_time(level.sigma / level.alpha)) for level in levels]

    def _levels(self, scheduler: Any, steps: DiscreteSchedule) -> list[Level]:
        times = [float(t) for t in scheduler.timesteps]
        levels = [steps.level(round(t)) for t in times]
        if levels[0].alpha == 0 and (hasattr(scheduler, "sigmas") or isinstance(self.parameterization, Epsilon)):
            raise ValueError(
                f"{self.name} divides by alpha, which is 0 at the schedule's noisiest step. Choose DDIMScheduler, with "
                "prediction_type sample or v_prediction."
            )
        if hasattr(scheduler, "sigmas"):
            ratios = scheduler.sigmas[: len(times)].tolist()
            for i, (level, ratio, t) in enumerate(zip(levels, ratios, times, strict=True)):
                # Its floats lose the digits of noise that is hardly there, which is no other noise.
                rounded = math.isclose(ratio, level.sigma / level.alpha, rel_tol=0.05)
                if abs(steps.nearest_time(ratio) - t) > 1 and not rounded:
                    raise ValueError(
                        f"{self.name} does not say at which noise levels it calls the network. Choose another."
                    )
                levels[i] = Level(level.t, 1 / math.hypot(1, ratio), ratio / math.hypot(1, ratio))
        return levels

    @override
    def start(self, x_t: Tensor, scheduler: Any, schedule: NoiseSchedule, first: Level) -> Tensor:
        return x_t * scheduler.init_noise_sigma  # some walk with x_t / alpha

    @override
    def shown(self, sample: Tensor, scheduler: Any, time: Tensor) -> Tensor:
        x_t: Tensor = scheduler.scale_model_input(sample, time)
        return x_t

    @override
    def output(self, guess: Guess, level: Level) -> Tensor:
        output = super().output(guess, level)
        if self.config.get("variance_type") not in ("learned", "learned_range"):
            return output
        if guess.variance is None:
            raise ValueError(
                f"{self.name} has variance_type={self.config['variance_type']}, and the network says nothing of the "
                "variance. Train with an objective that learns it, or choose another variance_type."
            )
        return torch.cat([output, guess.variance], dim=1)

    def _numbered(self, schedule: NoiseSchedule) -> DiscreteSchedule:
        if isinstance(schedule, DiscreteSchedule):
            return schedule
        times = schedule.even_times(self.config.get("num_train_timesteps", 1000))
        levels = [schedule.level(t) for t in reversed(times)]
        if any(abs(level.alpha**2 + level.sigma**2 - 1) > 1e-6 for level in levels):
            raise ValueError(
                f"{self.name} keeps the variance, alpha^2 + sigma^2 = 1, and {type(schedule).__name__} does not. "
                "Choose a FlowMatchEulerDiscreteScheduler for straight lines, an EDMEulerScheduler for EDM."
            )
        alphas_cumprod = torch.tensor([1.0, *(level.alpha**2 for level in levels)], dtype=torch.float64)
        return DiscreteSchedule(1 - alphas_cumprod[1:] / alphas_cumprod[:-1])


class Straight(SchedulerKind):
    """Schedulers of flows, ``x_t = (1 - s) * x0 + s * eps``, whose sigmas are s."""

    @override
    def _parameterization(self) -> Parameterization:
        return self._one_of({"flow_prediction": FlowVelocity()}, "flow_prediction")

    @override
    def walk(self, schedule: NoiseSchedule, num_steps: int, device: torch.device | str) -> tuple[Any, list[Level]]:
        middle = schedule.level(schedule.nearest_time(1.0))
        if abs(middle.alpha + middle.sigma - 1) > 1e-6:
            raise ValueError(
                f"{self.name} walks on a straight line, alpha + sigma = 1, and {type(schedule).__name__} is none. "
                "Choose it for RectifiedFlow."
            )
        scheduler = self._fresh(num_steps, device)
        shares = scheduler.sigmas[: len(scheduler.timesteps)].tolist()
        ratios = [s / (1 - s) if s < 1 else math.inf for s in shares]
        levels = [Level(schedule.nearest_time(ratio), 1 - s, s) for ratio, s in zip(ratios, shares, strict=True)]
        return scheduler, levels

    @override
    def start(self, x_t: Tensor, scheduler: Any, schedule: NoiseSchedule, first: Level) -> Tensor:
        return at_first_level(x_t, schedule, first)

    @override
    def shown(self, sample: Tensor, scheduler: Any, time: Tensor) -> Tensor:
        return sample


class OnTheImage(SchedulerKind):
    """Schedulers of EDM, ``x_t = x0 + sigma * eps``, which divide by the noise before the network and after."""

    @override
    def _parameterization(self) -> Parameterization:
        edm = EDMPreconditioning(self.config["sigma_data"])
        return self._one_of({"epsilon": edm, "v_prediction": edm}, "epsilon")

    @override
    def walk(self, schedule: NoiseSchedule, num_steps: int, device: torch.device | str) -> tuple[Any, list[Level]]:
        if schedule.level(schedule.nearest_time(1.0)).alpha != 1:
            raise ValueError(
                f"{self.name} leaves the image as it is, alpha = 1, and {type(schedule).__name__} does not. Choose "
                "it for EDMSchedule."
            )
        noisiest, least = (schedule.level(t) for t in schedule.even_times(2))
        low, high = self.config["sigma_min"], self.config["sigma_max"]
        if low < least.sigma * (1 - 1e-6) or high > noisiest.sigma * (1 + 1e-6):
            raise ValueError(
                f"{self.name}: sigma_min and sigma_max must lie in the schedule's {least.sigma:g} to "
                f"{noisiest.sigma:g}, got {low:g} and {high:g}."
            )
        scheduler = self._fresh(num_steps, device)
        sigmas = scheduler.sigmas[: len(scheduler.timesteps)].tolist()
        return scheduler, [Level(schedule.nearest_time(sigma), 1.0, sigma) for sigma in sigmas]

    @override
    def start(self, x_t: Tensor, scheduler: Any, schedule: NoiseSchedule, first: Level) -> Tensor:
        return at_first_level(x_t, schedule, first)

    @override
    def shown(self, sample: Tensor, scheduler: Any, time: Tensor) -> Tensor:
        scheduler.scale_model_input(sample, time)  # which counts the calls; our networks scale for themselves
        return sample

    @override
    def output(self, guess: Guess, level: Level) -> Tensor:
        output = super().output(guess, level)
        return -output if self.config.get("prediction_type") == "v_prediction" else output


def kind_of(scheduler: Any, config: dict[str, Any]) -> SchedulerKind:
    """How to walk with a scheduler.

    Args:
        scheduler: Of diffusers.
        config: The settings that its constructor takes.

    Raises:
        ValueError: If there is no way known.
    """
    takes_betas = "trained_betas" in config
    of_flows = any(base.__name__.startswith("FlowMatch") for base in type(scheduler).__mro__)
    kinds: dict[type[SchedulerKind], bool] = {
        Straight: of_flows or (takes_betas and config.get("use_flow_sigmas", False)),
        OnTheImage: hasattr(scheduler, "precondition_outputs"),
        ByBetas: takes_betas,
    }
    for kind, fits in kinds.items():
        if fits:
            return kind(type(scheduler), {key: value for key, value in config.items() if key != "trained_betas"})
    raise ValueError(
        f"DiffusersSampler: {type(scheduler).__name__} takes no trained_betas, and is none for flows or EDM, so it "
        "cannot follow our schedules. Choose another."
    )
