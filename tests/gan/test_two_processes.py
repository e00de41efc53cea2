"""Two processes (gloo, CPU) make the update of one process on the joined batch; so do the parts of a batch."""

from __future__ import annotations

import os
from pathlib import Path
from unittest import mock

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

from tests import processes, tiny
from tests.gan import ddp_process


@pytest.mark.slow
@pytest.mark.parametrize("parts", [1, 3])
def test_two_processes_make_the_updates_of_one(tmp_path, parts):
    before = ddp_process.module().state_dict()
    one = ddp_process.train(1, tmp_path).state_dict()
    processes.run(Path(__file__).with_name("ddp_process.py"), 2, tmp_path, parts)
    two = [torch.load(tmp_path / f"weights_{rank}.pt", weights_only=True) for rank in (0, 1)]
    for name, value in one.items():
        assert torch.equal(two[0][name], two[1][name]), name
        torch.testing.assert_close(two[0][name], value, rtol=0, atol=1e-10)
        if name != "discriminator.layers.4.bias":  # it cancels in a relativistic loss
            assert (value - before[name]).abs().max() > 1e-3, f"{name} did not learn, so equality says nothing"


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_the_parts_of_a_batch_make_the_update_of_the_whole(tmp_path, parts):
    whole = ddp_process.train(1, tmp_path).state_dict()
    accumulated = ddp_process.train(1, tmp_path, parts).state_dict()
    for name, value in whole.items():
        torch.testing.assert_close(accumulated[name], value, rtol=0, atol=1e-10)


class Careless(tiny.GAN):
    """Steps in Lightning's way, which averages nothing."""

    def training_step(self, batch, batch_idx) -> None:
        optimizer = self.optimizers()[0]
        self.manual_backward(self.generator(self._latent(batch["image"])).mean())
        optimizer.step()


def test_a_step_whose_gradients_were_not_averaged_is_refused_under_ddp(tmp_path):
    module = tiny.gan()
    module.__class__ = Careless
    options = {"strategy": DDPStrategy(process_group_backend="gloo"), "max_steps": 1}
    message = r"Careless: gradients were not averaged .* self.step_counted\(optimizer\)"
    with mock.patch.dict(os.environ):  # Lightning would leave its LOCAL_RANK to the processes of the next tests
        try:
            with pytest.raises(RuntimeError, match=message):
                tiny.train(tmp_path, module, tiny.ring(), **options)
        finally:
            torch.distributed.destroy_process_group()  # or the next test of this process would find it
