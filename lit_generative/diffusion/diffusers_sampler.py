"""The schedulers of diffusers as samplers."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import override

from lit_generative.diffusion.denoiser import Denoiser, Guess
from lit_generative.diffusion.diffusers_kinds import kind_of
from lit_generative.diffusion.guidance import Guidance
from lit_generative.diffusion.samplers import Noise, Sampler, no_single_step
from lit_generative.diffusion.schedules import Level, NoiseSchedule
from lit_generative.recipe import class_path
from lit_generative.tensor_ops import generators_of

if TYPE_CHECKING:  # diffusers takes seconds to import; who builds a scheduler has waited for it already
    from diffusers import SchedulerMixin


class DiffusersSampler(Sampler):
    """A scheduler of diffusers, on the schedules that it can walk down.

    Those that take betas follow every schedule that preserves the variance; a continuous one is cut into
    ``num_train_timesteps`` steps for them. Those of flows (``FlowMatch...``, or with ``use_flow_sigmas``) follow
    ``RectifiedFlow``, those of EDM ``EDMSchedule``. Schedulers of consistency models are refused, as are KDPM2 and
    IPNDM, which do not say at which noise they ask the network.

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
        ValueError: If the scheduler is of none of these kinds, or told of a prediction that its kind has not.
    """

    single_step = False

    def __init__(self, scheduler: SchedulerMixin, num_steps: int = 50, guidance: Guidance | None = None) -> None:
        super().__init__(num_steps, None, guidance)
        accepted = inspect.signature(type(scheduler).__init__).parameters
        self.kind = kind_of(scheduler, {key: value for key, value in scheduler.config.items() if key in accepted})
        self.config: dict[str, Any] = self.kind.config
        self.scheduler_class = type(scheduler)
        self._recipe["init_args"]["scheduler"] = {
            "class_path": class_path(self.scheduler_class),
            "init_args": self.config,
        }

    @override
    def levels(self, schedule: NoiseSchedule) -> list[Level]:
        return [*self._walk(schedule, "cpu")[1], schedule.level(schedule.clean)]

    @override
    def trajectory(self, denoise: Denoiser, x_t: Tensor, noise: Noise) -> Iterator[tuple[Tensor, Tensor]]:
        scheduler, levels = self._walk(denoise.schedule, x_t.device)
        times = scheduler.timesteps
        drawing = {}
        if "generator" in inspect.signature(scheduler.step).parameters:
            drawing = {"generator": generators_of(noise(), "scheduler")}
        sample = self.kind.start(x_t, scheduler, denoise.schedule, levels[0])
        x_t = self.kind.shown(sample, scheduler, times[0])
        for i, level in enumerate(levels):
            guess = denoise(x_t, level)
            sample = scheduler.step(self.kind.output(guess, level), times[i], sample, **drawing).prev_sample
            x_t = sample if level is levels[-1] else self.kind.shown(sample, scheduler, times[i + 1])
            yield x_t, guess.x0

    @override
    def step(self, guess: Guess, now: Level, then: Level, noise: Noise) -> Tensor:
        raise no_single_step(self)

    def _walk(self, schedule: NoiseSchedule, device: torch.device | str) -> tuple[Any, list[Level]]:
        """A fresh scheduler, and where it calls the network."""
        scheduler, levels = self.kind.walk(schedule, self.num_steps, device)
        if levels[-1].sigma > levels[0].sigma:
            raise ValueError(f"{self.kind.name} walks from data to noise. Choose another.")
        return scheduler, levels
