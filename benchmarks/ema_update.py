"""What an EMA update costs, over the least that any update of the averages must do to memory.

Run: ``python benchmarks/ema_update.py``. The target is 1.20 times one read-modify-write pass.

* Ours: ``on_train_batch_end`` of :class:`lit_generative.callbacks.ema.EMA`, one profile, on a U-Net of 35 million
  parameters: all that a training step pays, counting included.
* One pass: ``torch._foreach_add_`` over the averages and the live weights (``a += w * p``): the cheapest operation that
  reads both, as an average must, and writes one. 12 bytes a parameter, like ours. This is what ours is judged by.
* In place: ``torch._foreach_mul_`` over the averages alone: reads and writes one array, 8 bytes a parameter, and never
  looks at the live weights, so no average can reach it.
* Loop: ``a.mul_(d).add_(p, alpha=1 - d)``, a tensor at a time, as it is mostly written.
* Flat: one ``lerp_`` of two flat tensors, which would need live weights in one piece of memory.

All take turns in one process on one thread, on the same tensors. Judge by CPU time.
"""

from __future__ import annotations

import argparse
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lit_generative.callbacks.ema import EMA
from lit_generative.networks.diffusers_unet import DiffusersUNet

DECAY = 0.999


class Holder(L.LightningModule):
    """The network, and nothing else."""

    def __init__(self, quick: bool) -> None:
        super().__init__()
        widths = (16,) if quick else (128, 256, 256, 256)
        self.network = DiffusersUNet(
            32, 3, widths=widths, layers_per_block=1 if quick else 2, attention_levels=() if quick else (1,)
        )


def ours(module: Holder) -> tuple[Callable[[], None], EMA]:
    """The callback's update, as the Trainer calls it."""
    trainer = L.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, barebones=True)
    ema, batch = EMA(decay=DECAY, ramp_up=None, modules=["network"]), {"image": torch.zeros(1, 1)}
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    ema.setup(trainer, module, "fit")
    ema.on_train_start(trainer, module)

    def update() -> None:
        ema.on_before_optimizer_step(trainer, module, optimizer)
        ema.on_train_batch_end(trainer, module, None, batch, 0)

    return update, ema


def contenders(module: Holder) -> dict[str, Callable[[], Any]]:
    """What takes turns, by name."""
    live: list[Tensor] = list(module.network.parameters())
    averages = [p.detach().clone() for p in live]
    flat, flat_live = (torch.cat([p.detach().flatten() for p in live]) for _ in range(2))

    def loop() -> None:
        for average, p in zip(averages, live, strict=True):
            average.mul_(DECAY).add_(p, alpha=1 - DECAY)

    return {
        "EMA callback": ours(module)[0],
        "one pass": lambda: torch._foreach_add_(averages, live, alpha=1e-9),
        "in place": lambda: torch._foreach_mul_(averages, 1.0),
        "loop": loop,
        "flat": lambda: flat.lerp_(flat_live, 1 - DECAY),
    }


@torch.no_grad()
def measure(updates: dict[str, Callable[[], Any]], rounds: int, repeats: int) -> dict[str, list[float]]:
    """CPU milliseconds an update, a number a round."""
    times: dict[str, list[float]] = {name: [] for name in updates}
    for update in updates.values():
        update()
    for _ in range(rounds):
        for name, update in updates.items():
            started = time.process_time()
            for _ in range(repeats):
                update()
            times[name].append(1000 * (time.process_time() - started) / repeats)
    return times


def table(times: dict[str, list[float]]) -> list[str]:
    """Medians, their ratio to one pass, and the range of the rounds' ratios."""
    rows = ["| update | ms | of one pass (range of rounds) |", "| --- | --- | --- |"]
    base = times["one pass"]
    for name, values in times.items():
        ratios = [a / b for a, b in zip(values, base, strict=True)]
        ratio = statistics.median(values) / statistics.median(base)
        rows.append(
            f"| {name} | {statistics.median(values):.2f} | **{ratio:.3f}** ({min(ratios):.3f}-{max(ratios):.3f}) |"
        )
    return rows


def machine() -> str:
    """Processor and versions; no host name."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return f"{names[0] if names else platform.processor()}, torch {torch.__version__}, lightning {L.__version__}"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=10, help="updates a round")
    parser.add_argument("--quick", action="store_true", help="a tiny network, to see that it runs")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    module = Holder(options.quick)
    parameters = list(module.network.parameters())
    arguments = sys.argv[1:] if argv is None else argv
    print(f"{date.today()}: `{' '.join(['python benchmarks/ema_update.py', *arguments])}`; {machine()}.")
    millions = sum(p.numel() for p in parameters) / 1e6
    print(f"{millions:.1f} M parameters in {len(parameters)} tensors, float32, one thread;")
    print(f"CPU milliseconds an update, medians of {options.rounds} rounds of {options.repeats} in turns.\n")
    print("\n".join(table(measure(contenders(module), options.rounds, options.repeats))))


if __name__ == "__main__":
    main()
