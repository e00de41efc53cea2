"""What the Frechet distance costs by three methods, how exact each is, and what a whole evaluation of digits costs.

Run: ``python benchmarks/frechet_speed.py``. Targets: ours, with the factor of the real covariance kept, is 15 times as
fast as ``scipy.linalg.sqrtm`` and 3 times as fast as ``torch.linalg.eigvals``; an evaluation of 10,000 digits with all
measures, drawing them apart, takes under 3 s.

* All methods get the same two moments, in float64, and give the distance. ``scipy.linalg.sqrtm`` is the way of the
  original code, ``torch.linalg.eigvals`` that of torchmetrics (its own function is called).
* Features are Gaussian, their standard deviations fall by a power law, and their axes are mixed.
* The exact value comes from the samples themselves: with centred sets ``X = Q R`` and ``Y = P S``, the trace of the
  root is the sum of the singular values of ``R S^T``; no covariance is formed, so nothing is squared.
* CPU time of one thread, all methods in turns, medians of the rounds.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import torch
from scipy.linalg import sqrtm
from sklearn.datasets import load_digits
from threadpoolctl import threadpool_limits
from torch import Tensor
from torchmetrics import __version__ as torchmetrics_version
from torchmetrics.image.fid import _compute_fid

from lit_generative.metrics.feature_set import FeatureCollector
from lit_generative.metrics.frechet import Frechet, frechet_distance
from lit_generative.metrics.inception_score import InceptionScore
from lit_generative.metrics.kernel import Kernel
from lit_generative.metrics.measures import Measure
from lit_generative.metrics.mode_coverage import ModeCoverage
from lit_generative.metrics.moments import Moments, moments_of
from lit_generative.metrics.precision_recall import PrecisionRecall
from lit_generative.metrics.small_nets import DigitsFeatures


def features(num: int, dim: int, seed: int) -> Tensor:
    """Samples ``(num, dim)`` of a Gaussian, float64; another seed shifts and narrows it a little."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(dim, dim, generator=torch.Generator().manual_seed(99), dtype=torch.float64)).Q
    scale = torch.arange(1, dim + 1, dtype=torch.float64).pow(-0.5 - 0.05 * seed)
    return torch.randn(num, dim, generator=generator, dtype=torch.float64) * scale @ axes + 0.5 + 0.01 * seed


def exact_distance(x: Tensor, y: Tensor) -> float:
    """The distance from the samples, without their covariances."""
    means = (x.mean(dim=0) - y.mean(dim=0)).square().sum()
    r, s = (torch.linalg.qr(a - a.mean(dim=0), mode="r").R / (len(a) - 1) ** 0.5 for a in (x, y))
    return float(means + r.square().sum() + s.square().sum() - 2 * torch.linalg.svdvals(r @ s.T).sum())


def by_sqrtm(real: Moments, fake: Moments) -> float:
    """The formula as it is written."""
    root = sqrtm((real.cov @ fake.cov).numpy())
    means = (real.mean - fake.mean).square().sum()
    return float(means + real.cov.trace() + fake.cov.trace()) - 2 * float(np.trace(root).real)


def by_eigvals(real: Moments, fake: Moments) -> float:
    """As torchmetrics computes it."""
    return float(_compute_fid(real.mean, real.cov, fake.mean, fake.cov))


def not_kept(real: Moments, fake: Moments) -> float:
    """Ours the first time."""
    return frechet_distance(Moments(real.count, real.mean, real.cov), fake)


