"""Filling holes in images, with a model that was never trained to.

Source: Lugmayr et al. 2022 (RePaint, arXiv:2201.09865).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lit_generative.diffusion.denoiser import Denoiser
from lit_generative.diffusion.samplers import Noise, Sampler, at_first_level, step_up_variance
from lit_generative.diffusion.schedules import Level


def inpaint(
    denoise: Denoiser,
    sampler: Sampler,
    x: Tensor,
    mask: Tensor,
    noise: Noise,
    num_resamples: int = 10,
    jump_length: int = 1,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Walk from noise to data that agrees with what is known.

    At each level known pixels are those of the image, noised anew, and unknown ones come from the sampler's step. A
    step does not see the noise that the known ones get after it, so the walk goes ``jump_length`` levels up again and
    down, until each level it jumps from was reached ``num_resamples`` times.

    Source: Lugmayr et al. 2022, algorithm 1, eq. 8, and app. B for jumps of several levels (arXiv:2201.09865). Other
    than there, known pixels are in place at the first level too, which matters where that is not all noise.

    Args:
        denoise: Guesses image and noise.
        sampler: One with single steps.
        x: Images, ``(N, C, H, W)``; anything where they are unknown.
        mask: True where ``x`` is known, ``(N, 1, H, W)`` or ``(N, C, H, W)`` bool.
        noise: Draws standard normal noise of the shape of ``x``.
        num_resamples: How often each level is reached; 1 never goes up.
        jump_length: How many levels to go up.

    Returns:
        The batch after each step down and the guess of the image it was made from, both as ``x``; the last batch is
        the sample, whose known pixels are those of ``x`` exactly.

    Raises:
        TypeError: If the sampler has only whole walks.
        ValueError: If images, mask or numbers do not fit.
    """
    if (shape := getattr(denoise.network, "sample_shape", x.shape[1:])) and tuple(x.shape[1:]) != tuple(shape):
        raise ValueError(f"inpaint: needs images of shape (N, {', '.join(map(str, shape))}), got {tuple(x.shape)}.")
    levels = sampler.levels(denoise.schedule)
    _check(sampler, x, mask, num_resamples, jump_length, num_steps=len(levels) - 1)
    return _walk(denoise, sampler, levels, x, mask, noise, num_resamples, jump_length)


def _walk(
    denoise: Denoiser,
    sampler: Sampler,
    levels: list[Level],
    x: Tensor,
    mask: Tensor,
    noise: Noise,
    num_resamples: int,
    jump_length: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    def with_known(x_t: Tensor, level: Level) -> Tensor:
        return torch.where(mask, x if level.sigma == 0 else level.alpha * x + level.sigma * noise(), x_t)

    num_steps, i = len(levels) - 1, 0
    jumps = dict.fromkeys(range(num_steps - 1, jump_length - 1, -jump_length), num_resamples - 1)
    schedule = denoise.schedule
    x_t = with_known(at_first_level(schedule.initial_scale * noise(), schedule, levels[0]), levels[0])
    while i < num_steps:
        guess = denoise(x_t, levels[i])
        x_t = with_known(sampler.step(guess, levels[i], levels[i + 1], noise), levels[i + 1])
        i += 1
        yield x_t, guess.x0
        if jumps.get(i, 0) > 0:
            jumps[i] -= 1
            x_t = _forward(x_t, levels[i], levels[i - jump_length], noise)
            i -= jump_length


def _forward(x_t: Tensor, now: Level, then: Level, noise: Noise) -> Tensor:
    """Draw from ``q(x_then | x_now)``, where ``then`` is the noisier level."""
    return then.alpha / now.alpha * x_t + step_up_variance(then, now) ** 0.5 * noise()


def _check(sampler: Sampler, x: Tensor, mask: Tensor, num_resamples: int, jump_length: int, num_steps: int) -> None:
    if not sampler.single_step:
        raise TypeError(
            f"inpaint: {type(sampler).__name__} has only whole walks, into which no known pixel can be put. Use "
            "DDPMSampler or DDIMSampler."
        )
    shapes = [tuple(x.shape), (len(x), 1, *x.shape[2:])]
    if mask.dtype != torch.bool or tuple(mask.shape) not in shapes:
        raise ValueError(
            f"inpaint: mask must be bool, True where x is known, of shape {shapes[1]} or {shapes[0]}, got {mask.dtype} "
            f"of shape {tuple(mask.shape)}."
        )
    if num_resamples < 1 or jump_length < 1:
        raise ValueError(
            f"inpaint: num_resamples and jump_length must be at least 1, got {num_resamples} and {jump_length}."
        )
    if num_resamples > 1 and jump_length >= num_steps:
        raise ValueError(
            f"inpaint: jump_length must be below the sampler's {num_steps} steps, got {jump_length}. Lower it, or set "
            "num_resamples to 1."
        )
