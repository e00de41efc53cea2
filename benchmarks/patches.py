"""Trains a DDPM with patches in front of its U-Net and without, for equal CPU time, and compares samples.

Run: ``python benchmarks/patches.py --out benchmarks/results/patches.md``, about a CPU hour. The network is that of
``configs/diffusion/ddpm_<data>.yaml`` but for ``patch_size``; how many updates fit into the time is measured first.
A figure that is below ``--work`` already is not measured again.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.diffusion_models import Data, Scorer, build, choose_data, train
from benchmarks.diffusion_quality import GRID
from benchmarks.runs import remembered, spread
from lit_generative.diffusion.samplers import DDIMSampler
from lit_generative.diffusion.spacings import Trailing
from lit_generative.loading import load_module

MODEL = next(model for model in GRID if model.name == "epsilon, cosine, uniform")
PRECISION = "bf16-mixed"


def seconds_an_update(data: Data, patch_size: int, updates: int) -> float:
    """CPU seconds, without those of the start."""

    def seconds(steps: int) -> float:
        with tempfile.TemporaryDirectory() as folder:
            return train(build(MODEL, 100, data.name, patch_size), data, Path(folder), steps, 0, PRECISION)

    seconds(2)  # once for what happens in a process's first training alone
    return (seconds(updates + 2) - seconds(2)) / updates


class Bench:
    """Runs what is missing.

    Args:
        work: Folder of checkpoints and figures.
        minutes: CPU minutes of each training.
        samples: How many each figure is of.
        probe: Updates that are timed.
    """

    def __init__(self, data: Data, work: Path, minutes: float, samples: int, probe: int) -> None:
        self.data, self.work, self.minutes, self.samples, self.probe = data, work, minutes, samples, probe
        self._scorer = Scorer(data)

    def figures(self, patch_size: int, seeds: Sequence[int]) -> list[dict[str, Any]]:
        """Of each seed, as many updates as fit."""
        folder = self.work / f"{self.data.name}_{patch_size}"
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{self.data.name} {patch_size}"
        speed = remembered(
            name,
            folder / "speed.json",
            [self.probe],
            lambda: {"seconds": seconds_an_update(self.data, patch_size, self.probe)},
        )
        steps = max(51, round(60 * self.minutes / speed["seconds"]))
        return [
            remembered(
                f"{name} {seed}",
                folder / f"{seed}.json",
                [self.minutes, self.samples],
                lambda seed=seed: self._measure(patch_size, steps, seed, folder / str(seed)),  # type: ignore[misc]
            )
            for seed in seeds
        ]

    def _measure(self, patch_size: int, steps: int, seed: int, folder: Path) -> dict[str, float]:
        seconds = train(build(MODEL, steps, self.data.name, patch_size), self.data, folder, steps, seed, PRECISION)
        module: Any = load_module(folder / "last.ckpt")
        module.sampler = DDIMSampler(50, spacing=Trailing())
        distance, sampling = self._scorer.score(module, self.samples)
        return {"distance": distance, "updates": steps, "seconds": seconds, "ms": 1000 * sampling / self.samples}


def row(bench: Bench, patch_size: int, seeds: Sequence[int]) -> str:
    """One network's line of the table."""
    found = bench.figures(patch_size, seeds)
    forms = {"updates": ".0f", "seconds": ".0f", "distance": ".4f", "ms": ".1f"}
    cells = [spread(form, [each[name] for each in found]) for name, form in forms.items()]
    return "| " + " | ".join([bench.data.name, str(patch_size), *cells, str(len(found))]) + " |"


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, then print the table and write it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--data", nargs="+", choices=("digits", "fashion"), default=["digits", "fashion"])
    parser.add_argument("--patches", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--minutes", nargs="+", type=float, default=[2.0, 6.0], help="of each kind of data")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--probe", type=int, default=20, help="updates that are timed")
    parser.add_argument("--fashion-dir", default="/usr/share/datasets/fashion-mnist")
    parser.add_argument("--work", type=Path, default=Path("runs/patches"))
    parser.add_argument("--out", type=Path, help="Markdown file to write the table to")
    options = parser.parse_args(argv)
    if len(options.minutes) != len(options.data):
        parser.error(f"--minutes must be as many as --data, {len(options.data)}, got {len(options.minutes)}")
    torch.set_num_threads(1)
    lines = []
    for name, minutes in zip(options.data, options.minutes, strict=True):
        bench = Bench(choose_data(name, options.fashion_dir), options.work, minutes, options.samples, options.probe)
        lines += [row(bench, patch_size, options.seeds) for patch_size in options.patches]
    heads = ["data", "patch", "updates", "CPU s to train", "Frechet distance", "CPU ms a sample", "seeds"]
    text = "\n".join(
        [
            "# Patches in front of the U-Net, at equal minutes\n",
            f"`python benchmarks/patches.py --data {' '.join(options.data)} --minutes "
            f"{' '.join(f'{minutes:g}' for minutes in options.minutes)}`, one thread, torch "
            f"{torch.__version__.partition('+')[0]}, `{PRECISION}`. Epsilon, cosine schedule; network and optimizer "
            "of `ddpm_digits` (16 x 16) and `ddpm_fashion` (32 x 32) but for the patches; rates fall to zero at the "
            f"end of each training. Frechet distance of {options.samples} samples (DDIM, 50 steps) to the training "
            "images, in the features of the shipped net for the data. Mean \u00b1 standard deviation over the seeds.\n",
            "| " + " | ".join(heads) + " |",
            "| --- " * len(heads) + "|",
            *lines,
        ]
    )
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
