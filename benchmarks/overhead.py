"""What a training step costs through Lightning, our modules and our callbacks, over a bare PyTorch loop.

Run: ``python benchmarks/overhead.py``. The target is 1.10 times the bare loop's CPU time for each family.

* Ours: module and data of a config, a Trainer with EMA, SampleGrid and Checkpoint (neither fires while timed), the
  progress bar at a terminal's pace, CSV and TensorBoard loggers, ``log_every_n_steps=50``, the config's schedules.
* Bare: the same networks, optimizers, loader and precision, and nothing but forward, loss, zero_grad, backward and
  step: no EMA, schedule, logging, seeding or bar. The losses are written out here, so that what our modules compute
  beyond them counts as overhead. The GAN's loop is a careful one: one forward pass of the generator serves both
  updates, and the discriminator is frozen in the generator's.

Both run in turns in one process on one thread, each round with fresh weights. Steps are timed after a warm-up, so
set-up is excluded and the change of epochs included. Judge by CPU time: wall time also holds what else the machine did.
Importing Lightning sets ``PYTORCH_NVML_BASED_CUDA_CHECK``, with which torch's Adam looks for a GPU's driver at every
step where there is none; a bare loop imports no Lightning, so it runs without that variable.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import io
import itertools
import logging
import os
import platform
import re
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch.cli import instantiate_module
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lit_generative.callbacks.checkpoint import Checkpoint
from lit_generative.callbacks.ema import EMA
from lit_generative.callbacks.progress_bar import RunProgressBar
from lit_generative.callbacks.sample_grid import SampleGrid
from lit_generative.data.batches import InMemoryExamples
from lit_generative.data.digits import Digits
from lit_generative.data.image_data import ImageDataModule
from lit_generative.data.splits import Splits
from lit_generative.diffusion.module import DDPM
from lit_generative.gan.module import GAN
from lit_generative.tensor_ops import from_uint8
from lit_generative.training.checkpoint_io import SafeCheckpointIO
from lit_generative.training.csv_logger import CSVLogger
from lit_generative.training.module import GenerativeModule
from lit_generative.vae.module import VAE

CONFIGS = Path(__file__).parents[1] / "configs"
NEVER = 10**9
GPU_CHECK = "PYTORCH_NVML_BASED_CUDA_CHECK"
Step = Callable[[Tensor, Tensor], None]
Autocast = Callable[[], torch.autocast]


class Setting(NamedTuple):
    """A row of the table."""

    family: str
    config: str
    share: float
    """Steps in proportion to ``--steps``: the slow networks need fewer."""
    width: int | None = None
    """Channels of the networks where they differ from the config's; the data is then random, 1 x 32 x 32."""

    def build(self) -> tuple[GenerativeModule, ImageDataModule]:
        """The module, always with the same weights, and data ready to be read."""
        config = yaml.safe_load((CONFIGS / self.config).read_text())
        arguments = config["model"]["init_args"]
        for name in ("generator", "discriminator", "encoder", "decoder"):
            if self.width and name in arguments:
                arguments[name]["init_args"]["width"] = self.width
        torch.manual_seed(0)
        module = instantiate_module(FAMILIES[self.family][0], arguments)
        data = RandomImages(batch_size=64) if self.width else Digits(**config["data"]["init_args"])
        data.setup("fit")
        return module.train(), data


SETTINGS = (
    Setting("gan", "gan/dcgan_digits.yaml", share=1.0),
    Setting("vae", "vae/vae_digits.yaml", share=2.0),
    Setting("ddpm", "diffusion/ddpm_digits.yaml", share=0.5),
    Setting("gan", "gan/dcgan_fashion.yaml", share=0.25, width=64),
    Setting("vae", "vae/vae_fashion.yaml", share=0.25, width=64),
)


class RandomImages(ImageDataModule):
    """Noise of Fashion-MNIST's padded shape: what the pixels show does not matter to the clock."""

    num_classes = 10
    native_shape = (1, 32, 32)

    @override
    def load_splits(self) -> Splits:
        images = torch.randint(256, (6400, *self.native_shape), dtype=torch.uint8)
        part = InMemoryExamples(images, torch.zeros(len(images), dtype=torch.int64))
        return Splits(part, part, part)


