"""A resumed run ends in the very state of one that was never stopped."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_generative.training.checkpoint_io import load_checkpoint
from tests.families import FAMILIES, build, digits, trainer

CONFIG = Path(__file__).parents[1] / "configs/vae/vae_digits.yaml"
OVERLAY = """
trainer:
  accelerator: cpu
  max_steps: 900
  enable_progress_bar: false
  callbacks:
    - class_path: lit_generative.callbacks.ema.EMA
    - class_path: lit_generative.callbacks.checkpoint.Checkpoint
      init_args: {every_n_steps: 30}
"""
Settings = dict[str, Any]
STEPS = 12
"""Of five batches an epoch: the run ends in the middle of the third."""


def final_state(folder: Path, family: str, stops: tuple[int, ...] = (), data: Settings = {}, run: Settings = {}):  # noqa: B006
    """The checkpoint at the end of a run that was stopped at ``stops`` and resumed each time in a fresh module."""
    ckpt_path = None
    for index, stop in enumerate((*stops, STEPS)):
        # Later parts start from other weights and another random state: whatever is not restored must show.
        module = build(family, seed=index)
        torch.manual_seed(stop)
        trainer(folder, max_steps=stop, **run).fit(module, digits(**data), ckpt_path=ckpt_path)
        ckpt_path = folder / "last.ckpt"
    return load_checkpoint(ckpt_path)


def assert_same(a: Any, b: Any, where: str = "checkpoint") -> None:
    if isinstance(a, Tensor):
        assert torch.equal(a, b), f"{where} differs by {(a.double() - b.double()).abs().max()}"
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{index}]")
    else:
        assert a == b, f"{where}: {a} and {b}"


def what_must_be_restored(checkpoint: dict[str, Any]) -> dict[str, Any]:
    names = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch")
    return {name: checkpoint[name] for name in names} | {"ema": checkpoint["callbacks"]["EMA"]}


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, dict[str, Any]]:
    """The end of each family's run, which the first test of it trains."""
    return {}


@pytest.mark.parametrize("stop", [3, 5, 10, 11], ids=["mid epoch", "epoch end", "second epoch end", "third epoch"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_resumed_run_ends_bit_for_bit_like_an_uninterrupted_one(tmp_path, monkeypatch, uninterrupted, family, stop):
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    data = {"horizontal_flip": True}
    if family not in uninterrupted:
        uninterrupted[family] = final_state(tmp_path / "a", family, (), data)
    again = final_state(tmp_path / "b", family, (stop,), data)
    assert_same(what_must_be_restored(uninterrupted[family]), what_must_be_restored(again))


@pytest.mark.parametrize("family", FAMILIES)
def test_resuming_twice_with_workers_validation_and_bf16_is_exact_too(tmp_path, monkeypatch, family):
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    data = {"num_workers": 1}
    run = {"precision": "bf16-mixed", "val_check_interval": 2, "check_val_every_n_epoch": None}
    first = final_state(tmp_path / "a", family, (), data, run)
    again = final_state(tmp_path / "b", family, (4, 7), data, run)
    assert_same(what_must_be_restored(first), what_must_be_restored(again))


def test_another_seed_gives_another_run(tmp_path, monkeypatch):
    weights = []
    for seed in ("7", "8"):
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        weights.append(final_state(tmp_path / seed, "vae")["state_dict"])
    assert any(not torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_sampling_grids_and_validation_do_not_shift_training(tmp_path, family):
    with_all = final_state(tmp_path / "a", family)
    module = build(family)
    torch.manual_seed(STEPS)
    bare = trainer(tmp_path / "b", callbacks=[], limit_val_batches=0, enable_checkpointing=False)
    bare.fit(module, digits())
    assert_same(with_all["state_dict"], dict(module.state_dict()))


@pytest.mark.slow  # four processes that import everything anew
def test_a_run_killed_twice_at_any_moment_recovers_and_ends_the_same(tmp_path):
    command = [sys.executable, "-m", "lit_generative", "fit", "--config", str(CONFIG), "--ckpt_path", "last"]
    overlay = tmp_path / "short.yaml"
    overlay.write_text(OVERLAY)
    command += ["--config", str(overlay)]
    states = []
    for folder, kills in ((tmp_path / "whole", 0), (tmp_path / "killed", 2)):
        folder.mkdir()
        for kill in range(kills):
            process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            saved, deadline = None, time.monotonic() + 60
            while saved is None or saved == last_saved(folder):  # killed at once after a save, wherever it then is
                if saved is None:
                    saved = last_saved(folder) or -1
                assert time.monotonic() < deadline
                assert process.poll() is None, "it ended before it was killed"
                time.sleep(0.01)
            time.sleep(0.02 * kill)
            process.send_signal(signal.SIGKILL)
            process.wait()
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        assert not list(folder.rglob(".*.tmp"))
        states.append(load_checkpoint(next(folder.rglob("last.ckpt"))))
    assert_same(*[what_must_be_restored(state) for state in states])


def last_saved(folder: Path) -> int | None:
    return next((file.stat().st_mtime_ns for file in folder.rglob("last.ckpt")), None)
