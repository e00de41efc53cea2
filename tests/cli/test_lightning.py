"""``litgen fit|validate|test|predict``, run as a user runs them, in one process."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import Namespace

from lit_generative.__main__ import main
from lit_generative.cli.lightning import _continue_wandb
from lit_generative.training.checkpoint_io import load_checkpoint

CONFIG = """
trainer:
  accelerator: cpu
  devices: 1
  max_steps: 6
  log_every_n_steps: 2
  val_check_interval: 3
  check_val_every_n_epoch: null
  enable_progress_bar: false
  enable_model_summary: false
  logger:
    - class_path: lit_generative.training.csv_logger.CSVLogger
      init_args: {save_dir: runs, name: vae}
    - class_path: lightning.pytorch.loggers.TensorBoardLogger
      init_args: {save_dir: runs, name: vae}
  callbacks:
    - class_path: lit_generative.callbacks.ema.EMA
    - class_path: lit_generative.callbacks.checkpoint.Checkpoint
      init_args: {every_n_steps: 4}
model:
  class_path: lit_generative.vae.module.VAE
  init_args:
    encoder:
      class_path: lit_generative.networks.conv_vae.ConvEncoder
      init_args: {image_size: 8, channels: 1, latent_dim: 3, width: 8}
    decoder:
      class_path: lit_generative.networks.conv_vae.ConvDecoder
      init_args: {image_size: 8, channels: 1, latent_dim: 3, width: 8}
    likelihood:
      class_path: lit_generative.vae.likelihoods.Gaussian
    objective:
      class_path: lit_generative.vae.objectives.Elbo
    optimizer:
      class_path: torch.optim.Adam
      init_args: {lr: 1.0e-3}
data:
  class_path: lit_generative.data.digits.Digits
  init_args: {batch_size: 256, num_predict_samples: 3}
