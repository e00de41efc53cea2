"""Averages on two processes (gloo, CPU): of replicated weights (DDP) and of sharded ones (FSDP2)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lit_generative.callbacks.posthoc_ema import FOLDER
from lit_generative.training.averages import ema_state
from lit_generative.training.checkpoint_io import load_checkpoint
from tests import tiny

pytestmark = pytest.mark.slow  # each process imports everything anew
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("kind", "buffers"), [("ddp", "copy"), ("ddp", "average"), ("fsdp2", "copy")])
def test_two_processes_evaluate_save_and_resume_one_average(tmp_path, kind, buffers):
    command = [sys.executable, str(Path(__file__).with_name("ema_process.py")), kind, str(tmp_path), buffers]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert run.returncode == 0, run.stderr
    whole, stopped = (load_checkpoint(tmp_path / name / "last.ckpt") for name in ("whole", "stopped"))
    for checkpoint in (whole, stopped):  # plain data: whole tensors, wherever they came from
        assert checkpoint["callbacks"]["EMA"]["images"] == 6 * 6
    tiny.assert_same(stopped["state_dict"], whole["state_dict"])
    for name in ("EMA", "PostHocEMA"):
        tiny.assert_same(stopped["callbacks"][name], whole["callbacks"][name])
    seen = [torch.load(tmp_path / f"seen_{rank}.pt", weights_only=True) for rank in (0, 1)]
    tiny.assert_same(seen[1], seen[0])
    slow = ema_state(whole, "slow")
    tiny.assert_same(seen[0], dict(whole["state_dict"]) | slow)
    assert not torch.equal(slow["decoder.layers.0.weight"], ema_state(whole, "fast")["decoder.layers.0.weight"])
    assert ("encoder.1.running_mean" in slow) == (buffers == "average")
    assert len(list((tmp_path / "whole" / FOLDER).iterdir())) == 6
