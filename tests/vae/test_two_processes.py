"""Two processes (gloo, CPU) make the updates of one process on the joined batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import processes
from tests.vae import vae_process


@pytest.mark.slow
def test_two_processes_make_the_updates_of_one(tmp_path):
    processes.run(Path(__file__).with_name("vae_process.py"), 2, tmp_path)
    for likelihood in vae_process.LIKELIHOODS:
        before = vae_process.module(likelihood).state_dict()
        one = vae_process.train(likelihood, 1, tmp_path).state_dict()
        two = [torch.load(tmp_path / f"{likelihood}_{rank}.pt", weights_only=True) for rank in (0, 1)]
        for name, value in one.items():
            assert torch.equal(two[0][name], two[1][name]), name
            torch.testing.assert_close(two[0][name], value, rtol=0, atol=1e-10)
            assert (value - before[name]).abs().max() > 1e-5, f"{name} did not learn, so equality says nothing"
