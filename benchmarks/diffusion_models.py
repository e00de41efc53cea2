"""What benchmarks of diffusion models share: a model of a config's network, its training, and its samples' distance."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
import yaml
from lightning.pytorch.cli import instantiate_module

from benchmarks.runs import ROOT
from lit_generative.callbacks.checkpoint import Checkpoint
from lit_generative.callbacks.ema import EMA
from lit_generative.data.digits import Digits
from lit_generative.data.image_data import ImageDataModule
from lit_generative.data.mnist import FashionMNIST
from lit_generative.diffusion.module import DDPM
from lit_generative.diffusion.noise import NoiseSource
from lit_generative.diffusion.objectives import Simple
from lit_generative.diffusion.parameterizations import Parameterization
from lit_generative.diffusion.samplers import DDIMSampler
from lit_generative.diffusion.schedules import NoiseSchedule
from lit_generative.diffusion.times import TimeSampling
from lit_generative.diffusion.weightings import Weighting
from lit_generative.metrics.evaluation import collect_features
from lit_generative.metrics.feature_set import FeatureSet
from lit_generative.metrics.features import FeatureExtractor
from lit_generative.metrics.frechet import Frechet, frechet_distance
from lit_generative.metrics.small_nets import DigitsFeatures, FashionFeatures
from lit_generative.metrics.sources import DataModuleImages, ImageSource, ModelSamples
from lit_generative.training.checkpoint_io import SafeCheckpointIO


class Model(NamedTuple):
    """One way to train."""

    name: str
    parameterization: Parameterization
    schedule: NoiseSchedule
    weighting: Weighting
    times: TimeSampling | None = None
    noise: NoiseSource | None = None


class Data(NamedTuple):
    """Images, and the features that they are compared in."""

    name: str
    module: Callable[[], ImageDataModule]
    extractor: Callable[[], FeatureExtractor]


def choose_data(name: str, fashion_dir: str) -> Data:
    """``digits`` or ``fashion``, as the configs have them."""
    if name == "digits":
        return Data(name, lambda: Digits(image_size=16, resize="stretch", batch_size=64), DigitsFeatures)
    return Data(name, lambda: FashionMNIST(data_dir=fashion_dir, image_size=32, batch_size=64), FashionFeatures)


def build(model: Model, steps: int, data: str = "digits", patch_size: int | None = None) -> DDPM:
    """The model with the config's network and optimizer, and patches of its own if given."""
    arguments = yaml.safe_load((ROOT / f"configs/diffusion/ddpm_{data}.yaml").read_text())["model"]["init_args"]
    arguments["scheduler"]["init_args"]["total_steps"] = steps
    if patch_size is not None:
        arguments["network"]["init_args"]["patch_size"] = patch_size
    torch.manual_seed(0)
    config: DDPM = instantiate_module(DDPM, arguments)
    return DDPM(
        config.network,
        model.schedule,
        model.parameterization,
        DDIMSampler(50),
        config.optimizer,
        config.scheduler,
        Simple(model.weighting),
        model.times,
        model.noise,
        clip_samples=True,
    )


def train(module: DDPM, data: Data, folder: Path, steps: int, seed: int, precision: Any = "32-true") -> float:
    """Train and save; returns the CPU seconds it took."""
    L.seed_everything(seed, verbose=False)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        precision=precision,
        logger=False,
        default_root_dir=folder,
        callbacks=[EMA(half_life=5000), Checkpoint(every_n_steps=10**9, dirpath=str(folder))],
        plugins=[SafeCheckpointIO()],
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    start = time.process_time()
    trainer.fit(module, data.module())
    return time.process_time() - start


class Scorer:
    """Compares samples with all training images."""

    def __init__(self, data: Data) -> None:
        self.data = data
        self._real: FeatureSet | None = None

    def score(self, module: Any, samples: int) -> tuple[float, float]:
        """Frechet distance, and the CPU seconds that the samples took."""
        if self._real is None:
            images = self.data.module()
            images.setup("fit")
            self._real = self._features(DataModuleImages(images, "train"))
        start = time.process_time()
        fake = self._features(ModelSamples(module, samples))
        return frechet_distance(self._real.moments, fake.moments), time.process_time() - start

    def _features(self, source: ImageSource) -> FeatureSet:
        return collect_features(source, self.data.extractor(), [Frechet()], batch_size=100)
