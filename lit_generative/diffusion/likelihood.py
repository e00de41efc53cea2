"""How likely data is under a diffusion model: what the callback ``DensityEvaluation`` is given."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import Tensor
from typing_extensions import override

from lit_generative.diffusion.bounds import ContinuousGaussian, Decoder, DiscretizedGaussian, evaluate_bound
from lit_generative.diffusion.denoiser import Denoiser
from lit_generative.diffusion.ode_likelihood import ode_log_likelihood
from lit_generative.diffusion.spacings import Spacing
from lit_generative.diffusion.variances import LearnedVariance, PosteriorVariance, ReverseVariance
from lit_generative.recipe import Recorded
from lit_generative.tensor_ops import Generators, uniform
from lit_generative.types import DensityEstimator

if TYPE_CHECKING:
    from lit_generative.diffusion.module import DDPM


class BoundEstimator(Recorded, DensityEstimator):
    """The variational bound, an upper bound on the negative log-likelihood, from one draw of noise a step.

    Gives ``vlb`` (nats), its parts ``vlb_prior``, ``vlb_decoder`` and ``vlb_steps_0`` (the least noisy quarter) to
    ``vlb_steps_3``, and of 8-bit images ``vlb_bits_per_dim``.

    Source: see :func:`lit_generative.diffusion.bounds.evaluate_bound`.

    Args:
        num_steps: Of the walk that is scored; None for every time of a discrete schedule.
        variance: Of the steps down; None for the learned one if there is one, else the posterior's.
        spacing: Which times; None for evenly spaced ones. Those of a flow end at next to no noise, where a network that
            never saw so little costs thousands of nats: there take ``Trailing``.

    Raises:
        ValueError: If ``num_steps`` is below 1.
    """

    def __init__(
        self, num_steps: int | None = None, variance: ReverseVariance | None = None, spacing: Spacing | None = None
    ) -> None:
        if num_steps is not None and num_steps < 1:
            raise ValueError(f"BoundEstimator: num_steps must be at least 1, got {num_steps}.")
        self.num_steps, self.variance, self.spacing = num_steps, variance, spacing

    @override
    def check(self, module: DDPM) -> None:
        _check_plain("BoundEstimator", module)

    @override
    def estimate(self, module: DDPM, x: Tensor, y: Tensor | None, generator: Generators) -> dict[str, Tensor]:
        is_image = x.ndim == 4
        decoder: Decoder = DiscretizedGaussian() if is_image else ContinuousGaussian()
        learned = getattr(module.network, "learned_variance", False)
        variance = self.variance or (LearnedVariance() if learned else PosteriorVariance())
        denoise = _plain_denoiser(module, x, y, module.clip_samples)
        terms = evaluate_bound(denoise, x, variance, decoder, self.num_steps, generator, self.spacing)
        values = {"vlb": terms.sum(dim=0), "vlb_prior": terms[-1], "vlb_decoder": terms[0]}
        quarters = terms[1:-1].tensor_split(4)
        values |= {f"vlb_steps_{i}": part.sum(dim=0) for i, part in enumerate(quarters)}
        return values | ({"vlb_bits_per_dim": values["vlb"] / _bits(x)} if is_image else {})


class FlowEstimator(Recorded, DensityEstimator):
    """The likelihood under the probability-flow ODE.

    Gives ``ode_nll`` (nats), ``ode_standard_error`` (of one example's estimate, over the probes), and of 8-bit images
    ``ode_bits_per_dim``: there uniform noise of a level's width is added first, so that it is an upper bound, and
    ``ode_nll`` is of the noisy images, a density on ``[-1, 1]``.

    Source: see :func:`lit_generative.diffusion.ode_likelihood.ode_log_likelihood`.

    Args:
        num_steps: Noise levels visited.
        spacing: Which; None for evenly spaced times.
        num_probes: Random vectors for the divergence; two or more give a standard error.
        exact_divergence: For data of few dimensions.

    Raises:
        ValueError: If ``num_steps`` is below 2 or ``num_probes`` below 1.
    """

    def __init__(
        self,
        num_steps: int = 50,
        spacing: Spacing | None = None,
        num_probes: int = 2,
        exact_divergence: bool = False,
    ) -> None:
        if num_steps < 2 or num_probes < 1:
            raise ValueError(
                f"FlowEstimator: num_steps must be at least 2 and num_probes at least 1, got {num_steps} and "
                f"{num_probes}."
            )
        self.num_steps, self.spacing = num_steps, spacing
        self.num_probes, self.exact_divergence = num_probes, exact_divergence

    @override
    def check(self, module: DDPM) -> None:
        _check_plain("FlowEstimator", module)

    @override
    def estimate(self, module: DDPM, x: Tensor, y: Tensor | None, generator: Generators) -> dict[str, Tensor]:
        is_image = x.ndim == 4
        denoise = _plain_denoiser(module, x, y, clip=False)
        if is_image:
            x = x + (2 * uniform(x.shape, generator, x.device) - 1) / 255
        found = ode_log_likelihood(
            denoise, x, self.num_steps, self.spacing, self.num_probes, self.exact_divergence, generator
        )
        values = {"ode_nll": -found.log_prob, "ode_standard_error": found.standard_error}
        return values | ({"ode_bits_per_dim": -found.log_prob / _bits(x) + math.log2(255 / 2)} if is_image else {})


def _check_plain(who: str, module: DDPM) -> None:
    """Only a diffusion model of pixels, whose steps do not remember, has a likelihood."""
    if not hasattr(module, "denoiser"):
        raise TypeError(f"{who}: needs a DDPM, got a {type(module).__name__}. Leave it out.")
    if module.latents is not None:
        raise ValueError(f"{who}: the likelihood of latents is not that of images. Evaluate a model of pixels.")
    if module.self_conditioning:
        raise ValueError(
            f"{who}: with self_conditioning a step depends on the guesses before it, and nothing is known of the "
            "likelihood. Evaluate a model trained without."
        )


def _plain_denoiser(module: DDPM, x: Tensor, y: Tensor | None, clip: bool) -> Denoiser:
    """The network without guidance, which makes no model of the data."""
    condition = None if module.condition is None else module.condition.of(x)
    denoise = module.denoiser(y, condition)
    denoise.guidance, denoise.clip = None, clip
    return denoise


def _bits(x: Tensor) -> float:
    """Nats of an example in one bit for each of its dimensions."""
    return math.log(2) * math.prod(x.shape[1:])
