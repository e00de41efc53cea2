"""Stable Diffusion 1.x, 2.x and XL as a network: latents, noise levels, prompts and the U-Net.

Source: Rombach et al. 2022 (arXiv:2112.10752); Podell et al. 2023 (arXiv:2307.01952).
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from lit_generative.finetune.pipelines import build_pipeline, load_pipeline, noise_of
from lit_generative.finetune.prompts import Encoded, prompts_of
from lit_generative.tensor_ops import Generators, expand_like, full_precision, randn


class Noisy(NamedTuple):
    """Latents, noise, and the mixture of the two that the U-Net sees."""

    z: Tensor
    """Latents, ``(N, C, h, w)``."""
    eps: Tensor
    """The noise that is to be found, ``(N, C, h, w)``."""
    x_t: Tensor
    """The mixture, ``(N, C, h, w)``."""
    t: Tensor
    """Times, ``(N,)`` int64."""


class StableDiffusion(nn.Module):
    """The parts of a pretrained pipeline; nothing of it asks for a gradient.

    Args:
        who: Named in messages.
        pretrained: A pipeline's folder, or its name on the hub.
        revision: Commit, branch or tag on the hub.

    Attributes:
        unet: Predicts the noise, or the velocity, of latents.
        vae: The autoencoder, in float32 always.
        prompts: Text encoders and their tokenizers.
        schedule: Noise levels that it was trained on.
        parameterization: What the U-Net predicts.

    Raises:
        ValueError: As :func:`.pipelines.load_pipeline` and :func:`.pipelines.noise_of`.
    """

    def __init__(self, who: str, pretrained: str, revision: str | None = None) -> None:
        super().__init__()
        pipeline = load_pipeline(who, pretrained, revision)
        self.who = who
        self.pipeline_class = type(pipeline).__name__
        self.unet, self.vae = pipeline.unet, pipeline.vae
        self.prompts = prompts_of(pipeline)
        self.scheduler = pipeline.scheduler
        self.schedule, self.parameterization = noise_of(who, pipeline.scheduler)
        self.factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.requires_grad_(False)
        self.eval()

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return cast(torch.device, self.vae.device)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width that the U-Net was made for, in pixels."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.factor, width * self.factor

    # ---- latents

    def check_images(self, images: Tensor) -> None:
        """Refuse what the autoencoder cannot take.

        Raises:
            ValueError: If it is no ``(N, 3, H, W)`` with sides that the autoencoder divides.
        """
        if images.ndim != 4 or images.shape[1] != 3 or any(side % self.factor for side in images.shape[2:]):
            raise ValueError(
                f"{self.who}: images must be (N, 3, H, W) with sides that {self.factor} divides, got "
                f"{tuple(images.shape)}. Set the data's image_size, and its channels to 3."
            )

    @torch.no_grad()
    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance of unscaled latents.

        Args:
            images: In ``[-1, 1]``, ``(N, 3, H, W)``.

        Returns:
            Each ``(N, C, h, w)``, float32.
        """
        with full_precision(images.device):  # that of SDXL overflows in float16
            posterior = self.vae.encode(images.float()).latent_dist
        return posterior.mean, posterior.logvar

    def latents(self, posterior: tuple[Tensor, ...], generator: Generators = None) -> Tensor:
        """A draw from the posterior, scaled as the U-Net takes it.

        Args:
            posterior: As :meth:`posterior` gives it.
            generator: Source of the draw, see :func:`lit_generative.tensor_ops.randn`.
        """
        # In this layout: randn_like would else fill its numbers in in an order that depends on where they come from.
        mean, logvar = (part.contiguous() for part in posterior)
        noise = randn(mean.shape, generator, mean.device)
        return (mean + (0.5 * logvar).exp() * noise) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Images in ``[-1, 1]``, ``(N, 3, H, W)`` float32, of scaled latents ``(N, C, h, w)``."""
        with full_precision(z.device):
            images: Tensor = self.vae.decode(z.float() / self.vae.config.scaling_factor).sample
        return images.float().clamp(-1, 1)

    # ---- the U-Net

    def noised(self, z: Tensor, t: Tensor, eps: Tensor, shown: Tensor | None = None) -> Noisy:
        """Mix latents ``z`` and noise at the times ``t``; ``shown`` is mixed in, if that is another."""
        alpha, sigma = (expand_like(value, z) for value in self.schedule.alpha_sigma(t))
        return Noisy(z, eps, alpha * z + sigma * (eps if shown is None else shown), t)

    def target(self, noisy: Noisy) -> Tensor:
        """What the U-Net shall predict, ``(N, C, h, w)``."""
        alpha, sigma = (expand_like(value, noisy.z) for value in self.schedule.alpha_sigma(noisy.t))
        return self.parameterization.target(noisy.z, noisy.eps, alpha, sigma)

    def predict(self, x_t: Tensor, t: Tensor, prompts: Encoded) -> Tensor:
        """What the U-Net predicts.

        SDXL is told, too, that pictures were not cropped and have the size that they have.

        Args:
            x_t: Noisy latents, ``(N, C, h, w)``.
            t: Times, ``(N,)`` or a scalar.
            prompts: ``N`` of them.

        Returns:
            ``(N, C, h, w)``, float32.
        """
        dtype = self.unet.conv_in.weight.dtype
        added = {}
        if prompts.pooled is not None:
            height, width = (side * self.factor for side in x_t.shape[2:])
            sizes = torch.tensor([height, width, 0, 0, height, width], device=x_t.device, dtype=dtype)
            added = {"text_embeds": prompts.pooled.to(dtype), "time_ids": sizes.expand(len(x_t), -1)}
        output = self.unet(x_t.to(dtype), t, prompts.hidden.to(dtype), added_cond_kwargs=added or None)
        prediction: Tensor = output.sample
        return prediction.float()

    @torch.no_grad()
    def draw(self, x_t: Tensor, prompts: Encoded, negative: Encoded | None, scale: float, num_steps: int) -> Tensor:
        """Walk from noise to latents by DDIM (Song et al. 2021, arXiv:2010.02502), as a pipeline of diffusers does.

        Args:
            x_t: Standard normal noise, ``(N, C, h, w)``.
            prompts: ``N`` of them.
            negative: What guidance leads away from, ``N``; None for no guidance.
            scale: ``negative + scale * (prompts - negative)`` is followed.
            num_steps: How many steps.

        Returns:
            Scaled latents, ``(N, C, h, w)``.
        """
        # Switching from another scheduler, diffusers would take clip_sample for granted.
        scheduler = DDIMScheduler.from_config(self.scheduler.config, clip_sample=False)
        scheduler.set_timesteps(num_steps, device=x_t.device)
        both = prompts if negative is None else _joined(negative, prompts)
        x_t = x_t * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            if negative is None:
                output = self.predict(x_t, t, both)
            else:
                away, towards = self.predict(torch.cat([x_t, x_t]), t, both).chunk(2)
                output = away + scale * (towards - away)
            x_t = scheduler.step(output, t, x_t).prev_sample
        return x_t

    def pipeline(self, **replaced: Any) -> Any:
        """A pipeline of these very modules, with the scheduler that came with them.

        Args:
            replaced: Other modules in place of some of them, by the pipeline's names.
        """
        own = {"unet": self.unet, "vae": self.vae, "scheduler": self.scheduler}
        parts = {**own, **self.prompts.tokenizers, **self.prompts.encoders, **replaced}
        return build_pipeline(self.pipeline_class, parts, self.prompts.zeros_for_empty)


def _joined(first: Encoded, second: Encoded) -> Encoded:
    pooled = None
    if first.pooled is not None and second.pooled is not None:
        pooled = torch.cat([first.pooled, second.pooled])
    return Encoded(torch.cat([first.hidden, second.hidden]), pooled)
