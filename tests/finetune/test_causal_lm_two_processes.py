"""Two processes (gloo, CPU) see answers of unequal length, and log the mean over the tokens of both."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import processes
from tests.finetune import causal_lm_process


@pytest.mark.slow
def test_two_processes_log_the_loss_and_perplexity_of_one(tiny_llama, tmp_path):
    one = causal_lm_process.validated(1, tiny_llama, tmp_path)
    assert set(one) == {"val/loss", "val/perplexity"}
    processes.run(Path(__file__).with_name("causal_lm_process.py"), 2, tiny_llama, tmp_path)
    for rank in (0, 1):
        two = torch.load(tmp_path / f"logged_{rank}.pt", weights_only=True)
        torch.testing.assert_close(two, one, rtol=1e-5, atol=0)