"""
RUN = Path("runs/vae/version_0")
LAST = RUN / "checkpoints/last.ckpt"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("vae.yaml").write_text(CONFIG)
    return tmp_path


def litgen(command: str, *options: str) -> int:
    return main([command, "--config", "vae.yaml", *options])


def rows() -> list[dict[str, str]]:
    return list(csv.DictReader((RUN / "metrics.csv").open()))


def test_fit_leaves_checkpoint_config_metrics_and_events_in_one_folder():
    assert litgen("fit") == 0
    assert {p.name.partition(".")[0] for p in RUN.iterdir()} == {
        "checkpoints",
        "config",
        "metrics",
        "hparams",
        "events",
    }
    assert [row["step"] for row in rows() if row["train/loss"]] == ["1", "3", "5"]
    assert [p.name for p in RUN.parent.iterdir()] == ["version_0"]


def test_the_used_config_is_beside_the_run_and_in_the_checkpoint_and_runs_again():
    assert litgen("fit", "--model.objective.init_args.beta", "2") == 0
    beside = yaml.safe_load((RUN / "config.yaml").read_text())
    inside = yaml.safe_load(load_checkpoint(LAST)["config"])
    assert beside["model"] == inside["model"]
    assert beside["data"] == inside["data"]
    assert inside["model"]["init_args"]["objective"]["init_args"]["beta"] == 2.0
    Path("again.yaml").write_text(load_checkpoint(LAST)["config"])
    assert main(["fit", "--config", "again.yaml", "--trainer.max_steps", "1"]) == 0


def test_files_are_laid_over_each_other_and_options_over_both():
    Path("over.yaml").write_text("model: {init_args: {likelihood: {init_args: {sigma: 0.5}}}}\ntrainer: {max_steps: 1}")
    options = ("--config", "over.yaml", "--model.init_args.decoder.init_args.width", "16")
    assert litgen("fit", *options) == 0
    model = yaml.safe_load((RUN / "config.yaml").read_text())["model"]["init_args"]
    assert model["likelihood"]["init_args"] == {"sigma": 0.5}
    assert model["decoder"]["init_args"]["width"] == 16
    assert model["encoder"]["init_args"]["width"] == 8
    assert load_checkpoint(LAST)["global_step"] == 1


def test_print_config_prints_a_config_that_can_be_given_back(capsys):
    with pytest.raises(SystemExit) as ended:
        litgen("fit", "--print_config")
    assert ended.value.code == 0
    Path("printed.yaml").write_text(capsys.readouterr().out)
    assert main(["fit", "--config", "printed.yaml", "--trainer.max_steps", "1"]) == 0


def test_resuming_goes_on_in_the_runs_folder_and_keeps_its_rows():
    assert litgen("fit") == 0
    before = rows()
    assert litgen("fit", "--ckpt_path", "last", "--trainer.max_steps", "10") == 0
    assert [p.name for p in RUN.parent.iterdir()] == ["version_0"]
    assert [{k: row.get(k) for k in before[0]} for row in rows()[: len(before)]] == before
    assert [row["step"] for row in rows() if row["train/loss"]] == ["1", "3", "5", "7", "9"]
    assert load_checkpoint(LAST)["global_step"] == 10


def test_last_without_a_checkpoint_starts_from_the_beginning():
    assert litgen("fit", "--ckpt_path", "last") == 0
    assert load_checkpoint(LAST)["global_step"] == 6


def test_a_finished_run_is_left_as_it_is():
    assert litgen("fit") == 0
    before = rows(), load_checkpoint(LAST)["state_dict"]
    assert litgen("fit", "--ckpt_path", "last") == 0
    torch.testing.assert_close(load_checkpoint(LAST)["state_dict"], before[1], rtol=0, atol=0)
    assert rows() == before[0]


def test_a_second_run_gets_a_folder_of_its_own():
    assert litgen("fit") == litgen("fit", "--trainer.max_steps", "1") == 0
    assert sorted(p.name for p in RUN.parent.iterdir()) == ["version_0", "version_1"]
    assert load_checkpoint(LAST)["global_step"] == 6


def test_when_fitting_the_config_wins_over_the_checkpoint():
    assert litgen("fit") == 0
    options = ("--model.optimizer.init_args.lr", "5.0e-4", "--model.objective.beta", "3", "--trainer.max_steps", "8")
    assert litgen("fit", "--ckpt_path", str(LAST), *options) == 0
    resumed = load_checkpoint("runs/vae/version_1/checkpoints/last.ckpt")
    assert resumed["optimizer_states"][0]["param_groups"][0]["lr"] == 5e-4
    assert resumed["hyper_parameters"]["objective"]["init_args"]["beta"] == 3.0


def test_a_width_that_does_not_fit_the_checkpoint_is_one_readable_error(capsys):
    assert litgen("fit") == 0
    assert litgen("fit", "--ckpt_path", "last", "--model.decoder.init_args.width", "16") == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "width=8" in error
    assert "width=16" in error


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_evaluating_without_a_checkpoint_is_an_error(capsys, command):
    assert litgen(command) == 1
    assert "needs a checkpoint" in capsys.readouterr().err
    assert litgen(command, "--ckpt_path", "last") == 1
    assert "Train it first" in capsys.readouterr().err


@pytest.mark.parametrize(("command", "stage"), [("validate", "val"), ("test", "test")])
def test_evaluation_scores_the_checkpoints_model_in_a_folder_of_the_run(command, stage):
    assert litgen("fit") == 0
    # The checkpoint's width is taken, whatever the config says.
    assert litgen(command, "--ckpt_path", "last", "--model.decoder.init_args.width", "16") == 0
    (row,) = csv.DictReader((RUN / command / "metrics.csv").open())
    assert float(row[f"{stage}/elbo"]) < 0
    assert len(rows()) == 5  # three of training, two of validation: the run's own are untouched


def test_predict_writes_as_many_samples_as_asked():
    assert litgen("fit") == 0
    assert litgen("predict", "--ckpt_path", "last", "--data.num_predict_samples", "5") == 0
    assert len(list((RUN / "predict/predictions").glob("*.png"))) == 5


def test_a_checkpoint_of_another_class_is_one_readable_error(capsys):
    assert litgen("fit") == 0
    checkpoint = load_checkpoint(LAST)
    checkpoint["hyper_parameters"]["_class_path"] = "lit_generative.gan.module.GAN"
    torch.save(checkpoint, "gan.ckpt")
    assert litgen("fit", "--ckpt_path", "gan.ckpt") == 1
    assert "holds a GAN, but the model is a VAE" in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("hidden", [{"class_path": "strange.Loss"}, "strange.Loss", '{"class_path": "strange.Loss"}'])
def test_evaluating_builds_no_class_of_a_package_that_only_the_checkpoint_names(capsys, monkeypatch, hidden):
    Path("strange.py").write_text("from pathlib import Path; Path('imported').touch()")
    monkeypatch.syspath_prepend(".")
    assert litgen("fit", "--trainer.max_steps", "1") == 0
    checkpoint = load_checkpoint(LAST)
    checkpoint["hyper_parameters"]["objective"] = hidden
    torch.save(checkpoint, LAST)
    assert litgen("test", "--ckpt_path", "last") == 1
    assert "could run code" in capsys.readouterr().err
    assert not Path("imported").exists()


def test_a_missing_checkpoint_names_those_nearby(capsys):
    assert litgen("fit") == 0
    assert litgen("fit", "--ckpt_path", str(LAST.with_name("lost.ckpt"))) == 1
    assert "last.ckpt" in capsys.readouterr().err


def test_without_a_checkpoint_callback_ours_is_added(monkeypatch):
    config = yaml.safe_load(CONFIG)
    del config["trainer"]["callbacks"], config["trainer"]["logger"]
    Path("vae.yaml").write_text(yaml.safe_dump(config))
    assert litgen("fit", "--trainer.logger", "false") == 0
    assert load_checkpoint("checkpoints/last.ckpt")["global_step"] == 6


def test_a_constructors_error_is_one_line(capsys):
    assert litgen("fit", "--model.encoder.init_args.image_size", "9") == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("litgen: error: ConvEncoder: image_size")


def test_a_failure_that_stops_training_is_one_line(capsys):
    health = '[{"class_path": "lit_generative.callbacks.training_health.TrainingHealth", "init_args": {"stop": true, '
    options = ["--model.optimizer.init_args.lr=1e30", "--trainer.log_every_n_steps=1"]
    assert litgen("fit", *options, f'--trainer.callbacks={health}"every_n_steps": null}}}}]') == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert error.strip().splitlines()[-1].startswith("litgen: error: TrainingHealth: at update ")


def test_data_that_does_not_fit_the_network_is_found_before_training(capsys):
    assert litgen("fit", "--data.image_size", "16") == 1
    assert "takes examples of shape (1, 8, 8), but Digits yields (1, 16, 16)" in capsys.readouterr().err
    assert litgen("fit", "--data.batch_size", "5000") == 1
    assert "batch_size" in capsys.readouterr().err
    assert not list(Path("runs").rglob("*.ckpt"))


def test_a_plateau_with_a_warmup_is_built_from_options_and_steps_at_validation():
    options = {"monitor": "val/loss", "warmup_steps": 1, "patience": 0, "factor": 0.5, "threshold": 1e9, "min_lr": 1e-6}
    scheduler = {"class_path": "lit_generative.training.lr_schedules.WarmupPlateau", "init_args": options}
    Path("over.yaml").write_text(yaml.safe_dump({"model": {"init_args": {"scheduler": scheduler}}}))
    over = ("--config", "over.yaml", "--model.scheduler.cooldown", "0", "--model.scheduler.mode", "max")
    assert litgen("fit", *over) == 0
    checkpoint = load_checkpoint(LAST)  # written before the second validation, which lowers the rate
    assert checkpoint["optimizer_states"][0]["param_groups"][0]["lr"] == 1e-3
    assert litgen("fit", "--ckpt_path", "last", *over, "--trainer.max_steps", "7") == 0
    assert load_checkpoint(LAST)["optimizer_states"][0]["param_groups"][0]["lr"] == 5e-4


WANDB = "lightning.pytorch.loggers.WandbLogger"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"id": None, "version": None}, "abc"),
        ({"id": "mine", "version": None}, "mine"),
        ({"id": None, "version": "v"}, None),
    ],
)
def test_a_resumed_run_keeps_its_wandb_id_unless_the_config_names_one(arguments, expected):
    logger = Namespace(class_path=WANDB, init_args=Namespace(**arguments))
    other = Namespace(class_path="x.Other", init_args=Namespace(save_dir="runs", version=None))
    _continue_wandb(Namespace(logger=[other, logger, True]), "abc")
    assert logger.init_args.id == expected
    assert "id" not in other.init_args


@pytest.mark.parametrize("logger", [None, True, False])
def test_without_a_wandb_logger_there_is_no_id_to_keep(logger):
    _continue_wandb(Namespace(logger=logger), "abc")
    assert litgen("fit", "--trainer.max_steps", "1") == 0
    assert load_checkpoint(LAST)["wandb_run_id"] is None
