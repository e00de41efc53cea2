"""One honest count: generator updates, for everything that counts steps."""

from __future__ import annotations

import csv

import pytest
import torch
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint

from lit_generative.callbacks.checkpoint import Checkpoint
from lit_generative.callbacks.ema import EMA
from lit_generative.callbacks.sample_grid import SampleGrid
from lit_generative.training.csv_logger import CSVLogger
from tests.families import build, digits, trainer


class Updates(Callback):
    """Counts what happens, apart from Lightning's own counters."""

    def __init__(self) -> None:
        self.steps = {"generator": 0, "discriminator": 0}
        self.validated_at: list[int] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.steps[optimizer.param_groups[0]["name"]] += 1

    def on_validation_start(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.validated_at.append(self.steps["generator"])


@pytest.mark.parametrize("discriminator_steps", [1, 3])
def test_max_steps_counts_generator_updates(tmp_path, discriminator_steps):
    updates = Updates()
    t = trainer(tmp_path, callbacks=[updates], max_steps=7, enable_checkpointing=False)
    t.fit(build("gan", discriminator_steps=discriminator_steps), digits())
    assert updates.steps == {"generator": 7, "discriminator": 7 * discriminator_steps}
    assert t.global_step == 7


def test_val_check_interval_counts_generator_updates(tmp_path):
    updates = Updates()
    run = {"val_check_interval": 3, "check_val_every_n_epoch": None, "max_steps": 8, "enable_checkpointing": False}
    trainer(tmp_path, callbacks=[updates], **run).fit(build("gan", discriminator_steps=2), digits())
    assert updates.validated_at == [3, 6]


def test_both_checkpoint_callbacks_save_at_generator_updates(tmp_path):
    lightnings = ModelCheckpoint(tmp_path / "lightning", "{step}", every_n_train_steps=3, save_top_k=-1)
    ours = Checkpoint(every_n_steps=3, keep_all=True, dirpath=str(tmp_path / "ours"))
    trainer(tmp_path, callbacks=[lightnings, ours], max_steps=7).fit(build("gan", discriminator_steps=2), digits())
    assert sorted(p.name for p in (tmp_path / "lightning").iterdir()) == ["step=3.ckpt", "step=6.ckpt"]
    assert sorted(p.name for p in (tmp_path / "ours").iterdir()) == [
        "last.ckpt",
        "step_0000003.ckpt",
        "step_0000006.ckpt",
        "step_0000007.ckpt",
    ]
    assert torch.load(tmp_path / "ours" / "step_0000006.ckpt", weights_only=True)["global_step"] == 6


def test_learning_rate_schedules_count_generator_updates(tmp_path):
    module = build("gan", discriminator_steps=2)
    trainer(tmp_path, callbacks=[], max_steps=7, enable_checkpointing=False).fit(module, digits())
    assert [s.last_epoch for s in module.lr_schedulers()] == [7, 7]


def test_ema_counts_the_images_of_generator_updates(tmp_path):
    ema = EMA(half_life=100)
    trainer(tmp_path, callbacks=[ema], max_steps=7, enable_checkpointing=False).fit(
        build("gan", discriminator_steps=2), digits()
    )
    assert ema.images == 7 * 256


@pytest.mark.parametrize("family", ["gan", "vae", "ddpm"])
def test_the_loggers_x_axis_is_the_update_a_row_belongs_to(tmp_path, family):
    logger = CSVLogger(str(tmp_path), name=None, version="run")
    callbacks = [LearningRateMonitor("step"), SampleGrid(every_n_steps=4, num_samples=2)]
    run = {"log_every_n_steps": 4, "val_check_interval": 4, "check_val_every_n_epoch": None, "max_steps": 12}
    settings = {"discriminator_steps": 2} if family == "gan" else {}
    trainer(tmp_path, logger=logger, callbacks=callbacks, enable_checkpointing=False, **run).fit(
        build(family, **settings), digits()
    )
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))
    loss = "train/generator_loss" if family == "gan" else "train/loss"
    trained = [int(row["step"]) for row in rows if row[loss]]
    validated = [int(row["step"]) for row in rows if row[loss.replace("train", "val")]]
    pictures = sorted(int(p.stem.removeprefix("step_")) for p in (tmp_path / "run" / "samples").iterdir())
    # Lightning numbers rows from 0: row 3 is the fourth update's.
    assert trained == validated == [3, 7, 11]
    assert pictures == [4, 8, 12]
