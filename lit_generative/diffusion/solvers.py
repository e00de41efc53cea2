"""Solvers of the probability-flow ODE ``dx_t = x0 * d(alpha) + eps * d(sigma)``, with the denoiser's ``x0``, ``eps``.

That is the same ODE in any time, and one Euler step of it is ``x_next = alpha_next * x0 + sigma_next * eps``, DDIM's
deterministic step.

Source: Song et al. 2021, eq. 14 (arXiv:2010.02502); Karras et al. 2022, eq. 4 and app. B.2 (arXiv:2206.00364).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

from torch import Tensor
from typing_extensions import override

from lit_generative.diffusion.denoiser import Denoiser, Guess
from lit_generative.diffusion.guidance import Guidance
from lit_generative.diffusion.samplers import Noise, Sampler, at_first_level, no_single_step
from lit_generative.diffusion.schedules import Level, NoiseSchedule
from lit_generative.diffusion.spacings import Spacing


class EulerSampler(Sampler):
    """Euler's method, first order; it may start at pure noise, ``alpha = 0``.

    With ``x_t = (1 - t) * x0 + t * eps`` it is also Euler's method in t, ``x + (t_next - t) * (eps - x0)``, by which
    flows are sampled (Liu et al. 2023, arXiv:2209.03003). In any case it is :class:`.samplers.DDIMSampler` with
    ``eta=0``, under the name that papers on flows give it.

    Args:
        num_steps: How often the network is called.
        spacing: As in :class:`.samplers.Sampler`.
        guidance: Likewise.
    """

    def __init__(self, num_steps: int = 50, spacing: Spacing | None = None, guidance: Guidance | None = None) -> None:
        super().__init__(num_steps, spacing, guidance)

    @override
    def step(self, guess: Guess, now: Level, then: Level, noise: Noise) -> Tensor:
        return then.alpha * guess.x0 + then.sigma * guess.eps


class HeunSampler(Sampler):
    """Heun's method, second order, with fresh noise at will; the network is called ``2 * num_steps - 1`` times.

    Source: Karras et al. 2022, algorithm 2, and algorithm 1 if ``s_churn=0`` (arXiv:2206.00364), where ``alpha = 1``.
    Elsewhere both factors are averaged over the step, which may start at pure noise, ``alpha = 0``; with
    ``x_t = (1 - t) * x0 + t * eps`` it is Heun's method in t. To solve for ``x_t / alpha`` in ``sigma / alpha`` instead
    is another method of second order, far off where alpha is small. Noise is added up to the nearest time.

    Args:
        num_steps: How many steps.
        s_churn: How much noise is added in all; 0 for none.
        s_min: Noise is added from this ``sigma / alpha`` on.
        s_max: And up to this one.
        s_noise: Standard deviation of the noise that is added.
        spacing: As in :class:`.samplers.Sampler`.
        guidance: Likewise.

    Raises:
        ValueError: If ``s_churn`` or ``s_noise`` is negative or infinite, ``s_min`` negative, or ``s_max`` below
            ``s_min``.
    """

    single_step = False

    def __init__(
        self,
        num_steps: int = 18,
        s_churn: float = 0.0,
        s_min: float = 0.0,
        s_max: float = math.inf,
        s_noise: float = 1.0,
        spacing: Spacing | None = None,
        guidance: Guidance | None = None,
    ) -> None:
        super().__init__(num_steps, spacing, guidance)
        if not (0 <= s_churn < math.inf and 0 <= s_noise < math.inf and 0 <= s_min <= s_max):
            raise ValueError(
                "HeunSampler: s_churn and s_noise must be at least 0 and finite, s_min at least 0, and s_max at least "
                "s_min, got "
                f"s_churn={s_churn}, s_min={s_min}, s_max={s_max}, s_noise={s_noise}."
            )
        self.s_churn, self.s_noise = s_churn, s_noise
        self.s_min, self.s_max = s_min, s_max

    @override
    def trajectory(self, denoise: Denoiser, x_t: Tensor, noise: Noise) -> Iterator[tuple[Tensor, Tensor]]:
        levels = self.levels(denoise.schedule)
        x_t = at_first_level(x_t, denoise.schedule, levels[0])
        for now, then in itertools.pairwise(levels):
            x_t, now = self._churn(x_t, now, denoise.schedule, noise)
            guess = denoise(x_t, now)
            x_next = then.alpha * guess.x0 + then.sigma * guess.eps
            if then.sigma > 0:
                ahead = denoise(x_next, then)
                x_next = x_next + (then.alpha - now.alpha) / 2 * (ahead.x0 - guess.x0)
                x_next = x_next + (then.sigma - now.sigma) / 2 * (ahead.eps - guess.eps)
            x_t = x_next
            yield x_t, guess.x0

    @override
    def step(self, guess: Guess, now: Level, then: Level, noise: Noise) -> Tensor:
        raise no_single_step(self)

    def _churn(self, x_t: Tensor, now: Level, schedule: NoiseSchedule, noise: Noise) -> tuple[Tensor, Level]:
        """Go up to a higher level, if there is one near enough."""
        factor = min(self.s_churn / self.num_steps, math.sqrt(2) - 1)
        if factor == 0 or now.alpha == 0 or not self.s_min <= (s := now.sigma / now.alpha) <= self.s_max:
            return x_t, now
        up = schedule.level(schedule.nearest_time(s * (1 + factor)))
        if up.t <= now.t:
            return x_t, now
        added = self.s_noise * math.sqrt((up.sigma / up.alpha) ** 2 - s**2)
        return up.alpha * (x_t / now.alpha + added * noise()), up


class DPMSolver2M(Sampler):
    """DPM-Solver++(2M), second order with one network call a step; it may start at pure noise, ``alpha = 0``.

    The guess of the image goes on changing as it did in the last step, evenly in ``log(alpha / sigma)``. First and last
    step take the guess as it is: before the first there is none, and to clean data that logarithm has no end.

    Source: Lu et al. 2022, algorithm 2 (arXiv:2211.01095).

    Args:
        num_steps: How often the network is called.
        lower_order_final: Take the guess as it is in the step before the last, too. That one goes far if it ends at the
            least noise of a schedule, as :class:`~lit_generative.diffusion.spacings.Linspace` does.
        spacing: As in :class:`.samplers.Sampler`.
        guidance: Likewise.
    """

    single_step = False

    def __init__(
        self,
        num_steps: int = 20,
        lower_order_final: bool = True,
        spacing: Spacing | None = None,
        guidance: Guidance | None = None,
    ) -> None:
        super().__init__(num_steps, spacing, guidance)
        self.lower_order_final = lower_order_final

    @override
    def trajectory(self, denoise: Denoiser, x_t: Tensor, noise: Noise) -> Iterator[tuple[Tensor, Tensor]]:
        levels = self.levels(denoise.schedule)
        x_t = at_first_level(x_t, denoise.schedule, levels[0])
        last: Tensor | None = None
        for i, (now, then) in enumerate(itertools.pairwise(levels)):
            x0 = ahead = denoise(x_t, now).x0
            if last is not None and i < len(levels) - (3 if self.lower_order_final else 2):
                before, here, after = (_half_log_snr(level) for level in levels[i - 1 : i + 2])
                ahead = x0 + (after - here) / (2 * (here - before)) * (x0 - last)
            kept = then.sigma / now.sigma
            x_t, last = kept * x_t + (then.alpha - kept * now.alpha) * ahead, x0
            yield x_t, x0

    @override
    def step(self, guess: Guess, now: Level, then: Level, noise: Noise) -> Tensor:
        raise no_single_step(self)


def _half_log_snr(level: Level) -> float:
    return math.log(level.alpha / level.sigma) if level.alpha > 0 else -math.inf
