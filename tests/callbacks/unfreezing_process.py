"""A process of ``test_unfreezing.py``: ``python unfreezing_process.py WORLD FOLDER`` opens a VAE in two stages."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lit_generative.callbacks.unfreezing import GradualUnfreezing
from lit_generative.data.digits import Digits
from lit_generative.networks.mlp import MLPDecoder, MLPEncoder
from lit_generative.vae.likelihoods import Bernoulli
from lit_generative.vae.module import VAE
from lit_generative.vae.objectives import Elbo


class DoubleDigits(Digits):
    """Digits as float64."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch | {"image": batch["image"].double() / 127.5 - 1}


class NoiselessVAE(VAE):
    """Decodes the mean, whatever the process."""

    def _latents(self, mean: Tensor, logvar: Tensor, num_draws: int) -> Tensor:
        return mean.unsqueeze(0)


def train(world: int, folder: Path) -> VAE:
    torch.manual_seed(0)
    built = NoiselessVAE(
        MLPEncoder((1, 8, 8), latent_dim=3, hidden_dim=8),
        MLPDecoder((1, 8, 8), latent_dim=3, hidden_dim=8),
        Bernoulli(),
        Elbo(),
        functools.partial(torch.optim.SGD, lr=1e-3, momentum=0.9),
    ).double()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=world,
        strategy="ddp_find_unused_parameters_true" if world > 1 else "auto",
        callbacks=[GradualUnfreezing([["decoder"], ["encoder"]], every=3, unit="step", rate_decay=0.5)],
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
    rank = torch.distributed.get_rank()
    torch.save(trained.state_dict(), f"{sys.argv[2]}/weights_{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
