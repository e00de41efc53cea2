"""Trains the VAEs of ``configs/vae`` on binarized digits over several seeds, and tabulates their test likelihoods.

Run: ``python benchmarks/vae_likelihood.py --out benchmarks/results/vae_likelihood.md``, half a CPU hour. Each run is
``litgen fit`` and ``litgen test`` on one thread, in a folder of its own below ``--work``; a run that is there already
is not repeated.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.mode_coverage import ROOT, litgen, spread


class Method(NamedTuple):
    """A config, and what is changed in it."""

    name: str
    config: str
    options: tuple[str, ...] = ()


METHODS = (
    Method("VAE", "vae_digits"),
    Method("beta-VAE, beta 2", "beta_vae_digits"),
    Method("IWAE-5", "iwae_digits"),
    Method("IWAE-5, DReG", "iwae_digits", ("--model.objective.init_args.doubly_reparameterized=true",)),
    Method("IWAE-50", "iwae_digits", ("--model.objective.init_args.num_draws=50",)),
    Method("VampPrior", "vampprior_digits"),
)
SCORES = {
    "nll": ("NLL, nats", ".2f"),
    "elbo": ("ELBO, nats", ".2f"),
    "kl": ("KL, nats", ".2f"),
    "active_units": ("active units", ".1f"),
    "seconds": ("CPU s to train", ".0f"),
}


def execute(method: Method, binarize: str, seed: int, work: Path, more: Sequence[str]) -> dict[str, float]:
    """Train and test once, unless it was done before."""
    options = [*method.options, f"--data.binarize={binarize}", f"--seed_everything={seed}", *more]
    folder = work / f"{method.name.replace(' ', '_')}_{binarize}_{seed}"
    config, result = ROOT / f"configs/vae/{method.config}.yaml", folder / "result.json"
    key = [config.read_text(), *options]
    if result.exists() and (done := json.loads(result.read_text()))["key"] == key:
        return dict(done["scores"])
    seconds = litgen("fit", config, folder, options)
    litgen("test", config, folder, [*options, "--ckpt_path=last"])
    newest = max(folder.glob("runs/**/test/metrics.csv"), key=lambda path: path.stat().st_mtime)
    with newest.open() as lines:
        (row,) = csv.DictReader(lines)
    scores = {name: float(row[f"test/{name}"]) for name in SCORES if name != "seconds"} | {"seconds": seconds}
    result.write_text(json.dumps({"key": key, "scores": scores}))
    print(method.name, binarize, seed, {name: round(value, 3) for name, value in scores.items()}, flush=True)
    return scores


def table(binarize: str, results: dict[str, list[dict[str, Any]]]) -> str:
    """One way to binarize, as Markdown: mean and standard deviation over the seeds."""
    heads = ["method", *(head for head, _ in SCORES.values())]
    lines = [f"## Digits, binarized: {binarize}", "", "| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for name, runs in results.items():
        cells = [spread(form, [run[score] for run in runs]) for score, (_, form) in SCORES.items()]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, then print the tables and write them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--binarize", nargs="+", choices=["dynamic", "static"], default=["dynamic", "static"])
    parser.add_argument("--methods", nargs="+", choices=[m.name for m in METHODS], default=[m.name for m in METHODS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("runs/vae_likelihood"))
    parser.add_argument("--out", type=Path, help="Markdown file to write the tables to")
    options, more = parser.parse_known_args(argv)
    methods = [method for method in METHODS if method.name in options.methods]
    runs = [(m, way, seed) for way in options.binarize for m in methods for seed in options.seeds]
    with ThreadPoolExecutor(options.jobs) as pool:
        scores = list(pool.map(lambda run: execute(*run, options.work.resolve(), more), runs))
    tables = []
    for way in options.binarize:
        results: dict[str, list[dict[str, Any]]] = {}
        for (method, binarize, _), score in zip(runs, scores, strict=True):
            if binarize == way:
                results.setdefault(method.name, []).append(score)
        tables.append(table(way, results))
    head = (
        "# Test likelihoods of VAEs\n\n"
        f"`python benchmarks/vae_likelihood.py`, seeds {', '.join(map(str, options.seeds))}, one thread, torch "
        f"{torch.__version__.partition('+')[0]}, 4,000 updates each. Mean ± standard deviation over the seeds, 180 "
        "held-out digits of 8 x 8 pixels, NLL by 5,000 importance samples. ELBO is a single draw's, noisy by about 0.2."
    )
    text = "\n\n".join([head, *tables]) + "\n"
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
