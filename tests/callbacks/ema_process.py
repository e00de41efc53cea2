"""A process of ``test_ema_processes.py``: ``python ema_process.py KIND FOLDER`` trains, resumes and validates."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lit_generative.callbacks.checkpoint import Checkpoint
from lit_generative.callbacks.ema import EMA
from lit_generative.callbacks.fid_evaluation import FIDEvaluation
from lit_generative.callbacks.posthoc_ema import PostHocEMA
from lit_generative.callbacks.sample_grid import SampleGrid
from lit_generative.metrics.frechet import Frechet
from lit_generative.metrics.kernel import Kernel
from lit_generative.recipe import Recorded
from lit_generative.training.module import GenerativeModule
from lit_generative.vae.module import VAE
from tests import tiny
from tests.metrics.tiny_features import TinyFeatures

HALF_LIVES = {"fast": 20.0, "slow": 200.0}
ADAM = functools.partial(torch.optim.Adam, lr=0.05)


class NormedEncoder(Recorded, nn.Sequential):
    """An encoder with batch norm, whose statistics differ between processes."""

    sample_shape = (1, 8, 8)
    latent_dim = 3

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 6))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = super().forward(x).chunk(2, dim=1)
        return mean, logvar


class NormedDecoder(Recorded, nn.Sequential):
    """A decoder with batch norm: samples of two processes differ while their statistics do."""

    sample_shape = (1, 8, 8)
    latent_dim = 3

    def __init__(self) -> None:
        super().__init__(nn.Linear(3, 64), nn.BatchNorm1d(64), nn.Unflatten(1, self.sample_shape))


def normed() -> dict[str, nn.Module]:
    """Networks whose batch norm differs between processes."""
    return {"encoder": NormedEncoder(), "decoder": NormedDecoder()}


class Sharded(VAE):
    """FSDP2: each network is sharded."""

    def configure_model(self) -> None:
        if not isinstance(next(self.encoder.parameters()), DTensor):
            for network in (self.encoder, self.decoder):
                fully_shard(network, mesh=self.device_mesh["data_parallel"])


class Seen(L.Callback):
    """The weights of the last validation's first batch."""

    weights: dict[str, Tensor]

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0) -> None:
        self.weights = {
            key: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
            for key, value in pl_module.state_dict().items()
        }


def run(kind: str, folder: Path, buffers: str, steps: int, seed: int = 0) -> tuple[L.Trainer, Seen]:
    """Fit, from ``last.ckpt`` if there is one."""
    seen, last = Seen(), folder / "last.ckpt"
    sharded = kind == "fsdp2"
    torch.manual_seed(seed)
    networks = {} if sharded else normed()
    trainer = tiny.trainer(
        folder,
        devices=2,
        strategy=ModelParallelStrategy(2, 1, save_distributed_checkpoint=False) if sharded else "ddp",
        max_steps=steps,
        limit_val_batches=1,
        val_check_interval=3,
        check_val_every_n_epoch=None,
        callbacks=[
            EMA(HALF_LIVES, ramp_up=None, buffers=buffers, evaluate="slow"),
            PostHocEMA(every_n_steps=2),
            SampleGrid(every_n_steps=2, num_samples=4),
            # Ten samples are three batches: one process has one more than the other.
            FIDEvaluation(TinyFeatures(), [Frechet(), Kernel()], 10, 3, batch_size=4),
            seen,
            Checkpoint(1000, dirpath=str(folder)),
        ],
    )
    built = tiny.vae(seed=seed, optimizer=ADAM, **networks)
    module: GenerativeModule = built
    if sharded:
        parts = ("encoder", "decoder", "likelihood", "objective", "optimizer")
        module = Sharded(**{name: getattr(built, name) for name in parts})
    trainer.fit(module, tiny.digits(batch_size=3), ckpt_path=last if last.exists() else None)
    return trainer, seen


if __name__ == "__main__":
    kind, place, buffers = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    trainer, seen = run(kind, place / "whole", buffers, 6)
    torch.save(seen.weights, place / f"seen_{trainer.global_rank}.pt")
    run(kind, place / "stopped", buffers, 3)
    trainer.strategy.barrier()
    run(kind, place / "stopped", buffers, 6, seed=5)
