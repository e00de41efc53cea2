"""Two processes (gloo, CPU) train the networks and the codebook of one process on the joined batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import processes
from tests.vae import vq_ddp_process


@pytest.mark.slow
@pytest.mark.parametrize("broadcast_buffers", [True])  # DDP's default; False gave the same
def test_two_processes_make_the_updates_and_the_restarts_of_one(tmp_path, broadcast_buffers):
    before = vq_ddp_process.module().state_dict()
    trained, metrics = vq_ddp_process.train(1, tmp_path)
    one = trained.state_dict()
    processes.run(Path(__file__).with_name("vq_ddp_process.py"), 2, tmp_path, broadcast_buffers)
    two, scores = zip(*[torch.load(tmp_path / f"result_{i}.pt", weights_only=True) for i in (0, 1)], strict=True)
    for name, value in one.items():
        assert torch.equal(two[0][name], two[1][name]), name
        torch.testing.assert_close(two[0][name], value, rtol=0, atol=1e-10)
        if value.is_floating_point():
            assert (value - before[name]).abs().max() > 1e-4, f"{name} did not learn, so equality says nothing"
    assert scores[0] == scores[1] == pytest.approx(metrics, rel=1e-6)
    assert 1 < metrics["val/perplexity"] < 16
    unrestarted, _ = vq_ddp_process.train(1, tmp_path, restart_below=None)
    moved = (unrestarted.quantizer.codebook - one["quantizer.codebook"]).abs().max()
    assert moved > 0.01, "no code was restarted"