def gan_step(module: GAN, optimizers: Sequence[Optimizer], autocast: Autocast) -> Step:
    """One update of each network; non-saturating loss (Goodfellow et al. 2014, sec. 3)."""
    generator, discriminator, latent_dim = module.generator, module.discriminator, module.latent_dim
    generator_optimizer, discriminator_optimizer = optimizers

    def step(x: Tensor, y: Tensor) -> None:  # noqa: ARG001
        with autocast():
            x_hat = generator(torch.randn(len(x), latent_dim))
            real_logits, fake_logits = discriminator(x).float(), discriminator(x_hat.detach()).float()
            loss = (F.softplus(-real_logits) + F.softplus(fake_logits)).mean()
        discriminator_optimizer.zero_grad()
        loss.backward()
        discriminator_optimizer.step()

        discriminator.requires_grad_(False)
        with autocast():
            loss = F.softplus(-discriminator(x_hat).float()).mean()
        discriminator.requires_grad_(True)
        generator_optimizer.zero_grad()
        loss.backward()
        generator_optimizer.step()

    return step


def vae_step(module: VAE, optimizers: Sequence[Optimizer], autocast: Autocast) -> Step:
    """One update; Bernoulli likelihood, KL in closed form (Kingma & Welling 2014, eq. 10)."""
    encoder, decoder, (optimizer,) = module.encoder, module.decoder, optimizers

    def step(x: Tensor, y: Tensor) -> None:  # noqa: ARG001
        with autocast():
            mean, logvar = (value.float() for value in encoder(x))
            output = decoder(mean + (0.5 * logvar).exp() * torch.randn_like(mean)).float()
            reconstruction = F.binary_cross_entropy_with_logits(output, 0.5 * (x + 1), reduction="sum")
            loss = (reconstruction + 0.5 * (mean.square() + logvar.exp() - logvar - 1).sum()) / len(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def ddpm_step(module: DDPM, optimizers: Sequence[Optimizer], autocast: Autocast) -> Step:
    """One update; the network predicts the noise (Ho et al. 2020, eq. 14)."""
    network, (optimizer,) = module.network, optimizers
    alphas = module.schedule.alphas_cumprod.sqrt().float()
    sigmas = (1 - module.schedule.alphas_cumprod).sqrt().float()

    def step(x0: Tensor, y: Tensor) -> None:
        t = torch.randint(len(alphas), (len(x0),))
        eps = torch.randn_like(x0)
        with autocast():
            x_t = alphas[t, None, None, None] * x0 + sigmas[t, None, None, None] * eps
            loss = F.mse_loss(network(x_t, t, y).float(), eps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


FAMILIES: dict[str, Any] = {"gan": (GAN, gan_step), "vae": (VAE, vae_step), "ddpm": (DDPM, ddpm_step)}


def bare_step(family: str, module: GenerativeModule, precision: str) -> Step:
    """The family's update, with the optimizers the module would train with."""
    entries: Any = module.configure_optimizers()
    optimizers = [entry["optimizer"] for entry in ([entries] if isinstance(entries, dict) else entries)]
    autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16, enabled=precision == "bf16-mixed")
    return FAMILIES[family][1](module, optimizers, autocast)


class Stopwatch(L.Callback):
    """Reads both clocks at the end of batch ``warmup`` and of the one ``steps`` later."""

    def __init__(self, warmup: int, steps: int) -> None:
        self.warmup, self.steps, self.seen = warmup, steps, 0
        self.readings: list[tuple[float, float]] = []

    @override
    def on_train_batch_end(self, *args: Any) -> None:
        self.seen += 1
        if self.seen in (self.warmup, self.warmup + self.steps):
            self.readings.append((time.process_time(), time.perf_counter()))


def time_bare(setting: Setting, precision: str, watch: Stopwatch) -> None:
    """A round of the bare loop."""
    module, data = setting.build()
    step = bare_step(setting.family, module, precision)
    os.environ.pop(GPU_CHECK, None)
    loader = data.train_dataloader()
    for epoch in itertools.count():
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            step(from_uint8(batch["image"]), batch["label"])
            watch.on_train_batch_end()
            if len(watch.readings) == 2:
                return


def time_ours(setting: Setting, precision: str, watch: Stopwatch) -> None:
    """A round of the Trainer; it takes one step more, since the last one saves a checkpoint."""
    module, data = setting.build()
    os.environ[GPU_CHECK] = "1"  # as Lightning left it
    bar = RunProgressBar()
    bar.seconds = 0.2  # a terminal's pace, whatever the output is
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        trainer = L.Trainer(
            accelerator="cpu",
            devices=1,
            precision=precision,
            max_steps=watch.warmup + watch.steps + 1,
            limit_val_batches=0,
            log_every_n_steps=50,
            logger=[CSVLogger(folder, "csv"), TensorBoardLogger(folder, "tensorboard")],
            callbacks=[EMA(), SampleGrid(NEVER, num_samples=1), Checkpoint(NEVER, dirpath=folder), bar, watch],
            plugins=[SafeCheckpointIO()],
            enable_model_summary=False,
            default_root_dir=folder,
        )
        trainer.fit(module, data)


def measure(run: Callable[..., None], setting: Setting, precision: str, warmup: int, steps: int) -> list[float]:
    """CPU and wall time of a step in one round, ms."""
    gc.collect()
    watch = Stopwatch(warmup, steps)
    run(setting, precision, watch)
    return [1000 * (after - before) / steps for before, after in zip(*watch.readings, strict=True)]


def row(name: str, precision: str, steps: int, rounds: list[list[float]]) -> str:
    """A line of the table: medians, their ratio, and the range of the rounds' ratios."""
    cells = [name, precision, str(steps)]
    columns = list(zip(*rounds, strict=True))
    for bare, ours in ((columns[0], columns[2]), (columns[1], columns[3])):
        ratios = [b / a for a, b in zip(bare, ours, strict=True)]
        a, b = statistics.median(bare), statistics.median(ours)
        cells += [f"{a:.2f}", f"{b:.2f}", f"**{b / a:.3f}** ({min(ratios):.3f}-{max(ratios):.3f})"]
    return f"| {' | '.join(cells)} |"


def machine() -> str:
    """Processor and versions; no host name."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    model = names[0] if names else platform.processor()
    return f"{model}, Python {platform.python_version()}, torch {torch.__version__}, lightning {L.__version__}"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print the table, a row as soon as it is known."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--family", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--size", nargs="+", choices=["digits", "wide"], default=["digits", "wide"])
    parser.add_argument("--precision", nargs="+", choices=["32-true", "bf16-mixed"], default=["32-true"])
    parser.add_argument("--steps", type=int, default=200, help="timed steps a round of the GAN; others in proportion")
    parser.add_argument("--warmup", type=int, default=10, help="steps before them")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    arguments = sys.argv[1:] if argv is None else argv
    print(f"{date.today()}: `{' '.join(['python benchmarks/overhead.py', *arguments])}`; {machine()}.")
    print(f"Milliseconds a step, medians of {options.rounds} rounds in turns; ratio of medians (range of rounds).\n")
    print("| network | precision | steps | CPU: bare | ours | ratio | wall: bare | ours | ratio |")
    print("| --- " * 9 + "|")
    for setting, precision in itertools.product(SETTINGS, options.precision):
        size = "wide" if setting.width else "digits"
        if setting.family in options.family and size in options.size:
            steps = max(1, round(options.steps * setting.share))
            run = (setting, precision, options.warmup, steps)
            costs = [measure(time_bare, *run) + measure(time_ours, *run) for _ in range(options.rounds)]
            name = Path(setting.config).stem + (f", width {setting.width}" if setting.width else "")
            print(row(name, precision, steps, costs), flush=True)


if __name__ == "__main__":
    main()
