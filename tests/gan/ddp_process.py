"""A process of ``test_two_processes.py``: ``python ddp_process.py WORLD FOLDER [OPTION=VALUE ...]`` trains a GAN."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lit_generative.data.mixtures import RingMixture
from lit_generative.gan.losses import RelativisticPairing
from lit_generative.gan.module import GAN
from lit_generative.gan.penalties import R1, R2
from lit_generative.networks.mlp import MLPDiscriminator, MLPGenerator


class FixedNoiseGAN(GAN):
    """Takes its data as float64, and its noise as a function of the data, so that it does not depend on the process."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch | {"image": batch["image"].double()}

    def _latent(self, x: Tensor) -> Tensor:
        weights = torch.linspace(-40, 40, x.shape[1] * self.latent_dim, dtype=x.dtype)
        return torch.sin(x @ weights.view(x.shape[1], self.latent_dim))


def module(accumulate_grad_batches: int = 1) -> GAN:
    torch.manual_seed(0)
    sgd = functools.partial(torch.optim.SGD, lr=0.5, momentum=0.9)
    return FixedNoiseGAN(
        MLPGenerator(latent_dim=3, hidden_dim=8, num_layers=2),
        MLPDiscriminator(hidden_dim=8, num_layers=2),
        RelativisticPairing(),
        sgd,
        sgd,
        penalties=[R1(gamma=0.5), R2(gamma=0.3, every_n_steps=2)],
        accumulate_grad_batches=accumulate_grad_batches,
    ).double()


def train(world: int, folder: Path, accumulate_grad_batches: int = 1) -> GAN:
    built = module(accumulate_grad_batches)
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
    trainer.fit(built, RingMixture(num_samples=400, batch_size=24 // world))
    return built


if __name__ == "__main__":
    torch.set_num_threads(1)
    trained = train(int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
    torch.save(trained.state_dict(), Path(sys.argv[2]) / f"weights_{trained.global_rank}.pt")
    torch.distributed.barrier()  # who leaves first would cut the other one off
    torch.distributed.destroy_process_group()
