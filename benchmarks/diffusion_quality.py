"""Trains small diffusion models, and tabulates quality by target, schedule, weighting, sampler and steps.

Run: ``python benchmarks/diffusion_quality.py --out benchmarks/results``, one to two CPU hours; it writes
``diffusion_quality_digits.md`` and ``diffusion_steps_digits.png`` there. ``--data fashion`` does it on Fashion-MNIST,
which is looked for in ``--fashion-dir``, where Debian's ``dataset-fashion-mnist`` puts it. Every model has the network
and the optimizer of ``configs/diffusion/ddpm_<data>.yaml`` and sees as many images. A figure that is below ``--work``
already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
import yaml
from lightning.pytorch.cli import instantiate_module

from benchmarks.runs import ROOT, remembered
from lit_generative.callbacks.checkpoint import Checkpoint
from lit_generative.callbacks.ema import EMA
from lit_generative.data.digits import Digits
from lit_generative.data.image_data import ImageDataModule
from lit_generative.data.mnist import FashionMNIST
from lit_generative.diffusion.continuous import EDMSchedule, RectifiedFlow
from lit_generative.diffusion.module import DDPM
from lit_generative.diffusion.noise import MinibatchOT, NoiseSource
from lit_generative.diffusion.objectives import Simple
from lit_generative.diffusion.parameterizations import (
    CleanImage,
    EDMPreconditioning,
    Epsilon,
    FlowVelocity,
    Parameterization,
    Velocity,
)
from lit_generative.diffusion.samplers import DDIMSampler, DDPMSampler, Sampler
from lit_generative.diffusion.schedules import CosineSchedule, LinearSchedule, NoiseSchedule
from lit_generative.diffusion.solvers import DPMSolver2M, EulerSampler, HeunSampler
from lit_generative.diffusion.spacings import Karras, Trailing
from lit_generative.diffusion.times import LogNormalSigma, TimeSampling
from lit_generative.diffusion.weightings import EDMWeighting, MinSNR, TruncatedSNR, Uniform, Weighting
from lit_generative.loading import load_module
from lit_generative.metrics.evaluation import collect_features
from lit_generative.metrics.feature_set import FeatureSet
from lit_generative.metrics.features import FeatureExtractor
from lit_generative.metrics.frechet import Frechet, frechet_distance
from lit_generative.metrics.small_nets import DigitsFeatures, FashionFeatures
from lit_generative.metrics.sources import DataModuleImages, ImageSource, ModelSamples
from lit_generative.recipe import describe
from lit_generative.training.checkpoint_io import SafeCheckpointIO

STEPS = (10, 20, 50, 250)


class Model(NamedTuple):
    """One way to train."""

    name: str
    parameterization: Parameterization
    schedule: NoiseSchedule
    weighting: Weighting
    times: TimeSampling | None = None
    noise: NoiseSource | None = None


TARGETS = {"epsilon": Epsilon(), "x0": CleanImage(), "v": Velocity()}
SCHEDULES = {"linear": LinearSchedule(), "cosine": CosineSchedule()}
WEIGHTINGS = {"uniform": Uniform(), "truncated SNR": TruncatedSNR(), "min-SNR-5": MinSNR(5.0)}
GRID = [
    Model(f"{target}, {schedule}, {weighting}", TARGETS[target], SCHEDULES[schedule], WEIGHTINGS[weighting])
    for target in TARGETS
    for schedule in SCHEDULES
    for weighting in WEIGHTINGS
]
OTHERS = [
    Model("flow", FlowVelocity(), RectifiedFlow(), Uniform()),
    Model("flow, OT coupling", FlowVelocity(), RectifiedFlow(), Uniform(), noise=NoiseSource(coupling=MinibatchOT())),
    Model("EDM", EDMPreconditioning(), EDMSchedule(), EDMWeighting(), LogNormalSigma()),
]
WALKED = {
    "epsilon, cosine, uniform": {
        "DDPM": lambda n: DDPMSampler(n, spacing=Trailing()),
        "DDIM": lambda n: DDIMSampler(n, spacing=Trailing()),
        "DPM-Solver++(2M)": lambda n: DPMSolver2M(n, spacing=Trailing()),
        "Heun, half the steps": lambda n: HeunSampler(n // 2, spacing=Trailing()),
    },
    "flow": {
        "Euler": lambda n: EulerSampler(n, spacing=Trailing()),
        "Heun, half the steps": lambda n: HeunSampler(n // 2, spacing=Trailing()),
    },
    "flow, OT coupling": {"Euler": lambda n: EulerSampler(n, spacing=Trailing())},
    "EDM": {"Heun, half the steps": lambda n: HeunSampler(n // 2, spacing=Karras())},
}
"""Samplers by the number of network calls (Heun makes one less), of the models whose steps are varied."""
Make = Callable[[int], Sampler]


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


def build(model: Model, steps: int, data: str = "digits") -> DDPM:
    """The model with the config's network and optimizer."""
    arguments = yaml.safe_load((ROOT / f"configs/diffusion/ddpm_{data}.yaml").read_text())["model"]["init_args"]
    arguments["scheduler"]["init_args"]["total_steps"] = steps
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


