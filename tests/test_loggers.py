"""What a run leaves in CSV, TensorBoard and W&B, read back from the files; W&B offline, in a process of its own."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_generative.training.checkpoint_io import load_checkpoint
from tests.wandb_file import WandbFile

pytestmark = pytest.mark.slow  # imports everything anew and starts W&B's own process

CONFIG = """
trainer:
  accelerator: cpu
  devices: 1
  max_steps: 6
  log_every_n_steps: 2
  val_check_interval: 3
  check_val_every_n_epoch: null
  num_sanity_val_steps: 0
  enable_progress_bar: false
  enable_model_summary: false
  logger:
    - class_path: lit_generative.training.csv_logger.CSVLogger
      init_args: {save_dir: runs, name: vae}
    - class_path: lightning.pytorch.loggers.TensorBoardLogger
      init_args: {save_dir: runs, name: vae}
    - class_path: lightning.pytorch.loggers.WandbLogger
      init_args: {save_dir: runs, project: tests, log_model: true}
  callbacks:
    - class_path: lit_generative.callbacks.sample_grid.SampleGrid
      init_args: {every_n_steps: 3, num_samples: 4}
    - class_path: lit_generative.callbacks.checkpoint.Checkpoint
      init_args: {every_n_steps: 4}
    - class_path: lit_generative.callbacks.throughput.Throughput
    - class_path: lightning.pytorch.callbacks.LearningRateMonitor
    - class_path: recorder.Recorder
model:
  class_path: lit_generative.vae.module.VAE
  init_args:
    encoder:
      class_path: lit_generative.networks.mlp.MLPEncoder
      init_args: {sample_shape: [1, 8, 8], latent_dim: 3, hidden_dim: 6, num_layers: 1}
    decoder:
      class_path: lit_generative.networks.mlp.MLPDecoder
      init_args: {sample_shape: [1, 8, 8], latent_dim: 3, hidden_dim: 6, num_layers: 1}
    likelihood:
      class_path: lit_generative.vae.likelihoods.Bernoulli
    objective:
      class_path: lit_generative.vae.objectives.Elbo
    optimizer:
      class_path: torch.optim.SGD
      init_args: {lr: 1.0e-3}
    scheduler:
      class_path: lit_generative.training.lr_schedules.WarmupPlateau
      init_args: {monitor: val/loss, warmup_steps: 3, patience: 9}
data:
  class_path: lit_generative.data.digits.Digits
  init_args: {batch_size: 256}
"""
RECORDER = """
import lightning as L
from lit_generative.callbacks.media import log_record

class Recorder(L.Callback):
    def on_validation_epoch_end(self, trainer, pl_module):
        record = {"value": trainer.global_step / 2, "settings": {"seed": 0, "names": ["a", "b"]}}
        log_record(trainer, "val/record", record, trainer.global_step)
"""
SCRIPT = """
import wandb
from lit_generative.__main__ import main

for options in ([], ["--ckpt_path", "last", "--trainer.max_steps", "8"]):
    code = main(["fit", "--config", "vae.yaml", *options])
    wandb.finish()
    if code:
        raise SystemExit(code)
