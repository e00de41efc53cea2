"""Two processes (gloo, CPU) make the updates of one process on the joined batch, and report its figures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import processes
from tests.diffusion import ddpm_process


@pytest.mark.slow
def test_two_processes_make_the_updates_of_one_and_give_its_likelihoods(tmp_path):
    before = ddpm_process.module().state_dict()
    one, scores = ddpm_process.run(1, tmp_path)
    processes.run(Path(__file__).with_name("ddpm_process.py"), 2, tmp_path)
    two = [torch.load(tmp_path / f"of_{rank}.pt", weights_only=True) for rank in (0, 1)]
    for name, value in one.items():
        assert torch.equal(two[0]["weights"][name], two[1]["weights"][name]), name
        torch.testing.assert_close(two[0]["weights"][name], value, rtol=0, atol=1e-10)
        if name != "network.embedding.weight":
            assert (value - before[name]).abs().max() > 1e-5, f"{name} did not learn: equality says nothing"
    for name in ("test/vlb", "test/vlb_bits_per_dim", "test/ode_nll", "test/ode_bits_per_dim"):
        assert two[0]["scores"][name] == pytest.approx(scores[name], rel=1e-5), name
