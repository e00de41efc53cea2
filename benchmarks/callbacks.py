"""What our callbacks and the CSV logger cost in a training step, all together and each by itself.

Run: ``python -m benchmarks.callbacks``. The target is 3 % of a step's CPU time.

* Callbacks: EMA with two half-lives, PostHocEMA (two averages), GradientClipping, MixedPrecision, Throughput,
  SampleGrid, FIDEvaluation and Checkpoint; ``CSVLogger`` at ``log_every_n_steps=50``. Pictures, scores, snapshots and
  checkpoints never come due while timed: how much they cost is up to who sets how often.
* Each hook of each callback is wrapped, and the CPU time inside is added up over a run of steps and divided by that of
  the whole steps: a difference of 3 % between two runs would drown in what else the machine does. ``Lightning's calls``
  is the time in the Trainer's loop over callbacks outside of their hooks, empty hooks and the two readings of the clock
  included. The logger is timed with all that Lightning does to collect what it writes.
* As a cross-check, runs with and without all of them take turns, and the ratio of their CPU times is given.

Networks: a DCGAN and the digits' DDPM as in ``benchmarks/overhead.py``, batch 64; and a U-Net of 35 million parameters
on 16 x 16 images with 8 in a batch, where passes over all weights weigh most. One thread, fresh weights in each round.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from datetime import date
from typing import Any, NamedTuple
from unittest import mock

import lightning as L
import torch
import yaml
from lightning.pytorch.cli import instantiate_module
from lightning.pytorch.trainer import call
from typing_extensions import override

from benchmarks.overhead import CONFIGS, NEVER, SETTINGS, Stopwatch, machine
from lit_generative.callbacks.checkpoint import Checkpoint
from lit_generative.callbacks.ema import EMA
from lit_generative.callbacks.fid_evaluation import FIDEvaluation
from lit_generative.callbacks.gradient_clipping import GradientClipping
from lit_generative.callbacks.mixed_precision import MixedPrecision
from lit_generative.callbacks.posthoc_ema import PostHocEMA
from lit_generative.callbacks.sample_grid import SampleGrid
from lit_generative.callbacks.throughput import Throughput
from lit_generative.data.digits import Digits
from lit_generative.data.image_data import ImageDataModule
from lit_generative.diffusion.module import DDPM
from lit_generative.metrics.small_nets import DigitsFeatures
from lit_generative.training.csv_logger import CSVLogger
from lit_generative.training.module import GenerativeModule

LOG_EVERY = 50
CALLS, LOGGER = "Lightning's calls", "CSVLogger"
Built = tuple[GenerativeModule, ImageDataModule]


class Case(NamedTuple):
    """A network to train."""

    name: str
    build: Callable[[], Built]
    steps: int
    """Timed in a round; a multiple of :data:`LOG_EVERY` where a step is fast enough for logging to show."""


def unet(quick: bool) -> Built:
    """The digits' DDPM with a large network and a small batch."""
    config = yaml.safe_load((CONFIGS / "diffusion/ddpm_digits.yaml").read_text())
    size = {"widths": [16, 16]} if quick else {"widths": [128, 256, 256, 256], "layers_per_block": 2, "patch_size": 1}
    config["model"]["init_args"]["network"]["init_args"].update(size)
    torch.manual_seed(0)
    module = instantiate_module(DDPM, config["model"]["init_args"])
    data = Digits(**config["data"]["init_args"] | {"batch_size": 8})
    data.setup("fit")
    return module.train(), data


def cases(quick: bool) -> list[Case]:
    """What is trained; ``quick`` leaves out the slow ones."""
    settings = {(setting.config, setting.width): setting for setting in SETTINGS}
    dcgan = settings["gan/dcgan_digits.yaml", None] if quick else settings["gan/dcgan_fashion.yaml", 64]
    ddpm = settings["diffusion/ddpm_digits.yaml", None]
    return [
        Case("DCGAN" if quick else "DCGAN 32 x 32, width 64", dcgan.build, LOG_EVERY),
        Case("DDPM, digits", ddpm.build, LOG_EVERY),
        Case("small U-Net" if quick else "U-Net, 35 M", functools.partial(unet, quick), 15),
    ]


class WindowClosedError(Exception):
    """Ends a run before anything is saved or drawn at its end."""


