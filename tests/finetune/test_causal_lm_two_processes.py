"""Two processes (gloo, CPU) see answers of unequal length, and log the mean over the tokens of both."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.finetune import causal_lm_process

ROOT = Path(__file__).parents[2]


@pytest.mark.slow  # each process imports everything anew
def test_two_processes_log_the_loss_and_perplexity_of_one(tiny_llama, tmp_path):
    one = causal_lm_process.validated(1, tiny_llama, tmp_path)
    assert set(one) == {"val/loss", "val/perplexity"}
    command = [sys.executable, str(Path(__file__).with_name("causal_lm_process.py")), "2", tiny_llama, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=200)
    for rank in (0, 1):
        two = torch.load(tmp_path / f"logged_{rank}.pt", weights_only=True)
        torch.testing.assert_close(two, one, rtol=1e-5, atol=0)
