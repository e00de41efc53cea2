"""Schedules are stepped when :class:`Every` says, in both optimization modes, counted by hand."""

from __future__ import annotations

import functools
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.cli import ReduceLROnPlateau
from torch.optim.lr_scheduler import ExponentialLR, StepLR

from lit_generative.__main__ import main
from lit_generative.callbacks.checkpoint import Checkpoint
from lit_generative.training.lr_schedules import WarmupPlateau, monitored
from lit_generative.training.schedule_timing import Every, Timing, timed, timing_of
from tests import tiny

HALVING = functools.partial(ExponentialLR, gamma=0.5)
MODES = {
    "manual": (lambda schedule: tiny.gan(generator_scheduler=schedule), tiny.ring),
    "automatic": (lambda schedule: tiny.vae(scheduler=schedule), tiny.digits),
}
modes = pytest.mark.parametrize(("build", "data"), MODES.values(), ids=MODES.keys())


class Halvings(L.Callback):
    """Notes how often the first optimizer's rate was halved before each update."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        if optimizer is trainer.optimizers[0]:
            self.counts.append(round(-torch.tensor(optimizer.param_groups[0]["lr"] / 1e-3).log2().item()))


def halvings(tmp_path, build, data, every, **options) -> list[int]:
    noted = Halvings()
    tiny.train(tmp_path, build(every), data(), callbacks=[noted], limit_train_batches=3, **{"max_steps": 8} | options)
    return noted.counts


@modes
@pytest.mark.parametrize(
    ("timing", "expected"),
    [
        ({}, [0, 1, 2, 3, 4, 5, 6, 7]),
        ({"frequency": 3}, [0, 0, 0, 1, 1, 1, 2, 2]),
        ({"frequency": 2}, [0, 0, 1, 1, 2, 2, 3, 3]),
        ({"interval": "epoch"}, [0, 0, 0, 1, 1, 1, 2, 2]),
        ({"interval": "epoch", "frequency": 2}, [0, 0, 0, 0, 0, 0, 1, 1]),
    ],
)
def test_a_schedule_is_stepped_every_frequency_updates_or_epochs(tmp_path, build, data, timing, expected):
    assert halvings(tmp_path, build, data, functools.partial(Every, schedule=HALVING, **timing)) == expected


def test_each_optimizer_has_a_timing_of_its_own(tmp_path):
    module = tiny.gan(
        generator_scheduler=functools.partial(Every, schedule=HALVING, frequency=2),
        discriminator_scheduler=functools.partial(Every, schedule=HALVING, interval="epoch"),
        discriminator_steps=2,
    )
    run = tiny.train(tmp_path, module, tiny.ring(), limit_train_batches=4, max_steps=6)
    rates = [optimizer.param_groups[0]["lr"] for optimizer in run.optimizers]
    assert rates == pytest.approx([1e-3 / 8, 1e-3 / 2])


@modes
def test_a_plateau_sees_every_second_validation_and_the_monitor_that_is_named(tmp_path, build, data):
    class Score(L.Callback):
        def __init__(self) -> None:
            self.scores = [9.0, 1.0, 99.0, 2.0, 99.0, 0.5, 99.0, 3.0]

        def on_validation_epoch_end(self, trainer, pl_module) -> None:
            if not trainer.sanity_checking:
                pl_module.log("val/fid", self.scores.pop(0))

    plateau = functools.partial(torch.optim.lr_scheduler.ReduceLROnPlateau, factor=0.5, patience=0)
    every = functools.partial(Every, schedule=plateau, frequency=2, monitor="val/fid")
    noted = Halvings()
    options = {"limit_val_batches": 1, "val_check_interval": 1, "check_val_every_n_epoch": None, "max_steps": 8}
    tiny.train(tmp_path, build(every), data(), callbacks=[Score(), noted], **options)
    assert noted.counts == [0, 0, 0, 0, 1, 1, 1, 1]  # of 1, 2, 0.5 and 3 the second is worse, and the last


WORSE = functools.partial(ReduceLROnPlateau, monitor="val/generator_loss", factor=0.5, patience=0, threshold=1e9)


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("every", "expected"),
    [({"schedule": WORSE}, [0, 0, 1, 1, 2, 2, 3]), ({"schedule": HALVING, "interval": "epoch"}, [0] * 4 + [1] * 3)],
)
def test_the_count_goes_on_after_a_resume(tmp_path, stop, every, expected):
    def rates(steps: int, *callbacks: L.Callback, **resumed: Path) -> list[int]:
        noted = Halvings()
        options = {"limit_val_batches": 1, "val_check_interval": 1, "check_val_every_n_epoch": None}
        options |= {"limit_train_batches": 2, "max_steps": steps, "callbacks": [noted, *callbacks]}
        module = tiny.gan(generator_scheduler=functools.partial(Every, frequency=2, **every))
        tiny.train(tmp_path, module, tiny.ring(), **options, **resumed)
        return noted.counts

    before = rates(stop, Checkpoint(dirpath=str(tmp_path)))
    assert before + rates(7, ckpt_path=tmp_path / "last.ckpt") == expected


def test_it_is_taken_apart():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    every = Every(optimizer, functools.partial(StepLR, step_size=2), interval="epoch", frequency=4)
    schedule = timed(every)
    assert (type(schedule), timing_of(schedule)) == (StepLR, Timing("epoch", 4))
    assert every.get_lr() == [0.1]


def test_a_schedule_by_itself_is_stepped_at_every_update():
    schedule = StepLR(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1), step_size=2)
    assert timed(schedule) is schedule
    assert timing_of(schedule) == Timing("step", 1)


def test_monitor_is_set_on_any_plateau():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    for plateau in (torch.optim.lr_scheduler.ReduceLROnPlateau, functools.partial(WarmupPlateau, monitor="val/loss")):
        assert monitored(timed(Every(optimizer, plateau, monitor="val/kid"))) == "val/kid"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frequency": 0}, "frequency must be at least 1, got 0"),
        ({"interval": "batch"}, "interval must be 'step' or 'epoch', got 'batch'"),
        ({"monitor": "val/fid"}, "ExponentialLR watches no score, got monitor='val/fid'. Leave it out"),
        (
            {"schedule": functools.partial(ReduceLROnPlateau, monitor="val/fid"), "interval": "epoch"},
            "ReduceLROnPlateau is shown its score at each validation, got interval='epoch'",
        ),
    ],
)
def test_what_means_nothing_is_refused(options, message):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(ValueError, match=message):
        Every(optimizer, **({"schedule": HALVING} | options))


def test_a_config_names_it_and_a_checkpoint_keeps_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = yaml.safe_load((Path(__file__).parents[2] / "configs/gan/ring_rpgan.yaml").read_text())
    config["model"]["init_args"]["generator_scheduler"] = {
        "class_path": "lit_generative.training.schedule_timing.Every",
        "init_args": {
            "schedule": {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 1, "gamma": 0.5}},
            "frequency": 2,
        },
    }
    config["trainer"] |= {"max_steps": 4, "limit_val_batches": 0, "callbacks": config["trainer"]["callbacks"][3:]}
    config["data"]["init_args"] = {"num_samples": 100, "batch_size": 8}
    Path("config.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", "config.yaml"]) == 0
    (path,) = Path("runs").rglob("last.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["lr_schedulers"][0]["_last_lr"] == pytest.approx([2e-3 / 4])
    assert checkpoint["hyper_parameters"]["generator_scheduler"]["class_path"].endswith("Every")
    assert tiny.GAN.load_from_checkpoint(path).configure_optimizers()[0]["lr_scheduler"]["scheduler"].step_size == 1