class Meter(Stopwatch):
    """Adds up the CPU time inside functions from the end of batch ``warmup`` on, and ends the run ``steps`` later."""

    def __init__(self, warmup: int, steps: int) -> None:
        super().__init__(warmup, steps)
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._inner = 0.0

    @override
    def on_train_batch_end(self, *args: Any) -> None:
        super().on_train_batch_end(*args)
        if self.seen == self.warmup:
            self.seconds.clear()
        if len(self.readings) == 2:
            raise WindowClosedError

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time added to ``name``, less that of timed functions it calls."""

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            inner, start = self._inner, time.process_time()
            result = function(*args, **kwargs)
            spent = time.process_time() - start
            self.seconds[name] += spent - (self._inner - inner)
            self._inner = inner + spent
            return result

        return wrapper

    def watch(self, callback: L.Callback) -> None:
        """Time each hook that the callback has."""
        for hook in [name for name in dir(L.Callback) if name.startswith("on_")]:
            if getattr(type(callback), hook) is not getattr(L.Callback, hook):
                setattr(callback, hook, self.timed(type(callback).__name__, getattr(callback, hook)))

    @property
    def ms(self) -> float:
        """CPU milliseconds a step."""
        (before, _), (after, _) = self.readings
        return 1000 * (after - before) / self.steps

    def parts(self) -> dict[str, float]:
        """CPU milliseconds a step by name."""
        return {name: 1000 * spent / self.steps for name, spent in self.seconds.items()}


def ours(folder: str, max_norm: float, one_average: int | None) -> list[L.Callback]:
    """All of them, or with one average as our configs have, updated every ``one_average`` steps."""
    several = {"short": 5000.0, "long": 50_000.0}
    averages = (
        [EMA(half_life=5000.0, every_n_steps=one_average)]
        if one_average
        else [EMA(half_life=several), PostHocEMA(every_n_steps=NEVER)]
    )
    return [
        *averages,
        GradientClipping(max_norm=max_norm),
        MixedPrecision(),
        Throughput(),
        SampleGrid(every_n_steps=NEVER),
        FIDEvaluation(DigitsFeatures(), every_n_steps=NEVER),
        Checkpoint(every_n_steps=NEVER, dirpath=folder),
    ]


def run(case: Case, precision: str, warmup: int, steps: int, one_average: int | None, max_norm: float | None) -> Meter:
    """One round; with callbacks and logger, or, if ``max_norm`` is None, without."""
    gc.collect()
    module, data = case.build()
    meter = Meter(warmup, steps)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        callbacks = [] if max_norm is None else ours(folder, max_norm, one_average)
        trainer = L.Trainer(
            accelerator="cpu",
            devices=1,
            precision=precision,  # type: ignore[arg-type]
            max_steps=NEVER,
            limit_val_batches=0,
            log_every_n_steps=LOG_EVERY,
            logger=CSVLogger(folder, "csv") if callbacks else False,
            callbacks=[*callbacks, meter],
            enable_checkpointing=bool(callbacks),
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        if callbacks:
            for callback in callbacks:
                meter.watch(callback)
            connector = trainer._logger_connector
            connector.update_train_step_metrics = meter.timed(LOGGER, connector.update_train_step_metrics)  # type: ignore[method-assign]
            timed = meter.timed(CALLS, call._call_callback_hooks)
            stack.enter_context(mock.patch.object(call, "_call_callback_hooks", timed))
        with contextlib.suppress(WindowClosedError):
            trainer.fit(module, data)
    return meter


def spread(values: Sequence[float], digits: int) -> str:
    """Median and range."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def tables(with_ours: list[Meter], without: list[Meter]) -> list[str]:
    """What each callback costs, the sum, and the cross-check."""
    rows = ["| callback | ms a step (range) | % of a step (range) |", "| --- | --- | --- |"]
    parts = [(meter.parts(), meter.ms) for meter in with_ours]
    names = list(parts[0][0])
    for name in [*sorted(names, key=lambda name: -parts[0][0][name]), "**sum**"]:
        chosen = names if name == "**sum**" else [name]
        costs = [sum(part[key] for key in chosen) for part, _ in parts]
        shares = [100 * cost / total for cost, (_, total) in zip(costs, parts, strict=True)]
        rows.append(f"| {name} | {spread(costs, 3)} | {spread(shares, 2)} |")
    a, b = [meter.ms for meter in without], [meter.ms for meter in with_ours]
    ratios = [y / x for x, y in zip(a, b, strict=True)]
    ratio = statistics.median(b) / statistics.median(a)
    rows.append(f"\nA step: {spread(b, 1)} ms with them, {spread(a, 1)} ms without; ")
    rows[-1] += f"ratio {ratio:.3f} ({min(ratios):.3f}-{max(ratios):.3f})."
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print a table for each network."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small networks and few steps, to see that it runs")
    parser.add_argument("--case", nargs="+", type=int, choices=[0, 1, 2], default=[0, 1, 2], help="which networks")
    parser.add_argument("--precision", choices=["32-true", "bf16-mixed"], default="32-true")
    parser.add_argument("--max-norm", type=float, default=1.0, help="bound of GradientClipping")
    parser.add_argument(
        "--one-average", type=int, metavar="N", help="EMA with one half-life every N steps, and no PostHocEMA"
    )
    parser.add_argument("--warmup", type=int, default=5, help="steps before the timed ones")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(argv)
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    arguments = sys.argv[1:] if argv is None else argv
    print(f"{date.today()}: `{' '.join(['python -m benchmarks.callbacks', *arguments])}`; {machine()}.")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for case in (cases(options.quick)[number] for number in options.case):
            steps = 2 if options.quick else case.steps
            run_one = functools.partial(run, case, options.precision, options.warmup, steps, options.one_average)
            pairs = [(run_one(options.max_norm), run_one(None)) for _ in range(options.rounds)]
            print(f"\n## {case.name}, {options.precision}, {options.rounds} rounds of {steps} steps\n")
            print("\n".join(tables(*map(list, zip(*pairs, strict=True)))), flush=True)
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    main()
