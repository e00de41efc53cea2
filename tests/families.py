"""One small module of each family, built in Python, and a trainer to run it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import lightning as L
import torch

from lit_generative.callbacks.checkpoint import Checkpoint
from lit_generative.callbacks.ema import EMA
from lit_generative.callbacks.sample_grid import SampleGrid
from lit_generative.data.digits import Digits
from lit_generative.diffusion.module import DDPM
from lit_generative.diffusion.parameterizations import Epsilon
from lit_generative.diffusion.samplers import DDPMSampler
from lit_generative.diffusion.schedules import CosineSchedule
from lit_generative.gan.losses import NonSaturating
from lit_generative.gan.module import GAN
from lit_generative.networks.code_prior import PixelCNNPrior
from lit_generative.networks.conv_vae import ConvDecoder, ConvEncoder
from lit_generative.networks.conv_vq import ConvFeatureDecoder, ConvFeatureEncoder
from lit_generative.networks.dcgan import DCGANDiscriminator, DCGANGenerator
from lit_generative.networks.diffusers_unet import DiffusersUNet
from lit_generative.networks.quantizer import VectorQuantizer
from lit_generative.training.checkpoint_io import SafeCheckpointIO
from lit_generative.training.lr_schedules import WarmupCosine
from lit_generative.training.module import GenerativeModule
from lit_generative.vae.likelihoods import Bernoulli, Gaussian
from lit_generative.vae.module import VAE
from lit_generative.vae.objectives import Elbo
from lit_generative.vae.vq_module import VQVAE

FAMILIES = ("gan", "vae", "vqvae", "ddpm")
adam = functools.partial(torch.optim.Adam, lr=1e-3, betas=(0.5, 0.999))
schedule = functools.partial(WarmupCosine, warmup_steps=2, total_steps=20)


def build(family: str, seed: int = 0, **changes: Any) -> GenerativeModule:
    """A module of ``family`` for digits of 8 x 8; the weights depend on ``seed``."""
    torch.manual_seed(seed)
    if family == "gan":
        defaults = {
            "generator": DCGANGenerator(8, 1, latent_dim=5, width=4, num_classes=10),
            "discriminator": DCGANDiscriminator(8, 1, width=4, num_classes=10),
            "loss": NonSaturating(),
            "generator_optimizer": adam,
            "discriminator_optimizer": adam,
            "generator_scheduler": schedule,
            "discriminator_scheduler": schedule,
        }
        return GAN(**defaults | changes)
    if family == "vae":
        defaults = {
            "encoder": ConvEncoder(8, 1, latent_dim=3, width=8),
            "decoder": ConvDecoder(8, 1, latent_dim=3, width=8),
            "likelihood": Bernoulli(),
            "objective": Elbo(),
            "optimizer": adam,
            "scheduler": schedule,
        }
        return VAE(**defaults | changes)
    if family == "vqvae":
        defaults = {
            "encoder": ConvFeatureEncoder(8, 1, dim=3, width=8, num_stages=1, num_blocks=1),
            # Of 256 vectors a code on average, so that some are restarted soon.
            "quantizer": VectorQuantizer(16, dim=3, decay=0.8, restart_below=100.0),
            "decoder": ConvFeatureDecoder(8, 1, dim=3, width=8, num_stages=1, num_blocks=1),
            "prior": PixelCNNPrior(16, grid_size=4, width=8, num_layers=2, num_classes=10, dropout=0.1),
            "likelihood": Gaussian(),
            "optimizer": adam,
            "scheduler": schedule,
        }
        return VQVAE(**defaults | changes)
    defaults = {
        "network": DiffusersUNet(8, 1, num_classes=10, widths=(8, 16), layers_per_block=1, patch_size=2, dropout=0.1),
        "schedule": CosineSchedule(20),
        "parameterization": Epsilon(),
        "sampler": DDPMSampler(4),
        "optimizer": adam,
        "scheduler": schedule,
    }
    return DDPM(**defaults | changes)


def digits(**changes: Any) -> Digits:
    """Digits in batches of 256: five an epoch."""
    return Digits(**{"batch_size": 256, "eval_batch_size": 100} | changes)


def trainer(folder: Path, **changes: Any) -> L.Trainer:
    """A quiet CPU trainer with our callbacks, which saves at every step it is told to."""
    callbacks = [
        EMA(half_life=1000, ramp_up=10),
        SampleGrid(every_n_steps=3, num_samples=4),
        Checkpoint(1000, dirpath=str(folder)),
    ]
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "default_root_dir": folder,
        "logger": False,
        "callbacks": callbacks,
        "plugins": [SafeCheckpointIO()],
        "max_steps": 12,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "deterministic": True,
    }
    return L.Trainer(**defaults | changes)
