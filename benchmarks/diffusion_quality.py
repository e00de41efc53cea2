"""Trains small diffusion models, and tabulates quality by target, schedule, weighting, sampler and steps.

Run: ``python benchmarks/diffusion_quality.py --out benchmarks/results``, some CPU hours; it writes
``diffusion_quality_digits.md`` and ``diffusion_steps_digits.png`` there. ``--data fashion`` does it on Fashion-MNIST,
which is looked for in ``--fashion-dir``, where Debian's ``dataset-fashion-mnist`` puts it. Every model has the network
and the optimizer of ``configs/diffusion/ddpm_<data>.yaml`` and sees as many images. A figure that is below ``--work``
already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.diffusion_models import Data, Model, Scorer, build, choose_data, train
from benchmarks.runs import recalled, remembered, spread
from lit_generative.diffusion.continuous import EDMSchedule, RectifiedFlow
from lit_generative.diffusion.noise import MinibatchOT, NoiseSource
from lit_generative.diffusion.parameterizations import (
    CleanImage,
    EDMPreconditioning,
    Epsilon,
    FlowVelocity,
    Velocity,
)
from lit_generative.diffusion.samplers import DDIMSampler, DDPMSampler, Sampler
from lit_generative.diffusion.schedules import CosineSchedule, LinearSchedule
from lit_generative.diffusion.solvers import DPMSolver2M, HeunSampler
from lit_generative.diffusion.spacings import Karras, Trailing
from lit_generative.diffusion.times import LogNormalSigma
from lit_generative.diffusion.weightings import EDMWeighting, MinSNR, TruncatedSNR, Uniform
from lit_generative.loading import load_module
from lit_generative.recipe import describe

STEPS = (10, 20, 50, 250)


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
Make = Callable[[int], Sampler]
SAMPLERS: dict[str, Make] = {
    "DDIM": lambda n: DDIMSampler(n, spacing=Trailing()),
    "DDPM": lambda n: DDPMSampler(n, spacing=Trailing()),
    "DPM-Solver++(2M)": lambda n: DPMSolver2M(n, spacing=Trailing()),
    "Heun": lambda n: HeunSampler(n // 2, spacing=Trailing()),
}
"""By the number of network calls, of which Heun makes two a step and one less in the last."""
WALKED: dict[str, dict[str, Make]] = {
    "epsilon, cosine, uniform": SAMPLERS,
    "flow": {name: SAMPLERS[name] for name in ("DDIM", "Heun")},
    "flow, OT coupling": {"DDIM": SAMPLERS["DDIM"]},
    "EDM": {"Heun, Karras": lambda n: HeunSampler(n // 2, spacing=Karras())},
}
"""The models whose calls are varied for other samplers than DDIM, too."""


class Bench:
    """Runs what is missing.

    Args:
        work: Folder of checkpoints and figures.
        steps: Updates of each model.
        samples: How many each figure is of.
        seeds: Of the trainings.
        models: Names; None for all.
        precision: Lightning's, of the trainings.
        cached: Leave out what is missing.
    """

    def __init__(
        self,
        data: Data,
        work: Path,
        steps: int,
        samples: int,
        seeds: Sequence[int],
        models: Sequence[str] | None,
        precision: str = "32-true",
        cached: bool = False,
    ) -> None:
        self.models = [model for model in [*GRID, *OTHERS] if models is None or model.name in models]
        self.data, self.work = data, work if data.name == "digits" else work / data.name
        self.steps, self.samples, self.seeds, self.precision = steps, samples, list(seeds), precision
        self.cached = cached
        self._scorer = Scorer(data)

    def figure(self, model: Model, name: str, make: Make, num_calls: int) -> list[dict[str, float]]:
        """Distance, and seconds an image, of one sampler, for each seed."""
        found = [self._once(model, make(num_calls), f"{name} {num_calls}", seed) for seed in self.seeds]
        return [scores for scores in found if scores]

    def _once(self, model: Model, sampler: Sampler, label: str, seed: int) -> dict[str, float]:
        folder = self.work / f"{model.name.replace(', ', '_').replace(' ', '-')}_{self.steps}_{seed}"
        path = folder / f"{label.replace(' ', '-')}_{self.samples}.json"
        key = [describe(part) for part in (*model, sampler)]
        if self.cached:
            return recalled(path, key) or {}
        return remembered(
            f"{model.name} {seed} {label}", path, key, lambda: self._measure(model, sampler, folder, seed)
        )

    def _measure(self, model: Model, sampler: Sampler, folder: Path, seed: int) -> dict[str, float]:
        if not (folder / "last.ckpt").exists():
            untrained = build(model, self.steps, self.data.name)
            trained_in = train(untrained, self.data, folder, self.steps, seed, self.precision)
            (folder / "seconds.json").write_text(json.dumps(trained_in))
        module: Any = load_module(folder / "last.ckpt")
        module.sampler = sampler
        distance, seconds = self._scorer.score(module, self.samples)
        return {
            "distance": distance,
            "seconds_an_image": seconds / self.samples,
            "seconds_to_train": json.loads((folder / "seconds.json").read_text()),
        }


def mean(found: list[dict[str, float]], name: str) -> float:
    """Over the seeds; of nothing, nan."""
    return sum(each[name] for each in found) / len(found) if found else math.nan


def cell(form: str, found: list[dict[str, float]], name: str, unit: float = 1.0) -> str:
    """Of a table; empty if nothing was measured."""
    return spread(form, [each[name] / unit for each in found]) if found else ""


def grid_table(bench: Bench, name: str, num_calls: Sequence[int]) -> tuple[str, dict[str, list[float]]]:
    """Every model by one sampler, for each number of network calls; also the distances by row."""
    heads = ["model", *(f"{n} calls" for n in num_calls), f"CPU ms an image, {num_calls[-1]} calls", "CPU s to train"]
    lines = [f"## Every model by {name}", "", "| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    curves = {}
    for model in bench.models:
        found = [bench.figure(model, name, SAMPLERS[name], n) for n in num_calls]
        curves[model.name] = [mean(each, "distance") for each in found]
        cells = [cell(".3f", each, "distance") for each in found]
        cells += [cell(".0f", found[-1], "seconds_an_image", 1e-3), cell(".0f", found[0], "seconds_to_train")]
        lines.append("| " + " | ".join([model.name, *cells]) + " |")
    return "\n".join(lines), curves


def walk_table(bench: Bench, num_calls: Sequence[int]) -> tuple[str, dict[str, list[float]]]:
    """Samplers by network calls; also the distances by row."""
    heads = ["model and sampler", *(f"{n} calls" for n in num_calls), f"CPU ms an image, {num_calls[-1]} calls"]
    lines = ["## Samplers of one model", "", "| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    curves = {}
    for model in bench.models:
        for name, make in WALKED.get(model.name, {}).items():
            found = [bench.figure(model, name, make, n) for n in num_calls]
            curves[f"{model.name}: {name}"] = [mean(each, "distance") for each in found]
            cells = [cell(".3f", each, "distance") for each in found]
            cells.append(cell(".0f", found[-1], "seconds_an_image", 1e-3))
            lines.append("| " + " | ".join([f"{model.name}: {name}", *cells]) + " |")
    return "\n".join(lines), curves


def draw(panels: dict[str, tuple[Sequence[int], dict[str, list[float]]]], path: Path) -> None:
    """Distance against network calls, both on logarithmic axes; the last panel is of samplers, the others of models.

    The axes end at twenty times the least distance: a text in the corner tells of curves that are always above.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = (len(panels) + 1) // 2
    figure, grid = pyplot.subplots(2, columns, figsize=(6 * columns, 11), layout="constrained", sharey=True)
    least = min(d for _, curves in panels.values() for distances in curves.values() for d in distances if d > 0)
    for axes, (title, (num_calls, curves)) in zip(grid.flat, panels.items(), strict=False):
        for name, distances in curves.items():
            axes.loglog(num_calls, distances, **look(name), label=name)
        lowest = {name: min((d for d in distances if d > 0), default=0.0) for name, distances in curves.items()}
        above = [f"{name}: {distance:.2g}" for name, distance in lowest.items() if distance > 20 * least]
        if above:
            told = "\n".join(["above, at best:", *above])
            axes.text(0.98, 0.98, told, transform=axes.transAxes, fontsize="small", ha="right", va="top")
        axes.set_xticks(num_calls, [str(n) for n in num_calls])
        axes.set_xticks([], minor=True)
        axes.set(xlabel="network calls", ylabel="Frechet distance", title=title, ylim=(0.9 * least, 20 * least))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    for axes in grid.flat[len(panels) :]:
        axes.axis("off")
    handles, names = grid.flat[0].get_legend_handles_labels()
    grid.flat[len(panels) - 1].legend(fontsize="small", loc="upper right")
    grid.flat[-1].legend(handles, names, fontsize="small", handlelength=3.5, loc="center left")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def look(model: str) -> dict[str, str]:
    """A curve's colour by target, line by schedule, marker by weighting; other models are dotted."""
    if ":" in model:
        return {"marker": "o"}
    target, *others = model.split(", ")
    if target not in TARGETS:
        colors = dict(zip((other.name for other in OTHERS), ("tab:red", "tab:purple", "tab:brown"), strict=True))
        return {"color": colors[model], "linestyle": ":", "marker": "d"}
    schedule, weighting = others
    return {
        "color": dict(zip(TARGETS, ("tab:blue", "tab:orange", "tab:green"), strict=True))[target],
        "linestyle": {"linear": "--", "cosine": "-"}[schedule],
        "marker": {"uniform": "o", "truncated SNR": "^", "min-SNR-5": "s"}[weighting],
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, then print the tables and write them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=750, help="updates of each model")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--calls", nargs="+", type=int, default=list(STEPS), help="network calls, by DDIM")
    parser.add_argument("--other-calls", nargs="+", type=int, default=list(STEPS), help="by the other samplers")
    parser.add_argument("--models", nargs="+", choices=[model.name for model in [*GRID, *OTHERS]])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--precision", default="32-true", help="Lightning's, of the trainings")
    parser.add_argument("--data", choices=("digits", "fashion"), default="digits")
    parser.add_argument("--fashion-dir", default="/usr/share/datasets/fashion-mnist")
    parser.add_argument("--work", type=Path, default=Path("runs/diffusion_quality"))
    parser.add_argument("--cached", action="store_true", help="tabulate what was run before, and run nothing")
    parser.add_argument("--out", type=Path, help="folder to write table and plot to")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    data = choose_data(options.data, options.fashion_dir)
    bench = Bench(
        data,
        options.work,
        options.steps,
        options.samples,
        options.seeds,
        options.models,
        options.precision,
        options.cached,
    )
    calls = {name: options.calls if name == "DDIM" else options.other_calls for name in SAMPLERS}
    grids = {name: grid_table(bench, name, num_calls) for name, num_calls in calls.items()}
    walked, walks = walk_table(bench, options.calls)
    title = {"digits": "digits at 16 x 16", "fashion": "Fashion-MNIST at 32 x 32"}[data.name]
    head = (
        f"# Quality of diffusion models: {title}\n\n"
        f"`python benchmarks/diffusion_quality.py --data {data.name} --steps {options.steps} --samples "
        f"{options.samples} --precision {options.precision}`, seeds {', '.join(map(str, options.seeds))}, one thread, "
        f"torch {torch.__version__.partition('+')[0]}. All ten "
        f"classes; network and optimizer of `ddpm_{data.name}`, {options.steps:,} updates of 64 images in "
        f"`{options.precision}`, "
        f"averaged weights. Frechet distance of {options.samples:,} samples to the training images, in the features of "
        "the shipped net for this data; a guess of the image is clipped to [-1, 1] in all. Steps are spaced by "
        "`Trailing`, or by `Karras` where it says so; DDIM on a flow is Euler's method. Heun takes half as many steps "
        "as it has calls. Lower is better; over several seeds mean \u00b1 standard deviation. Empty cells: not run."
    )
    text = "\n\n".join([head, *(grid for grid, _ in grids.values()), walked]) + "\n"
    print(text)
    if options.out:
        (options.out / f"diffusion_quality_{data.name}.md").write_text(text)
        picture = options.out / f"diffusion_steps_{data.name}.png"
        panels = {f"models, by {name}": (calls[name], curves) for name, (_, curves) in grids.items()}
        draw(panels | {"samplers": (options.calls, walks)}, picture)


if __name__ == "__main__":
    main()