def train(model: Model, data: Data, folder: Path, steps: int, seed: int) -> float:
    """Train and save; returns the CPU seconds it took."""
    L.seed_everything(seed, verbose=False)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        logger=False,
        default_root_dir=folder,
        callbacks=[EMA(half_life=5000), Checkpoint(every_n_steps=10**9, dirpath=str(folder))],
        plugins=[SafeCheckpointIO()],
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    start = time.process_time()
    trainer.fit(build(model, steps, data.name), data.module())
    return time.process_time() - start


class Bench:
    """Runs what is missing.

    Args:
        work: Folder of checkpoints and figures.
        steps: Updates of each model.
        samples: How many each figure is of.
        seeds: Of the trainings.
        models: Names; None for all.
    """

    def __init__(
        self, data: Data, work: Path, steps: int, samples: int, seeds: Sequence[int], models: Sequence[str] | None
    ) -> None:
        self.models = [model for model in [*GRID, *OTHERS] if models is None or model.name in models]
        self.data, self.work = data, work if data.name == "digits" else work / data.name
        self.steps, self.samples, self.seeds = steps, samples, list(seeds)
        self._real: FeatureSet | None = None

    def figure(self, model: Model, sampler: Sampler, label: str) -> list[dict[str, float]]:
        """Distance, and seconds an image, of one sampler, for each seed."""
        return [self._once(model, sampler, label, seed) for seed in self.seeds]

    def _once(self, model: Model, sampler: Sampler, label: str, seed: int) -> dict[str, float]:
        folder = self.work / f"{model.name.replace(', ', '_').replace(' ', '-')}_{self.steps}_{seed}"
        path = folder / f"{label.replace(' ', '-')}_{self.samples}.json"
        key = [describe(part) for part in (*model, sampler)]
        return remembered(
            f"{model.name} {seed} {label}", path, key, lambda: self._measure(model, sampler, folder, seed)
        )

    def _measure(self, model: Model, sampler: Sampler, folder: Path, seed: int) -> dict[str, float]:
        if not (folder / "last.ckpt").exists():
            seconds = train(model, self.data, folder, self.steps, seed)
            (folder / "seconds.json").write_text(json.dumps(seconds))
        module: Any = load_module(folder / "last.ckpt")
        module.sampler = sampler
        if self._real is None:
            images = self.data.module()
            images.setup("fit")
            self._real = self._features(DataModuleImages(images, "train"))
        start = time.process_time()
        fake = self._features(ModelSamples(module, self.samples))
        return {
            "distance": frechet_distance(self._real.moments, fake.moments),
            "seconds_an_image": (time.process_time() - start) / self.samples,
            "seconds_to_train": json.loads((folder / "seconds.json").read_text()),
        }

    def _features(self, source: ImageSource) -> FeatureSet:
        return collect_features(source, self.data.extractor(), [Frechet()], batch_size=100)


def mean(found: list[dict[str, float]], name: str) -> float:
    """Over the seeds."""
    return sum(each[name] for each in found) / len(found)


