"""How fast Inception features are extracted: torch-fidelity as it comes, and ours in float32 and bfloat16.

Run: ``python benchmarks/inception_speed.py``; two minutes. It writes ``benchmarks/results/inception_speed.md``. The
targets are 2 times torch-fidelity's speed in float32 and 5 times in bfloat16.

The weights are random (time does not depend on their values), the images noise of 32 x 32 pixels. torch-fidelity gets
its default batches of 64. All three run in turns in one process on one thread; judged by CPU time, since wall time also
holds what else the machine did. That the features agree is for the tests to say.
"""

from __future__ import annotations

import argparse
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path

import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from lit_generative.metrics.inception import InceptionV3, _blank

RESULT = Path(__file__).with_name("results") / "inception_speed.md"
LAYERS = ["2048", "logits_unbiased"]
Extract = Callable[[Tensor], object]


def random_weights(path: Path) -> str:
    """Write a file of weights that keep activations finite."""
    net = _blank().to_empty(device="cpu")
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
    nn.init.zeros_(net.fc.bias)
    torch.save(net.state_dict(), path)
    return str(path)


def contestants(weights: str) -> dict[str, Extract]:
    """What is compared, the first being the measure of the others."""
    theirs = FeatureExtractorInceptionV3("inception-v3-compat", LAYERS, feature_extractor_weights_path=weights)
    return {
        "torch-fidelity, batches of 64": lambda images: [theirs(part) for part in images.split(64)],
        "ours, float32": InceptionV3(weights),
        "ours, bfloat16": InceptionV3(weights, dtype="bfloat16"),
    }


def cpu_time(extract: Extract, images: Tensor) -> float:
    """CPU time of an image, ms."""
    start = time.process_time()
    with torch.inference_mode():
        extract(images)
    return 1000 * (time.process_time() - start) / len(images)


def table(times: dict[str, list[float]]) -> list[str]:
    """Medians, images a second, and how many times as fast as the first: of medians, and the range of the rounds."""
    first, *_ = times.values()
    lines = ["| extractor | CPU ms an image | images a second | times as fast |", "| --- " * 4 + "|"]
    for name, values in times.items():
        median, ratios = statistics.median(values), [a / b for a, b in zip(first, values, strict=True)]
        speed = f"**{statistics.median(first) / median:.2f}** ({min(ratios):.2f}-{max(ratios):.2f})"
        lines.append(f"| {name} | {median:.1f} | {1000 / median:.1f} | {speed} |")
    return lines


def machine() -> str:
    """Processor and versions; no host name."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    amx = " with AMX" if info.exists() and "amx_bf16" in info.read_text() else ""
    return f"{names[0] if names else platform.processor()}{amx}, one thread, torch {torch.__version__}"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table and write it down."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=int, default=64, help="images a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one image and one round: to see that it runs")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(argv)
    num, rounds = (1, 1) if options.quick else (options.images, options.rounds)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images = torch.randint(256, (num, 3, 32, 32), dtype=torch.uint8)
    with tempfile.TemporaryDirectory() as folder:
        runs = contestants(random_weights(Path(folder) / "random.pth"))
    for extract in runs.values():
        cpu_time(extract, images[:8])  # warm up
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, extract in runs.items():
            times[name].append(cpu_time(extract, images))
    lines = [
        "# Speed of Inception features",
        "",
        f"{date.today()}, {machine()}.",
        f"Random weights, {num} images of 32 x 32 pixels a round.",
        f"Medians of {rounds} rounds in turns; times as fast: of the medians (range of the rounds).",
        "",
        *table(times),
        "",
        "Again: `python benchmarks/inception_speed.py`. What the two sides hold is said there.",
    ]
    print("\n".join(lines))
    options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
