"""Latent diffusion: the latents of a trained autoencoder, scaled to unit variance.

Source: Rombach et al. 2022, app. G (arXiv:2112.10752), where one standard deviation is measured on the first batch.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from lit_generative.tensor_ops import Generators, evaluating, randn
from lit_generative.types import LatentCodec


class Latents(nn.Module):
    """A codec that is not trained, and mean and standard deviation of its latents.

    Args:
        codec: Gives latents and images: see :class:`~lit_generative.types.LatentCodec`.

    Attributes:
        latent_shape: Shape of one latent.
        mean: Of each channel, that of the first axis, ``(D, 1, 1)`` or ``(D,)``; NaN until it was measured.
        std: Likewise the standard deviation.

    Raises:
        TypeError: If ``codec`` is none.
        ValueError: If it wants labels.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, codec: nn.Module) -> None:
        super().__init__()
        # A codec that only wraps one it has loaded steps aside, so that the weights have the same names either way.
        codec = getattr(codec, "loaded", codec)
        if not isinstance(codec, LatentCodec):
            raise TypeError(
                f"DDPM: codec must have latent_shape, posterior(x) and decode(z), which {type(codec).__name__} has "
                "not. Give a VAE, an AdversarialVAE, or a DiffusersAutoencoder."
            )
        if getattr(codec, "num_classes", None) is not None:
            raise ValueError(f"DDPM: codec must work without labels, and this {type(codec).__name__} needs them.")
        self.latent_shape = tuple(codec.latent_shape)
        self.codec: nn.Module = cast(nn.Module, codec).requires_grad_(False)
        shape = (self.latent_shape[0], *[1] * (len(self.latent_shape) - 1))
        self.register_buffer("mean", torch.full(shape, torch.nan))
        self.register_buffer("std", torch.full(shape, torch.nan))

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Draws from the posterior, scaled: images ``(N, C, H, W)`` in ``[-1, 1]`` to ``(N, *latent_shape)``."""
        return (self._draw(x) - self.mean) / self.std

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Images ``(N, C, H, W)`` in ``[-1, 1]``, float32, of scaled latents ``(N, *latent_shape)``.

        Raises:
            RuntimeError: If the scale was never measured.
        """
        if not self.measured:
            raise RuntimeError(
                "DDPM: mean and deviation of the latents are measured when training starts. Train first."
            )
        with evaluating(self.codec):
            images: Tensor = self.codec.decode(z * self.std + self.mean)  # type: ignore[operator]
            return images.float().clamp(-1, 1)

    @property
    def measured(self) -> bool:
        """Whether mean and deviation are known."""
        return not bool(self.std.isnan().any())

    @torch.no_grad()
    def measure(self, images: Tensor, batch_size: int = 64) -> None:
        """Measure mean and standard deviation of each channel.

        Args:
            images: ``(N, C, H, W)`` in ``[-1, 1]``.
            batch_size: How many are encoded at a time.

        Raises:
            ValueError: If a channel never varies.
        """
        generator = torch.Generator().manual_seed(0)
        parts = [self._draw(part.to(self.mean.device), generator).cpu() for part in images.split(batch_size)]
        channels = torch.cat(parts).transpose(0, 1).flatten(start_dim=1).double()
        mean, std = channels.mean(dim=1), channels.std(dim=1)
        constant = std <= 1e-6 * (1 + mean.abs())
        if constant.any():
            raise ValueError(f"DDPM: channels {constant.nonzero().flatten().tolist()} of the latents never vary.")
        self.mean.copy_(mean.reshape(self.mean.shape))
        self.std.copy_(std.reshape(self.std.shape))

    def _draw(self, x: Tensor, generator: Generators = None) -> Tensor:
        with evaluating(self.codec):
            mean, logvar = (value.float() for value in self.codec.posterior(x))  # type: ignore[operator]
        noise = torch.randn_like(mean) if generator is None else randn(mean.shape, generator, mean.device)
        return mean + (0.5 * logvar).exp() * noise
