"""A process of ``test_two_processes.py``: ``python ddp_process.py WORLD FOLDER [OPTION=VALUE ...]`` trains a GAN."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path

import lightning as L
import torch
from torch import Tensor

from lit_generative.data.mixtures import RingMixture
from lit_generative.gan.losses import NonSaturating
from lit_generative.gan.module import GAN
from lit_generative.gan.penalties import Penalty
from lit_generative.networks.mlp import MLPDiscriminator, MLPGenerator


class SlopeOnBoth(Penalty):
    """Squared gradient at data and at samples: a penalty without random numbers."""

    def compute(self, discriminator: Callable[[Tensor], Tensor], x: Tensor, x_hat: Tensor) -> Tensor:
        total = torch.zeros(len(x))
        for points in (x, x_hat):
            points = points.detach().requires_grad_(True)
            (slope,) = torch.autograd.grad(discriminator(points).sum(), points, create_graph=True)
            total = total + slope.square().sum(dim=1)
        return total


class FixedNoiseGAN(GAN):
    """Its noise is a function of the data, so that it does not depend on the process."""

    def _latent(self, x: Tensor) -> Tensor:
        weights = torch.linspace(-40, 40, x.shape[1] * self.latent_dim).view(x.shape[1], self.latent_dim)
        return torch.sin(x @ weights)


def module(accumulate_grad_batches: int = 1) -> GAN:
    torch.manual_seed(0)
    sgd = functools.partial(torch.optim.SGD, lr=0.5, momentum=0.9)
    return FixedNoiseGAN(
        MLPGenerator(latent_dim=3, hidden_dim=8, num_layers=2),
        MLPDiscriminator(hidden_dim=8, num_layers=2),
        NonSaturating(),
        sgd,
        sgd,
        penalties=[SlopeOnBoth()],
        accumulate_grad_batches=accumulate_grad_batches,
    )


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
