"""Tiny models, data and trainers that the tests share: one process, no download, a few steps a second."""

import functools
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_generative.data.digits import Digits
from lit_generative.data.mixtures import RingMixture
from lit_generative.diffusion.module import DDPM
from lit_generative.diffusion.parameterizations import Epsilon
from lit_generative.diffusion.samplers import DDIMSampler
from lit_generative.diffusion.schedules import LinearSchedule
from lit_generative.gan.losses import NonSaturating
from lit_generative.gan.module import GAN
from lit_generative.networks.dcgan import DCGANDiscriminator, DCGANGenerator
from lit_generative.networks.diffusers_unet import DiffusersUNet
from lit_generative.networks.mlp import MLPDecoder, MLPDenoiser, MLPDiscriminator, MLPEncoder, MLPGenerator
from lit_generative.training.checkpoint_io import SafeCheckpointIO
from lit_generative.training.module import GenerativeModule
from lit_generative.vae.likelihoods import Bernoulli
from lit_generative.vae.module import VAE
from lit_generative.vae.objectives import Elbo

ADAM = functools.partial(torch.optim.Adam, lr=1e-3)


def gan(hidden_dim: int = 5, seed: int = 0, **kwargs: Any) -> GAN:
    """A GAN on 2-D points; ``kwargs`` replace arguments of the module."""
    torch.manual_seed(seed)
    arguments = {
        "generator": MLPGenerator(latent_dim=3, hidden_dim=hidden_dim, num_layers=1),
        "discriminator": MLPDiscriminator(hidden_dim=4, num_layers=1),
        "loss": NonSaturating(),
        "generator_optimizer": ADAM,
        "discriminator_optimizer": ADAM,
    }
    return GAN(**(arguments | kwargs))


def image_gan(num_classes: int | None = None, seed: int = 0, **kwargs: Any) -> GAN:
    """A GAN on 1x8x8 images, with batch norm."""
    torch.manual_seed(seed)
    return gan(
        generator=DCGANGenerator(image_size=8, channels=1, latent_dim=3, width=4, num_classes=num_classes),
        discriminator=DCGANDiscriminator(image_size=8, channels=1, width=4, num_classes=num_classes),
        **kwargs,
    )


def vae(hidden_dim: int = 6, seed: int = 0, **kwargs: Any) -> VAE:
    """A VAE on 1x8x8 images: the automatic module among the three."""
    torch.manual_seed(seed)
    arguments = {
        "encoder": MLPEncoder(sample_shape=(1, 8, 8), latent_dim=3, hidden_dim=hidden_dim, num_layers=1),
        "decoder": MLPDecoder(sample_shape=(1, 8, 8), latent_dim=3, hidden_dim=hidden_dim, num_layers=1),
        "likelihood": Bernoulli(),
        "objective": Elbo(),
        "optimizer": ADAM,
    }
    return VAE(**(arguments | kwargs))


def ddpm(num_classes: int | None = None, seed: int = 0, **kwargs: Any) -> DDPM:
    """A DDPM on 1x8x8 images, 10 noise levels, 3 sampling steps."""
    torch.manual_seed(seed)
    network = DiffusersUNet(
        image_size=8, channels=1, num_classes=num_classes, widths=(8,), layers_per_block=1, attention_levels=()
    )
    return _diffusion(**({"network": network} | kwargs))


def point_ddpm(num_classes: int | None = None, seed: int = 0, **kwargs: Any) -> DDPM:
    """The same on 2-D points."""
    torch.manual_seed(seed)
    network = MLPDenoiser(hidden_dim=5, num_layers=1, num_classes=num_classes)
    return _diffusion(**({"network": network} | kwargs))


def _diffusion(**kwargs: Any) -> DDPM:
    arguments = {
        "schedule": LinearSchedule(num_timesteps=10),
        "parameterization": Epsilon(),
        "sampler": DDIMSampler(num_steps=3),
        "optimizer": ADAM,
    }
    return DDPM(**(arguments | kwargs))


def ring(**kwargs: Any) -> RingMixture:
    """Points: 10 training batches of 6, 2 of validation, 2 of test; 4 classes."""
    arguments = {"num_modes": 4, "num_samples": 84, "batch_size": 6, "val_fraction": 1 / 6, "test_fraction": 1 / 7}
    return RingMixture(**(arguments | kwargs))


def digits(**kwargs: Any) -> Digits:
    """Images 1x8x8 of 10 classes."""
    return Digits(**({"batch_size": 6, "eval_batch_size": 90} | kwargs))


def trainer(tmp_path: Any, **kwargs: Any) -> L.Trainer:
    """A silent, deterministic trainer on the CPU; ``kwargs`` replace its arguments."""
    saves = any(isinstance(callback, ModelCheckpoint) for callback in kwargs.get("callbacks", ()))
    arguments = {
        "default_root_dir": tmp_path,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": saves,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "deterministic": True,
        "plugins": [SafeCheckpointIO()],
    }
    return L.Trainer(**(arguments | kwargs))


def drawn(pipeline: Any, generators: list[torch.Generator], **options: Any) -> torch.Tensor:
    """What a pipeline of diffusers draws, an image a generator: ``(N, C, H, W)`` in ``[-1, 1]``."""
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(batch_size=len(generators), generator=generators, output_type="np", **options).images
    return torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of all parameters and buffers."""
    return {key: value.detach().clone() for key, value in module.state_dict().items()}


def assert_same(actual: Any, expected: Any) -> None:
    """Bitwise equality of tensors in the same structure."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def train(tmp_path: Any, module: GenerativeModule, data: L.LightningDataModule, **kwargs: Any) -> L.Trainer:
    """Fit for 3 updates unless ``kwargs`` say otherwise; ``ckpt_path`` resumes."""
    ckpt_path = kwargs.pop("ckpt_path", None)
    fitted = trainer(tmp_path, **({"max_steps": 3, "limit_val_batches": 0} | kwargs))
    fitted.fit(module, data, ckpt_path=ckpt_path)
    return fitted