"""
RATES = {step: 1e-3 * min(1, (step + 1) / 4) for step in range(8)}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> SimpleNamespace:
    """A run of six updates, resumed for two more."""
    folder = tmp_path_factory.mktemp("run")
    for name, text in {"vae.yaml": CONFIG, "recorder.py": RECORDER, "script.py": SCRIPT}.items():
        (folder / name).write_text(text)
    env = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "PL_"))}
    private = {f"WANDB_{kind}_DIR": str(folder / "wandb") for kind in ("DATA", "CACHE", "CONFIG")}
    paths = os.pathsep.join([str(folder), str(Path(__file__).parents[1])])
    env |= private | {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "PYTHONPATH": paths}
    command = [sys.executable, "script.py"]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    files = [WandbFile(path) for path in folder.glob("runs/wandb/offline-run-*/*.wandb")]
    first, second = sorted(files, key=lambda file: file.rows[0]["trainer/global_step"])
    return SimpleNamespace(folder=folder / "runs/vae/version_0", first=first, second=second)


def _logged(rows, key: str, step: str = "trainer/global_step") -> dict[int, float]:
    """The values of a key by step."""
    return {int(row[step]): float(row[key]) for row in rows if row.get(key) not in (None, "")}


def _metrics(run) -> list[dict[str, str]]:
    return list(csv.DictReader((run.folder / "metrics.csv").open()))


def _pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


# CSV


def test_csv_has_each_scalar_at_its_step(run):
    rows = _metrics(run)
    assert list(_logged(rows, "train/loss", "step")) == [1, 3, 5, 7]
    assert list(_logged(rows, "train/images_per_second", "step")) == [1, 3, 5, 7]
    assert _logged(rows, "train/effective_batch", "step") == {1: 256, 3: 256, 5: 256, 7: 256}
    assert {2, 5} <= set(_logged(rows, "val/loss", "step"))
    rates = _logged(rows, "lr-vae/vae", "step")
    assert rates == pytest.approx({step: RATES[step] for step in rates})
    assert {1, 3, 5, 7} <= set(rates)


def test_records_are_beside_the_csv_file(run):
    lines = [json.loads(line) for line in (run.folder / "records.jsonl").read_text().splitlines()]
    assert {line["step"]: line["record"]["value"] for line in lines} == {2: 1.5, 5: 3.0}
    assert lines[0]["key"] == "val/record"
    assert lines[0]["record"]["settings"] == {"seed": 0, "names": ["a", "b"]}


# TensorBoard


@pytest.fixture(scope="module")
def events(run) -> EventAccumulator:
    events = EventAccumulator(str(run.folder))
    events.Reload()
    return events


def test_tensorboard_has_the_scalars_of_the_csv_file(run, events):
    for key in ("train/loss", "val/loss", "train/effective_batch", "lr-vae/vae"):
        shown = {event.step: event.value for event in events.Scalars(key)}
        assert shown == pytest.approx(_logged(_metrics(run), key, "step"))


def test_tensorboard_has_the_grids_and_records(events):
    assert [image.step for image in events.Images("samples")] == [2, 5, 7]
    texts = events.Tensors("val/record/text_summary")
    records = {event.step: json.loads(event.tensor_proto.string_val[0]) for event in texts}
    assert {step: record["value"] for step, record in records.items()} == {2: 1.5, 5: 3.0}


# W&B


@pytest.mark.parametrize("key", ["train/loss", "val/loss", "train/effective_batch", "lr-vae/vae"])
def test_wandb_has_the_scalars_of_the_csv_file(run, key):
    shown = _logged(run.first.rows, key) | _logged(run.second.rows, key)
    assert shown == pytest.approx(_logged(_metrics(run), key, "step"))


def test_wandb_draws_everything_over_our_step(run):
    metrics = [record.metric for record in run.first.records if record.WhichOneof("record_type") == "metric"]
    assert ("*", "trainer/global_step") in [(metric.glob_name, metric.step_metric) for metric in metrics]
    for file in (run.first, run.second):
        assert all("trainer/global_step" in row for row in file.rows)


def test_wandb_has_the_grids_that_are_on_disk(run):
    shown = {}
    for file in (run.first, run.second):
        for row in [row for row in file.rows if "samples._type" in row]:
            assert (row["samples._type"], row["samples.count"]) == ("images/separated", 1)
            (picture,) = row["samples.filenames"]
            shown[row["trainer/global_step"] + 1] = _pixels(file.path.parent / "files" / picture)
    assert list(shown) == [3, 6, 8]
    for step, picture in shown.items():
        assert np.ptp(picture) > 0
        np.testing.assert_array_equal(picture, _pixels(run.folder / f"samples/step_{step:07d}.png"))


def test_wandb_has_the_records_in_their_steps_and_the_last_in_the_summary(run):
    assert _logged(run.first.rows, "val/record.value") == {2: 1.5, 5: 3.0}
    names = [row["val/record.settings.names"] for row in run.first.rows if "val/record.value" in row]
    assert names == [["a", "b"]] * 2
    assert run.first.summary["val/record.value"] == 3.0


def test_wandb_has_the_modules_hyperparameters_and_the_whole_config(run):
    config = run.second.config
    assert config["optimizer"]["init_args"]["lr"] == 1e-3
    assert config["cli"] == yaml.safe_load(load_checkpoint(run.folder / "checkpoints/last.ckpt")["config"])
    assert config["cli"]["data"]["init_args"]["batch_size"] == 256
    assert config["cli"]["trainer"]["max_steps"] == 8


def test_wandb_gets_the_last_checkpoint_of_each_part_as_an_artifact(run):
    ((first,), (second,)) = run.first.artifacts, run.second.artifacts
    assert first.name == second.name == f"model-{run.first.run_id}"
    assert (second.type, list(second.aliases)) == ("model", ["latest"])
    (content,) = second.manifest.contents
    checkpoint = (run.folder / "checkpoints/last.ckpt").read_bytes()
    assert content.digest == base64.b64encode(hashlib.md5(checkpoint).digest()).decode()
    assert first.manifest.contents[0].digest != content.digest


def test_a_resumed_run_is_the_same_run_on_wandb(run):
    assert run.first.path.parent != run.second.path.parent
    assert run.first.run_id == run.second.run_id
    assert load_checkpoint(run.folder / "checkpoints/last.ckpt")["wandb_run_id"] == run.first.run_id
    assert (run.first.exit_code, run.second.exit_code) == (0, 0)


def test_what_a_kill_cut_off_is_left_out_when_reading(run, tmp_path):
    cut = tmp_path / "cut.wandb"
    cut.write_bytes(run.first.path.read_bytes()[:-100])
    rows = WandbFile(cut).rows
    assert rows == run.first.rows[: len(rows)]
    assert WandbFile(cut).exit_code is None
