"""A pretrained autoencoder of diffusers, on whose latents a diffusion model can be trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lit_generative.networks.checks import check_divisible, check_shape
from lit_generative.networks.pretrained import Source, build_from_text, forget_source, load_pretrained, read_settings
from lit_generative.recipe import Recorded


class DiffusersAutoencoder(Recorded, nn.Module):
    """diffusers' ``AutoencoderKL``, as Stable Diffusion has it, frozen: a :class:`~lit_generative.types.LatentCodec`.

    Latents are as the network gives them; its own ``scaling_factor`` is left out, as
    :class:`~lit_generative.diffusion.latents.Latents` measures mean and deviation on the data at hand.

    Source: Rombach et al. 2022, sec. 3.1 (arXiv:2112.10752).

    Args:
        image_size: Height and width in pixels, which need not be those it was trained with.
        pretrained: A folder as ``save_pretrained`` writes it, or the name of one on the hub; safetensors only.
        subfolder: Of that folder, as in ``"vae"`` of a pipeline's.
        revision: Commit, branch or tag on the hub.
        config: Instead of ``pretrained``, for checkpoints, which hold the weights: its architecture as JSON text.

    Attributes:
        sample_shape: Shape of one image.
        latent_shape: Shape of one latent, ``(D, h, w)``.
        num_classes: None: it takes no labels.

    Raises:
        ValueError: If the network is not to be had, is of another class, or cannot halve the image so often.
    """

    def __init__(
        self,
        image_size: int,
        pretrained: str | None = None,
        subfolder: str | None = None,
        revision: str | None = None,
        config: str | None = None,
    ) -> None:
        super().__init__()
        if (pretrained is None) == (config is None):
            raise ValueError(
                "DiffusersAutoencoder: give pretrained, a folder or a name on the hub. Only checkpoints give config "
                "instead."
            )
        from diffusers import AutoencoderKL  # takes seconds; only who builds this network should wait for it

        self.net: Any
        if pretrained is not None:
            source = Source(pretrained, subfolder, revision)
            read_settings("DiffusersAutoencoder", AutoencoderKL, source)  # refuses other classes
            self.net = load_pretrained("DiffusersAutoencoder", AutoencoderKL, source)
            forget_source(self, self.net)
        else:
            self.net = build_from_text("DiffusersAutoencoder", AutoencoderKL, str(config))
        settings = self.net.config
        factor = 2 ** (len(settings.block_out_channels) - 1)
        check_divisible("DiffusersAutoencoder", image_size, factor, "2**(levels - 1)")
        self.sample_shape = (settings.in_channels, image_size, image_size)
        self.latent_shape = (settings.latent_channels, image_size // factor, image_size // factor)
        self.num_classes: int | None = None
        self.eval().requires_grad_(False)

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Encode images.

        Args:
            x: Images in ``[-1, 1]``, ``(N, C, H, W)``.

        Returns:
            Mean and logarithm of the variance of their latents, each ``(N, D, h, w)``.

        Raises:
            ValueError: If ``x`` has another shape.
        """
        check_shape(self, x, self.sample_shape)
        with self._wide(x):
            posterior = self.net.encode(x).latent_dist
        return posterior.mean, posterior.logvar

    def decode(self, z: Tensor) -> Tensor:
        """Decode latents.

        Args:
            z: ``(N, D, h, w)``.

        Returns:
            Images in ``[-1, 1]``, ``(N, C, H, W)``.

        Raises:
            ValueError: If ``z`` has another shape.
        """
        check_shape(self, z, self.latent_shape)
        with self._wide(z):
            return self.net.decode(z).sample.clamp(-1, 1)

    def _wide(self, x: Tensor) -> torch.autocast:
        """Out of float16, in which activations of some of these networks overflow, and they say so."""
        device = x.device.type
        narrow = torch.get_autocast_dtype(device) == torch.float16 and self.net.config.force_upcast
        return torch.autocast(device, enabled=torch.is_autocast_enabled(device) and not narrow)
