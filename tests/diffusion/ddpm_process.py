"""A process of ``test_two_processes.py``: ``python ddpm_process.py WORLD FOLDER`` trains and tests a DDPM."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lit_generative.callbacks.density_evaluation import DensityEvaluation
from lit_generative.data.digits import Digits
from lit_generative.diffusion.bounds import ContinuousGaussian
from lit_generative.diffusion.likelihood import BoundEstimator, FlowEstimator
from lit_generative.diffusion.module import DDPM
from lit_generative.diffusion.noise import NoiseSource
from lit_generative.diffusion.objectives import Hybrid, Prediction
from lit_generative.diffusion.parameterizations import Velocity
from lit_generative.diffusion.samplers import DDIMSampler
from lit_generative.diffusion.schedules import CosineSchedule
from lit_generative.diffusion.weightings import MinSNR
from lit_generative.networks.mlp import MLPDenoiser


class DoubleDigits(Digits):
    """Digits as float64."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch | {"image": batch["image"].double() / 127.5 - 1}


class FixedNoise(NoiseSource):
    """A function of the data, whatever the process."""

    def draw(self, x0: Tensor) -> Tensor:
        return torch.sin(1000 * (x0.cumsum(dim=-1) + x0.cumsum(dim=-2)))


class FixedTimesDDPM(DDPM):
    """Its times are a function of the data, too."""

    def predict_noisy(self, x0: Tensor, t: Tensor, *beside: Any) -> Prediction:
        t = (x0.flatten(start_dim=1).sum(dim=1).abs() * 997).long() % 20
        return super().predict_noisy(x0, t, *beside)


def module() -> DDPM:
    torch.manual_seed(0)
    return FixedTimesDDPM(
        MLPDenoiser(hidden_dim=16, num_layers=2, num_classes=10, sample_shape=(1, 8, 8), learned_variance=True),
        CosineSchedule(20),
        Velocity(),
        DDIMSampler(4),
        functools.partial(torch.optim.SGD, lr=1e-2, momentum=0.9),
        objective=Hybrid(weighting=MinSNR(), decoder=ContinuousGaussian()),
        noise=FixedNoise(),
    ).double()


def run(world: int, folder: Path) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Weights after six updates, and what is said of the test data."""
    built = module()
    options: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": world,
        "strategy": "ddp" if world > 1 else "auto",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
    }
    data = DoubleDigits(batch_size=24 // world, eval_batch_size=30)
    L.Trainer(**options, max_steps=6, limit_val_batches=0).fit(built, data)
    weights = {name: value.clone() for name, value in built.state_dict().items()}
    density = DensityEvaluation([BoundEstimator(10), FlowEstimator(4, num_probes=2)])
    scores = L.Trainer(**options, callbacks=[density]).test(built.float(), Digits(eval_batch_size=30), verbose=False)[0]
    return weights, {name: float(value) for name, value in scores.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[2])
    weights, found = run(int(sys.argv[1]), target)
    rank = torch.distributed.get_rank()
    torch.save({"weights": weights, "scores": found}, target / f"of_{rank}.pt")
    torch.distributed.barrier()  # who leaves first would cut the other one off
    torch.distributed.destroy_process_group()