Method = Callable[[Moments, Moments], float]
METHODS: dict[str, Method] = {
    "scipy.linalg.sqrtm": by_sqrtm,
    "torch.linalg.eigvals": by_eigvals,
    "ours, factor not kept": not_kept,
    "ours, factor kept": frechet_distance,
}


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds, and the result."""
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def compare(num_real: int, num_fake: int, dim: int, rounds: int, sqrtm_rounds: int) -> None:
    """Print a table of the methods."""
    x, y = features(num_real, dim, 0), features(num_fake, dim, 1)
    real, fake, exact = moments_of(x), moments_of(y), exact_distance(x, y)
    frechet_distance(real, fake)  # the factor is kept from here on
    seconds: dict[str, list[float]] = {name: [] for name in METHODS}
    values = {}
    for turn in range(rounds):
        for name, method in METHODS.items():
            if turn < sqrtm_rounds or method is not by_sqrtm:
                spent, values[name] = timed(lambda method=method: method(real, fake))
                seconds[name].append(spent)
    print(f"\n{dim} dimensions, {num_real:,} real and {num_fake:,} generated; the exact distance is {exact:.9f}.\n")
    print("| method | rounds | seconds (range) | ours is faster, kept | not kept | relative error |")
    print("| --- " * 6 + "|")
    medians = {name: statistics.median(spent) for name, spent in seconds.items()}
    for name, spent in seconds.items():
        kept, not_yet = (medians[name] / medians[f"ours, factor {how}"] for how in ("kept", "not kept"))
        cells = [name, str(len(spent)), f"{medians[name]:.4f} ({min(spent):.4f}-{max(spent):.4f})"]
        cells += [f"{kept:.1f} x", f"{not_yet:.1f} x", f"{values[name] / exact - 1:.1e}"]
        print(f"| {' | '.join(cells)} |", flush=True)


def digit_images(num: int) -> tuple[Tensor, Tensor]:
    """As many digits as the training part has, 1,437, and ``num`` noisy ones, uint8."""
    digits = torch.from_numpy(load_digits().images).float().mul(255 / 16).unsqueeze(1)
    generator = torch.Generator().manual_seed(0)
    chosen = digits[torch.randint(len(digits), (num,), generator=generator)]
    noisy = chosen + 20 * torch.randn(chosen.shape, generator=generator)
    return digits[:1437].round().to(torch.uint8), noisy.round().clamp(0, 255).to(torch.uint8)


def evaluate(num: int, rounds: int) -> None:
    """Print what the parts of one evaluation of digits cost."""
    extractor = DigitsFeatures().eval()
    measures: tuple[Measure, ...] = (Frechet(), Kernel(), InceptionScore(), PrecisionRecall(), ModeCoverage())

    @torch.inference_mode()
    def collect(images: Tensor) -> Any:
        collector = FeatureCollector(extractor.dim, keep_embedding=True, keep_logits=True)
        for batch in images.split(500):
            collector.update(extractor(batch))
        return collector.gather()

    real_images, fake_images = digit_images(num)
    real = collect(real_images)
    parts: dict[str, list[float]] = {}
    for _ in range(rounds):
        spent, fake = timed(lambda: collect(fake_images))
        parts.setdefault("features", []).append(spent)
        for measure in measures:
            spent, _ = timed(lambda measure=measure, fake=fake: measure.compute(real, fake))
            parts.setdefault(type(measure).__name__, []).append(spent)
    print(f"\nOne evaluation of {num:,} digits against {len(real_images):,} real ones, {extractor.dim} features.\n")
    print("| part | seconds (range) |")
    print("| --- | --- |")
    for name, seconds in [*parts.items(), ("**in all**", [sum(turn) for turn in zip(*parts.values(), strict=True)])]:
        print(f"| {name} | {statistics.median(seconds):.3f} ({min(seconds):.3f}-{max(seconds):.3f}) |", flush=True)


def machine() -> str:
    """Processor and versions; no host name."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    versions = f"torch {torch.__version__}, scipy {scipy.__version__}, torchmetrics {torchmetrics_version}"
    return ", ".join([*names[:1], versions])


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="48 dimensions and few samples, to see that it runs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sqrtm-rounds", type=int, default=3, help="the slowest method runs in the first of them only")
    options = parser.parse_args(argv)
    dim, most, few, digits = (48, 300, 30, 200) if options.quick else (2048, 10_000, 1_000, 10_000)
    arguments = sys.argv[1:] if argv is None else argv
    print(f"{date.today()}: `{' '.join(['python benchmarks/frechet_speed.py', *arguments])}`; {machine()}.")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            for fake in (most, few):
                compare(most, fake, dim, options.rounds, options.sqrtm_rounds)
            evaluate(digits, options.rounds)
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    main()
