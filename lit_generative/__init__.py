"""lit_generative: GAN, VAE and diffusion models for PyTorch Lightning.

Importing the package imports nothing else; ``lit_generative.GAN`` and the others load what they need when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_generative.diffusion.module import DDPM
    from lit_generative.gan.module import GAN
    from lit_generative.loading import load_ema
    from lit_generative.vae.adversarial_module import AdversarialVAE
    from lit_generative.vae.module import VAE
    from lit_generative.vae.vq_module import VQVAE

__version__ = "0.1.0"
__all__ = ["DDPM", "GAN", "VAE", "VQVAE", "AdversarialVAE", "__version__", "load_ema"]

_HOMES = {
    "AdversarialVAE": "vae.adversarial_module",
    "DDPM": "diffusion.module",
    "GAN": "gan.module",
    "VAE": "vae.module",
    "VQVAE": "vae.vq_module",
    "load_ema": "loading",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
