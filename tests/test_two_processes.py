"""Two processes (gloo, CPU) train, save, predict and stop as one does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lit_generative.training.checkpoint_io import load_checkpoint
from tests import processes

pytestmark = pytest.mark.slow
CONFIGS = Path(__file__).parents[1] / "configs"
CPU = [
    "--trainer.accelerator=cpu",
    "--trainer.devices=2",
    "--trainer.strategy=ddp",
    "--trainer.enable_model_summary=false",
]


def command(name: str, config: str, *options: str) -> list[str]:
    return ["-m", "lit_generative", name, "--config", str(CONFIGS / config), *CPU, *options]


@pytest.mark.parametrize("config", ["gan/dcgan_digits.yaml", "vae/vae_digits.yaml", "diffusion/ddpm_digits.yaml"])
def test_a_family_trains_on_two_processes(tmp_path, config):
    options = ("--trainer.max_steps=6", "--trainer.val_check_interval=5")
    processes.run(*command("fit", config, *options), cwd=tmp_path)
    checkpoint = load_checkpoint(next(tmp_path.rglob("last.ckpt")))
    assert checkpoint["global_step"] == 6
    assert checkpoint["callbacks"]["EMA"]["images"] == 6 * 64 * 2
    assert all(torch.isfinite(value).all() for value in checkpoint["state_dict"].values())
    assert len(list(tmp_path.rglob("samples/*.png"))) == 1


def test_two_processes_share_the_samples_of_predict(tmp_path):
    config = "vae/vae_digits.yaml"
    fit = command("fit", config, "--trainer.max_steps=1", "--trainer.val_check_interval=1")
    predict = command("predict", config, "--ckpt_path=last", "--data.num_predict_samples=7", "--data.eval_batch_size=2")
    for run in (fit, predict):
        processes.run(*run, cwd=tmp_path)
    names = sorted(path.name for path in tmp_path.rglob("predictions/*.png"))
    assert names == [f"{index:06d}.png" for index in range(7)]


EVALUATION = """
trainer:
  callbacks:
    - class_path: lit_generative.callbacks.ema.EMA
    - class_path: lit_generative.callbacks.fid_evaluation.FIDEvaluation
      init_args:
        extractor: {class_path: lit_generative.metrics.small_nets.DigitsFeatures}
        num_samples: 101
        batch_size: 16
"""


def test_one_and_two_processes_give_the_same_scores(tmp_path, monkeypatch):
    monkeypatch.setenv("LITGEN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "evaluation.yaml").write_text(EVALUATION)
    config, more = "vae/vae_digits.yaml", ("--config", "evaluation.yaml")
    fit = command("fit", config, *more, "--trainer.max_steps=3", "--trainer.val_check_interval=3")
    validate = command("validate", config, *more, "--ckpt_path=last")
    processes.run(*fit, cwd=tmp_path)
    processes.run(*validate, "--trainer.devices=1", cwd=tmp_path, ranks=1)
    processes.run(*validate, cwd=tmp_path)
    lines = next(tmp_path.rglob("validate/records.jsonl")).read_text().splitlines()
    one, two = (json.loads(line)["record"] for line in lines)
    assert one["metrics"] == pytest.approx(two["metrics"], rel=1e-6)
    assert one["record"]["subject"]["step"] == 3
    trained = json.loads(next(tmp_path.rglob("version_0/records.jsonl")).read_text())["record"]["metrics"]
    assert trained == pytest.approx(one["metrics"], rel=1e-6)


def test_a_signal_to_one_process_stops_both_after_the_same_batch(tmp_path):
    process = subprocess.Popen(
        [sys.executable, *command("fit", "vae/vae_digits.yaml", "--trainer.max_steps=100000")],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 100
    while not list(tmp_path.rglob("metrics.csv")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert load_checkpoint(next(tmp_path.rglob("last.ckpt")))["global_step"] > 0


NOTEBOOK = """
import torch
from lightning import Trainer
from lit_generative.callbacks.checkpoint import Checkpoint
from lit_generative.training.checkpoint_io import SafeCheckpointIO, load_checkpoint
import families

torch.set_num_threads(1)
module = families.build("gan")
trainer = Trainer(
    accelerator="cpu", devices=2, strategy="ddp_notebook", max_steps=3, logger=False, plugins=[SafeCheckpointIO()],
    callbacks=[Checkpoint(3, dirpath=".")], enable_progress_bar=False, enable_model_summary=False,
)
trainer.fit(module, families.digits())
saved = load_checkpoint("last.ckpt")
assert saved["global_step"] == 3
for name, value in module.state_dict().items():
    torch.testing.assert_close(value, saved["state_dict"][name], rtol=0, atol=0)
    assert not name.endswith("weight") or not torch.equal(value, families.build("gan").state_dict()[name])
"""


def test_what_processes_of_a_notebook_train_is_there_afterwards(tmp_path):
    (tmp_path / "notebook.py").write_text(NOTEBOOK)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}  # it forks: from a process of its own
    subprocess.run([sys.executable, "notebook.py"], cwd=tmp_path, env=environment, check=True, timeout=120)
