"""A process of ``test_two_processes.py``: ``python vae_process.py WORLD FOLDER`` trains VAEs in float64."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lit_generative.data.digits import Digits
from lit_generative.networks.mlp import MLPDecoder, MLPEncoder
from lit_generative.vae.gaussians import LearnedGaussian, OptimalGaussian
from lit_generative.vae.likelihoods import Likelihood
from lit_generative.vae.module import VAE
from lit_generative.vae.objectives import ImportanceWeighted
from lit_generative.vae.priors import GaussianMixturePrior


class DoubleDigits(Digits):
    """Digits as float64."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch | {"image": batch["image"].double() / 127.5 - 1}


class FixedNoiseVAE(VAE):
    """Its noise is a function of the posterior, whatever the process."""

    def _latents(self, mean: Tensor, logvar: Tensor, num_draws: int) -> Tensor:
        places = torch.arange(1, num_draws + 1, dtype=mean.dtype).view(-1, 1, 1)
        return mean + (0.5 * logvar).exp() * torch.sin(40 * places * mean.detach())


LIKELIHOODS: dict[str, Callable[[], Likelihood]] = {
    "learned": functools.partial(LearnedGaussian, sigma=0.5),
    "optimal": OptimalGaussian,
}


def module(likelihood: str) -> VAE:
    torch.manual_seed(0)
    sgd = functools.partial(torch.optim.SGD, lr=1e-3, momentum=0.9)
    return FixedNoiseVAE(
        MLPEncoder((1, 8, 8), latent_dim=3, hidden_dim=8),
        MLPDecoder((1, 8, 8), latent_dim=3, hidden_dim=8),
        LIKELIHOODS[likelihood](),
        ImportanceWeighted(3, doubly_reparameterized=True),
        sgd,
        prior=GaussianMixturePrior(3, 4),
    ).double()


def train(likelihood: str, world: int, folder: Path) -> VAE:
    built = module(likelihood)
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
    for likelihood in LIKELIHOODS:
        trained = train(likelihood, int(sys.argv[1]), Path(sys.argv[2]))
        torch.save(trained.state_dict(), Path(sys.argv[2]) / f"{likelihood}_{trained.global_rank}.pt")
    torch.distributed.barrier()  # who leaves first would cut the other one off
    torch.distributed.destroy_process_group()
