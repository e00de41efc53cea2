"""A process of ``test_vq_two_processes.py``: ``python vq_ddp_process.py WORLD FOLDER BROADCAST`` trains a VQ-VAE."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy

from lit_generative.data.digits import Digits
from lit_generative.networks.code_prior import PixelCNNPrior
from lit_generative.networks.conv_vq import ConvFeatureDecoder, ConvFeatureEncoder
from lit_generative.networks.quantizer import VectorQuantizer
from lit_generative.vae.likelihoods import Gaussian
from lit_generative.vae.vq_module import VQVAE

BATCH_SIZE = 24


class DoubleDigits(Digits):
    """Gives its data as float64."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        batch = super().on_after_batch_transfer(batch, dataloader_idx)
        return batch | {"image": batch["image"].double()}


def module(restart_below: float | None = 12.0) -> VQVAE:
    """Sixteen codes, each the nearest to 24 vectors of the joined batch if all are used alike."""
    torch.manual_seed(0)
    shape = {"image_size": 8, "channels": 1, "dim": 3, "width": 6, "num_stages": 1, "num_blocks": 1}
    return VQVAE(
        ConvFeatureEncoder(**shape),
        VectorQuantizer(16, dim=3, decay=0.8, restart_below=restart_below),
        ConvFeatureDecoder(**shape),
        PixelCNNPrior(16, grid_size=4, width=5, num_layers=2, num_classes=10),
        Gaussian(sigma=0.5),
        functools.partial(torch.optim.Adam, lr=0.01),
    ).double()


def train(
    world: int, folder: Path, restart_below: float | None = 12.0, broadcast_buffers: bool = True
) -> tuple[VQVAE, dict[str, float]]:
    """The trained module, and what validation says of it."""
    built = module(restart_below)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=DDPStrategy(broadcast_buffers=broadcast_buffers) if world > 1 else "auto",
        max_steps=6,
        val_check_interval=6,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(built, DoubleDigits(batch_size=BATCH_SIZE // world, eval_batch_size=54 // world))
    return built, {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}


if __name__ == "__main__":
    torch.set_num_threads(1)
    trained, metrics = train(int(sys.argv[1]), Path(sys.argv[2]), broadcast_buffers=sys.argv[3] == "True")
    torch.save((trained.state_dict(), metrics), Path(sys.argv[2]) / f"result_{trained.global_rank}.pt")
    torch.distributed.barrier()  # who leaves first would cut the other one off
    torch.distributed.destroy_process_group()
