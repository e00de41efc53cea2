"""Averages on two processes (gloo, CPU): of replicated weights (DDP) and of sharded ones (FSDP2)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lit_generative.callbacks.posthoc_ema import FOLDER
from lit_generative.metrics.evaluation import collect_features
from lit_generative.metrics.frechet import Frechet
from lit_generative.metrics.kernel import Kernel
from lit_generative.metrics.measures import compute_scores
from lit_generative.metrics.sources import DataModuleImages, ModelSamples
from lit_generative.training.averages import ema_state
from lit_generative.training.checkpoint_io import load_checkpoint
from tests import processes, tiny
from tests.callbacks import ema_process
from tests.metrics.tiny_features import TinyFeatures
from tests.test_resume import assert_same

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("kind", "buffers"), [("ddp", "copy"), ("ddp", "average"), ("fsdp2", "copy")])
def test_two_processes_evaluate_save_and_resume_one_average(tmp_path, kind, buffers):
    script = Path(__file__).with_name("ema_process.py")
    processes.run(script, kind, tmp_path, buffers, env={"LITGEN_CACHE": str(tmp_path / "cache")})
    whole, stopped = (load_checkpoint(tmp_path / name / "last.ckpt") for name in ("whole", "stopped"))
    for checkpoint in (whole, stopped):  # plain data: whole tensors, wherever they came from
        assert checkpoint["callbacks"]["EMA"]["images"] == 6 * 6
    tiny.assert_same(stopped["state_dict"], whole["state_dict"])
    for name in ("EMA", "PostHocEMA"):
        assert_same(stopped["callbacks"][name], whole["callbacks"][name], name)
    seen = [torch.load(tmp_path / f"seen_{rank}.pt", weights_only=True) for rank in (0, 1)]
    tiny.assert_same(seen[1], seen[0])
    slow = ema_state(whole, "slow")
    tiny.assert_same(seen[0], dict(whole["state_dict"]) | slow)
    name = "decoder.layers.0.weight" if kind == "fsdp2" else "decoder.0.weight"
    assert not torch.equal(slow[name], ema_state(whole, "fast")[name])
    assert ("encoder.1.running_mean" in slow) == (buffers == "average")
    assert len(list((tmp_path / "whole" / FOLDER).iterdir())) == 6
    assert len(list((tmp_path / "whole" / "samples").iterdir())) == 3
    assert_scores_are_those_of_one_process(whole, ema_process.normed() if kind == "ddp" else {})


def assert_scores_are_those_of_one_process(checkpoint, networks) -> None:
    module = tiny.vae(**networks)
    module.load_state_dict(dict(checkpoint["state_dict"]) | ema_state(checkpoint, "slow"))
    data, measures, extractor = tiny.digits(), [Frechet(), Kernel()], TinyFeatures()
    data.setup()
    sets = [
        collect_features(source, extractor, measures, batch_size=4)
        for source in (DataModuleImages(data, "train"), ModelSamples(module, 10))
    ]
    expected = {f"val/{'fd_tiny' if k == 'fid' else k}": v for k, v in compute_scores(measures, *sets).items()}
    assert checkpoint["callbacks"]["FIDEvaluation"]["scores"] == pytest.approx(expected, rel=1e-6)
