"""The schedulers of diffusers as samplers."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import override

from lit_generative.diffusion.denoiser import Denoiser, Guess
from lit_generative.diffusion.guidance import Guidance
from lit_generative.diffusion.parameterizations import CleanImage, Epsilon, Velocity
from lit_generative.diffusion.samplers import Noise, Sampler, no_single_step
from lit_generative.diffusion.schedules import DiscreteSchedule, Level, NoiseSchedule
from lit_generative.recipe import class_path
from lit_generative.tensor_ops import generators_of

if TYPE_CHECKING:  # diffusers takes seconds to import; who builds a scheduler has waited for it already
    from diffusers import SchedulerMixin

PREDICTIONS = {"epsilon": Epsilon(), "sample": CleanImage(), "v_prediction": Velocity()}
"""What a scheduler may be told that the network predicts."""


class DiffusersSampler(Sampler):
    """A scheduler of diffusers that takes betas, on our discrete schedules.

    Those of EDM, flows and consistency models take none and are refused, as are KDPM2 and IPNDM, which do not say at
    which noise they ask the network. On continuous schedules take our samplers.

    Each walk builds the scheduler anew with the betas of the model's schedule, and without its ``clip_sample``: the
    model's ``clip_samples`` says whether guesses are clipped. The scheduler chooses the times. If one lies between two
    steps of the schedule, the network is asked at the nearer step, about noise of the scheduler's level.

    Samples depend on their own generator only: a scheduler that draws noise gets a generator for each sample, seeded
    from a draw of the model's noise. Options that diffusers takes at each step, as ``eta``, keep their defaults.

    Args:
        scheduler: All of its settings but the betas are kept. Of the prediction types ``sample`` loses the fewest
            digits where the image is almost gone.
        num_steps: Given to ``scheduler.set_timesteps``; some call the network more often.
        guidance: As in :class:`.samplers.Sampler`.

    Raises:
        ValueError: If the scheduler takes no betas, or another prediction than epsilon, sample or v_prediction.
    """

    single_step = False

    def __init__(self, scheduler: SchedulerMixin, num_steps: int = 50, guidance: Guidance | None = None) -> None:
        super().__init__(num_steps, None, guidance)
        accepted = inspect.signature(type(scheduler).__init__).parameters
        self.config: dict[str, Any] = {key: value for key, value in scheduler.config.items() if key in accepted}
        self.name = f"DiffusersSampler: {type(scheduler).__name__}"
        if "trained_betas" not in self.config:
            raise ValueError(f"{self.name} takes no trained_betas, so it cannot follow our schedules. Choose another.")
        del self.config["trained_betas"]
        if self.config.get("prediction_type", "epsilon") not in PREDICTIONS:
            raise ValueError(
                f"{self.name}'s prediction_type must be one of {', '.join(PREDICTIONS)}, got "
                f"{self.config['prediction_type']!r}. What the network predicts does not matter: all are known."
            )
        self.parameterization = PREDICTIONS[self.config.get("prediction_type", "epsilon")]
        self.scheduler_class = type(scheduler)
        self._recipe["init_args"]["scheduler"] = {
            "class_path": class_path(self.scheduler_class),
            "init_args": self.config,
        }

    @override
    def levels(self, schedule: NoiseSchedule) -> list[Level]:
        return [*self._levels(self._scheduler_for(schedule, "cpu"), schedule), schedule.level(schedule.clean)]

    @override
    def trajectory(self, denoise: Denoiser, x_t: Tensor, noise: Noise) -> Iterator[tuple[Tensor, Tensor]]:
        scheduler = self._scheduler_for(denoise.schedule, x_t.device)
        levels, times = self._levels(scheduler, denoise.schedule), scheduler.timesteps
        drawing = {}
        if "generator" in inspect.signature(scheduler.step).parameters:
            drawing = {"generator": generators_of(noise(), "scheduler")}
        sample = x_t * scheduler.init_noise_sigma  # some schedulers walk with x_t / alpha
        x_t = scheduler.scale_model_input(sample, times[0])
        for i, level in enumerate(levels):
            guess = denoise(x_t, level)
            sample = scheduler.step(self._output(guess, level), times[i], sample, **drawing).prev_sample
            x_t = sample if level is levels[-1] else scheduler.scale_model_input(sample, times[i + 1])
            yield x_t, guess.x0

    @override
    def step(self, guess: Guess, now: Level, then: Level, noise: Noise) -> Tensor:
        raise no_single_step(self)

    def _scheduler_for(self, schedule: NoiseSchedule, device: torch.device | str) -> Any:
        """A fresh one with the schedule's betas, its timesteps set."""
        if not isinstance(schedule, DiscreteSchedule):
            raise ValueError(
                f"{self.name} works on numbered steps, and a {type(schedule).__name__} has none. Take a sampler of "
                "lit_generative.diffusion.samplers or solvers."
            )
        try:
            schedule.even_times(self.num_steps)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None
        ours = {"num_train_timesteps": schedule.num_timesteps, "clip_sample": False}
        config = {**self.config, **{key: value for key, value in ours.items() if key in self.config}}
        scheduler = self.scheduler_class(**config, trained_betas=schedule.betas.tolist())
        alphas_cumprod = getattr(scheduler, "alphas_cumprod", torch.zeros(()))
        if not torch.allclose(alphas_cumprod.double(), schedule.alphas_cumprod, rtol=1e-3, atol=1e-12):
            raise ValueError(
                f"{self.name} does not keep to the betas it is given. Choose another, or leave out its "
                "rescale_betas_zero_snr: our schedules have zero_terminal_snr."
            )
        scheduler.set_timesteps(self.num_steps, device=device)
        return scheduler

    def _levels(self, scheduler: Any, schedule: NoiseSchedule) -> list[Level]:
        """Where the scheduler calls the network: its own noise, and the nearest step."""
        times = [float(t) for t in scheduler.timesteps]
        levels = [schedule.level(round(t)) for t in times]
        if times[-1] > times[0]:
            raise ValueError(f"{self.name} walks from data to noise. Choose another.")
        if levels[0].alpha == 0 and (hasattr(scheduler, "sigmas") or isinstance(self.parameterization, Epsilon)):
            raise ValueError(
                f"{self.name} divides by alpha, which is 0 at the schedule's noisiest step. Choose DDIMScheduler, with "
                "prediction_type sample or v_prediction."
            )
        if not hasattr(scheduler, "sigmas"):
            return levels
        ratios = scheduler.sigmas[: len(times)].tolist()
        if any(abs(schedule.nearest_time(ratio) - t) > 1 for ratio, t in zip(ratios, times, strict=True)):
            raise ValueError(f"{self.name} does not say at which noise levels it calls the network. Choose another.")
        return [
            Level(level.t, 1 / math.hypot(1, ratio), ratio / math.hypot(1, ratio))
            for level, ratio in zip(levels, ratios, strict=True)
        ]

    def _output(self, guess: Guess, level: Level) -> Tensor:
        """The guess as the scheduler expects it from a network."""
        alpha, sigma = (torch.tensor(v, dtype=torch.float64) for v in (level.alpha, level.sigma))
        output = self.parameterization.target(guess.x0, guess.eps, alpha, sigma)
        if self.config.get("variance_type") not in ("learned", "learned_range"):
            return output
        if guess.variance is None:
            raise ValueError(
                f"{self.name} has variance_type={self.config['variance_type']}, and the network says nothing of the "
                "variance. Train with an objective that learns it, or choose another variance_type."
            )
        return torch.cat([output, guess.variance], dim=1)
