"""A process of ``test_adversarial_module.py``: ``python adversarial_process.py WORLD FOLDER`` trains."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lit_generative.data.digits import Digits
from lit_generative.networks.conv_kl import ConvMapEncoder
from lit_generative.networks.conv_vq import ConvFeatureDecoder
from lit_generative.networks.patch_discriminator import PatchDiscriminator
from lit_generative.vae.adversarial_module import AdversarialVAE
from lit_generative.vae.likelihoods import Gaussian

IMAGES = {"image_size": 8, "channels": 1, "width": 4, "num_stages": 1}


class DoubleDigits(Digits):
    """Digits as float64."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        batch = super().on_after_batch_transfer(batch, dataloader_idx)
        return batch | {"image": batch["image"].double()}


class FixedNoiseVAE(AdversarialVAE):
    """Takes its noise as a function of the data, so that it does not depend on the process."""

    def _draw(self, mean: Tensor, logvar: Tensor) -> Tensor:
        return mean + (0.5 * logvar).exp() * torch.sin(400 * mean.detach())


def module() -> AdversarialVAE:
    torch.manual_seed(0)
    sgd = functools.partial(torch.optim.SGD, momentum=0.9)
    discriminator = PatchDiscriminator(batch_norm=False, **IMAGES)
    for parameter in discriminator.parameters():
        torch.nn.init.normal_(parameter, std=0.5)  # so that verdicts lie on both sides of the hinge
    return FixedNoiseVAE(
        ConvMapEncoder(dim=2, num_blocks=1, **IMAGES),
        ConvFeatureDecoder(dim=2, num_blocks=1, **IMAGES),
        discriminator,
        Gaussian(sigma=0.5),
        functools.partial(sgd, lr=1e-3),
        functools.partial(sgd, lr=0.02),
        kl_weight=0.1,
        adversarial_weight=1.0,
        start_step=2,
    ).double()


def train(world: int, folder: Path) -> AdversarialVAE:
    built = module()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=world,
        strategy="ddp" if world > 1 else "auto",
        max_steps=6,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(built, DoubleDigits(batch_size=24 // world))
    return built


if __name__ == "__main__":
    torch.set_num_threads(1)
    trained = train(int(sys.argv[1]), Path(sys.argv[2]))
    torch.save(trained.state_dict(), Path(sys.argv[2]) / f"weights_{trained.global_rank}.pt")
    torch.distributed.barrier()  # who leaves first would cut the other one off
    torch.distributed.destroy_process_group()
