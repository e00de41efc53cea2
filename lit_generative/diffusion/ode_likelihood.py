"""The log-likelihood of data under the probability-flow ODE, which carries it to noise without a draw."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from lit_generative.diffusion.denoiser import Denoiser
from lit_generative.diffusion.schedules import Level
from lit_generative.diffusion.spacings import Linspace, Spacing
from lit_generative.tensor_ops import Generators, evaluating, frozen, sum_per_example, uniform


class OdeLikelihood(NamedTuple):
    """Log-densities, and how sure the estimate of the divergence is."""

    log_prob: Tensor
    """Nats per example, ``(N,)``."""
    standard_error: Tensor
    """Over the probes, nats, ``(N,)``: 0 for the exact divergence, NaN for a single probe."""


def ode_log_likelihood(
    denoise: Denoiser,
    x0: Tensor,
    num_steps: int,
    spacing: Spacing | None = None,
    num_probes: int = 1,
    exact_divergence: bool = False,
    generator: Generators = None,
) -> OdeLikelihood:
    """Carry data to noise by the ODE, and integrate its divergence.

    In ``u = x_t / sqrt(alpha**2 + sigma**2)`` and the angle whose tangent is ``sigma / alpha`` the ODE is ``du = (cos *
    eps_hat - sin * x0_hat) d(angle)``, whatever the schedule; its divergence is bounded at both ends, where there is no
    noise and where there is no image. Heun's method along the levels, and the trapezoidal rule for the divergence: the
    error falls with the square of their distance.

    The walk starts at the least noisy level, with the data as ``x_t / alpha``: what comes out is the log-density of
    data with noise of that level's ``sigma / alpha``, at ``x0``. A guess that is clipped to ``[-1, 1]`` makes another
    ODE: build the denoiser with ``clip=False``, unless that is the one meant.

    The density is one on ``[-1, 1]``. For bits per dimension of 8-bit pixels give ``x0`` with uniform noise of one
    level, 2/255, and take ``-log_prob / (D * log(2)) + log2(255 / 2)``, an upper bound.

    Source: Song et al. 2021, sec. 4.3 and app. D.2 (arXiv:2011.13456); the estimate of the divergence by Hutchinson,
    with random signs: Grathwohl et al. 2019, sec. 3.1 (arXiv:1810.01367).

    Args:
        denoise: Guesses image and noise, given labels if there are any; the network is asked in evaluation mode.
        x0: Clean data, ``(N, ...)``.
        num_steps: Levels of noise that are visited; the network is called ``2 * num_steps - 1`` times.
        spacing: Which, from the noisiest on; None for :class:`~lit_generative.diffusion.spacings.Linspace`, which does
            best where the angle is even in time, as it is with a cosine.
        num_probes: Random vectors, each kept along the whole walk; each costs a backward pass at every level.
        exact_divergence: Take the divergence itself, at one backward pass for each value of an example.
        generator: Source of the probes; with one for each example, its figures do not depend on the others.

    Raises:
        ValueError: If there are fewer than 2 levels or no probe, or the denoiser remembers its last guess.
    """
    if num_steps < 2 or num_probes < 1:
        raise ValueError(
            f"ode_log_likelihood: num_steps must be at least 2 and num_probes at least 1, got {num_steps} and "
            f"{num_probes}."
        )
    if denoise.self_conditioning:
        raise ValueError("ode_log_likelihood: with self_conditioning the steps are no ODE. Take a model without.")
    schedule = denoise.schedule
    times = (Linspace() if spacing is None else spacing).times(schedule, num_steps)
    levels = [schedule.level(t) for t in reversed(times)]
    # Lightning evaluates in inference mode, where nothing has a gradient.
    with torch.inference_mode(False), torch.no_grad(), evaluating(denoise.network), frozen(denoise.network):
        x0 = x0.clone()
        probes = _basis(x0) if exact_divergence else _signs(x0, num_probes, generator)
        u, gained = _walk(denoise, levels, x0, probes)
        first, last = levels[0], levels[-1]
        x_t, dims = _length(last) * u, x0[0].numel()
        scale = schedule.initial_scale
        normal = -0.5 * (sum_per_example((x_t / scale).square()) + dims * math.log(2 * math.pi * scale**2))
        # From the density of x_t to that of u at the end; from that of u to that of x_t / alpha at the start.
        normal = normal + dims * math.log(_length(last) * first.alpha / _length(first))
        log_prob = normal + gained.mean(dim=0)
        if exact_divergence or num_probes == 1:
            return OdeLikelihood(log_prob, torch.full_like(log_prob, 0.0 if exact_divergence else math.nan))
        return OdeLikelihood(log_prob, gained.std(dim=0) / math.sqrt(num_probes))


def _walk(denoise: Denoiser, levels: list[Level], x0: Tensor, probes: Tensor) -> tuple[Tensor, Tensor]:
    """The noisiest ``u``, ``(N, ...)``, and the integral of the divergence by each probe, ``(P, N)``."""
    u = levels[0].alpha / _length(levels[0]) * x0
    image, noise, divergence = _look(denoise, u, levels[0], probes)
    gained = torch.zeros_like(divergence)
    for now, then in itertools.pairwise(levels):
        d_cos = then.alpha / _length(then) - now.alpha / _length(now)
        d_sin = then.sigma / _length(then) - now.sigma / _length(now)
        ahead = denoise(_length(then) * (u + d_cos * image + d_sin * noise), then)
        u = u + 0.5 * (d_cos * (image + ahead.x0) + d_sin * (noise + ahead.eps))
        before = divergence
        image, noise, divergence = _look(denoise, u, then, probes)
        gained += 0.5 * (_angle(then) - _angle(now)) * (before + divergence)
    return u, gained


def _look(denoise: Denoiser, u: Tensor, level: Level, probes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Guess of image and noise, each ``(N, ...)``, and the divergence of ``du`` by each probe, ``(P, N)``."""
    with torch.enable_grad():
        u = u.detach().requires_grad_()
        guess = denoise(_length(level) * u, level)
        products = [torch.autograd.grad(guess.x0, u, probe, retain_graph=True)[0] for probe in probes]
    traces = torch.stack([sum_per_example(probe * product) for probe, product in zip(probes, products, strict=True)])
    # du = cos * eps_hat - sin * x0_hat = (cos * u - x0_hat) / sin
    divergence = (u[0].numel() * math.cos(_angle(level)) - traces) / math.sin(_angle(level))
    return guess.x0.detach(), guess.eps.detach(), divergence


def _angle(level: Level) -> float:
    return math.atan2(level.sigma, level.alpha)


def _length(level: Level) -> float:
    return math.hypot(level.alpha, level.sigma)


def _signs(x0: Tensor, num: int, generator: Generators) -> Tensor:
    """Probes of random signs, ``(num, N, ...)``."""
    draws = uniform((len(x0), num, *x0.shape[1:]), generator, x0.device)
    return torch.where(draws < 0.5, -1.0, 1.0).to(x0.dtype).movedim(1, 0)


def _basis(x0: Tensor) -> Tensor:
    """One probe for each of the D values, ``(D, N, ...)``, so long that the mean over them is the trace."""
    dims = x0[0].numel()
    identity = math.sqrt(dims) * torch.eye(dims, dtype=x0.dtype, device=x0.device)
    return identity.reshape(dims, 1, *x0.shape[1:]).expand(dims, *x0.shape)