def grid_table(bench: Bench, num_steps: Sequence[int]) -> str:
    """Every target, schedule and weighting, and the models that are none of these."""
    heads = ["model", *(f"DDIM, {n} steps" for n in num_steps), "CPU s to train"]
    lines = ["## Targets, schedules, weightings", "", "| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for model in bench.models:
        found = [bench.figure(model, DDIMSampler(n, spacing=Trailing()), f"DDIM {n}") for n in num_steps]
        cells = [f"{mean(each, 'distance'):.3f}" for each in found]
        lines.append("| " + " | ".join([model.name, *cells, f"{mean(found[0], 'seconds_to_train'):.0f}"]) + " |")
    return "\n".join(lines)


def walk_table(bench: Bench, num_steps: Sequence[int]) -> tuple[str, dict[str, list[float]]]:
    """Samplers by network calls; also the distances by row."""
    heads = ["model and sampler", *(f"{n} calls" for n in num_steps), f"CPU ms an image, {num_steps[-1]} calls"]
    lines = ["## Samplers", "", "| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    curves = {}
    for model in bench.models:
        samplers: dict[str, Make] = WALKED.get(model.name, {})
        for name, make in samplers.items():
            found = [bench.figure(model, make(n), f"{name} {n}") for n in num_steps]
            curves[f"{model.name}: {name}"] = [mean(each, "distance") for each in found]
            cells = [f"{mean(each, 'distance'):.3f}" for each in found]
            cells.append(f"{1000 * mean(found[-1], 'seconds_an_image'):.0f}")
            lines.append("| " + " | ".join([f"{model.name}: {name}", *cells]) + " |")
    return "\n".join(lines), curves


def draw(curves: dict[str, list[float]], num_steps: Sequence[int], path: Path) -> None:
    """Distance against network calls, both on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for name, distances in curves.items():
        axes.loglog(num_steps, distances, marker="o", label=name)
    axes.set_xticks(num_steps, [str(n) for n in num_steps])
    axes.set(xlabel="network calls", ylabel="Frechet distance")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, then print the tables and write them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=750, help="updates of each model")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--calls", nargs="+", type=int, default=list(STEPS))
    parser.add_argument("--grid-calls", nargs="+", type=int, default=[10, 50])
    parser.add_argument("--models", nargs="+", choices=[model.name for model in [*GRID, *OTHERS]])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--data", choices=("digits", "fashion"), default="digits")
    parser.add_argument("--fashion-dir", default="/usr/share/datasets/fashion-mnist")
    parser.add_argument("--work", type=Path, default=Path("runs/diffusion_quality"))
    parser.add_argument("--out", type=Path, help="folder to write table and plot to")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    data = choose_data(options.data, options.fashion_dir)
    bench = Bench(data, options.work, options.steps, options.samples, options.seeds, options.models)
    grid = grid_table(bench, options.grid_calls)
    walks, curves = walk_table(bench, options.calls)
    title = {"digits": "digits at 16 x 16", "fashion": "Fashion-MNIST at 32 x 32"}[data.name]
    head = (
        f"# Quality of diffusion models: {title}\n\n"
        f"`python benchmarks/diffusion_quality.py --data {data.name} --steps {options.steps} --samples "
        f"{options.samples} --grid-calls {' '.join(map(str, options.grid_calls))}`, seeds "
        f"{', '.join(map(str, options.seeds))}, one thread, torch {torch.__version__.partition('+')[0]}. All ten "
        f"classes; network and optimizer of `ddpm_{data.name}`, {options.steps:,} updates of 64 images in float32, "
        f"averaged weights. Frechet distance of {options.samples:,} samples to the training images, in the features of "
        "the shipped net for this data; a guess of the image is clipped to [-1, 1] in all. Steps are spaced by "
        "`Trailing`, those of EDM's Heun by `Karras`. Lower is better."
    )
    text = "\n\n".join([head, grid, walks]) + "\n"
    print(text)
    if options.out:
        (options.out / f"diffusion_quality_{data.name}.md").write_text(text)
        draw(curves, options.calls, options.out / f"diffusion_steps_{data.name}.png")


if __name__ == "__main__":
    main()
