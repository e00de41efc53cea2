"""What a config changes wins on resume. That an unchanged resume is exact is tested in tests/test_resume.py."""

import functools
import math

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ReduceLROnPlateau
from lightning.pytorch.utilities.types import LRSchedulerConfig

from lit_generative.callbacks.checkpoint import Checkpoint
from lit_generative.training.checkpoint_io import load_checkpoint
from lit_generative.training.lr_schedules import WarmupConstant, WarmupCosine, WarmupLinear, WarmupPlateau
from lit_generative.training.resume import apply_changed_options, optimization_options
from tests import tiny


class Rates(L.Callback):
    """The rate that each update of the first optimizer is made with."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        if optimizer is trainer.optimizers[0]:
            self.seen.append(optimizer.param_groups[0]["lr"])


def _adam(**kwargs):
    return functools.partial(torch.optim.Adam, **({"lr": 1e-3} | kwargs))


def _resumed(tmp_path, before, after, steps=(2, 3), data=tiny.digits, **kwargs):
    """Train ``before``, then resume its checkpoint with ``after``; the second trainer and the rates it used."""
    tiny.train(tmp_path, before, data(), max_steps=steps[0], callbacks=[Checkpoint(dirpath=str(tmp_path))], **kwargs)
    rates = Rates()
    last = tmp_path / "last.ckpt"
    fitted = tiny.train(tmp_path, after, data(), max_steps=steps[1], callbacks=[rates], ckpt_path=last, **kwargs)
    return fitted, rates.seen


def test_changed_rate_betas_and_weight_decay_win_over_the_checkpoint(tmp_path):
    before = tiny.vae(optimizer=_adam(lr=1e-3, betas=(0.9, 0.99)))
    after = tiny.vae(optimizer=_adam(lr=2e-3, betas=(0.5, 0.98), weight_decay=0.1))
    fitted, _ = _resumed(tmp_path, before, after)
    group = fitted.optimizers[0].param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (pytest.approx(2e-3), (0.5, 0.98), 0.1)
    assert isinstance(group["betas"], tuple)


def test_the_first_resumed_update_is_already_made_with_the_changed_settings(tmp_path):
    _, rates = _resumed(tmp_path, tiny.vae(optimizer=_adam()), tiny.vae(optimizer=_adam(lr=5e-4)))
    assert rates == [pytest.approx(5e-4)]


def test_each_optimizer_gets_its_own_changes(tmp_path):
    before = tiny.gan(generator_optimizer=_adam(lr=1e-3), discriminator_optimizer=_adam(lr=4e-3))
    after = tiny.gan(generator_optimizer=_adam(lr=1e-3), discriminator_optimizer=_adam(lr=4e-3, betas=(0.0, 0.9)))
    fitted, _ = _resumed(tmp_path, before, after, data=tiny.ring)
    groups = [optimizer.param_groups[0] for optimizer in fitted.optimizers]
    assert [(group["lr"], group["betas"]) for group in groups] == [(1e-3, (0.9, 0.999)), (4e-3, (0.0, 0.9))]


class HandTuned(L.Callback):
    """Changes settings in training, which no config knows of."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        trainer.optimizers[0].param_groups[0] |= {"lr": 7e-4, "weight_decay": 0.3}


def test_what_did_not_change_stays_as_the_checkpoint_has_it(tmp_path):
    rates, last = Rates(), tmp_path / "last.ckpt"
    tiny.train(tmp_path, tiny.vae(), tiny.digits(), callbacks=[HandTuned(), Checkpoint(dirpath=str(tmp_path))])
    after = tiny.vae(optimizer=_adam(eps=1e-6))
    fitted = tiny.train(tmp_path, after, tiny.digits(), max_steps=4, callbacks=[rates], ckpt_path=last)
    assert rates.seen == [pytest.approx(7e-4)]
    group = fitted.optimizers[0].param_groups[0]
    assert (group["eps"], group["weight_decay"]) == (1e-6, 0.3)


def test_the_moments_are_kept_when_settings_change(tmp_path):
    class Peek(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            self.state = {k: dict(v) for k, v in trainer.optimizers[0].state_dict()["state"].items()}
            self.state = {k: {n: t.clone() for n, t in v.items()} for k, v in self.state.items()}

    tiny.train(tmp_path, tiny.vae(), tiny.digits(), callbacks=[Checkpoint(dirpath=str(tmp_path))])
    peek, after = Peek(), tiny.vae(optimizer=_adam(lr=3e-3, betas=(0.5, 0.9)))
    tiny.train(tmp_path, after, tiny.digits(), max_steps=4, callbacks=[peek], ckpt_path=tmp_path / "last.ckpt")
    saved = load_checkpoint(tmp_path / "last.ckpt")["optimizer_states"][0]["state"]
    assert saved
    tiny.assert_same(peek.state, saved)
    assert peek.state[0]["step"] == 3


def test_a_scheduled_rate_keeps_its_place_and_is_scaled(tmp_path):
    schedule = functools.partial(WarmupLinear, warmup_steps=0, total_steps=8)
    before = tiny.vae(optimizer=_adam(lr=1e-3), scheduler=schedule)
    after = tiny.vae(optimizer=_adam(lr=4e-3), scheduler=schedule)
    _, rates = _resumed(tmp_path, before, after, steps=(2, 5))
    assert rates == pytest.approx([4e-3 * 6 / 8, 4e-3 * 5 / 8, 4e-3 * 4 / 8])


def test_a_rate_scheduled_by_torch_keeps_its_place_and_is_scaled(tmp_path):
    schedule = functools.partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)
    before = tiny.vae(optimizer=_adam(lr=1e-3), scheduler=schedule)
    after = tiny.vae(optimizer=_adam(lr=4e-3), scheduler=schedule)
    _, rates = _resumed(tmp_path, before, after, steps=(2, 4))
    assert rates == pytest.approx([1e-3, 5e-4])


def test_a_changed_rate_under_manual_optimization_keeps_its_place_too(tmp_path):
    schedule = functools.partial(WarmupLinear, warmup_steps=0, total_steps=8)
    before = tiny.gan(generator_scheduler=schedule)
    after = tiny.gan(generator_scheduler=schedule, generator_optimizer=_adam(lr=2e-3))
    _, rates = _resumed(tmp_path, before, after, steps=(2, 4), data=tiny.ring)
    assert rates == pytest.approx([2e-3 * 6 / 8, 2e-3 * 5 / 8])


@pytest.mark.parametrize("cls", [WarmupLinear, WarmupCosine])
def test_a_changed_total_steps_wins_from_the_first_update_on(tmp_path, cls):
    before = tiny.vae(scheduler=functools.partial(cls, warmup_steps=0, total_steps=2))
    after = tiny.vae(scheduler=functools.partial(cls, warmup_steps=0, total_steps=4))
    fitted, rates = _resumed(tmp_path, before, after, steps=(2, 5))
    uninterrupted = Rates()
    whole = tiny.vae(scheduler=functools.partial(cls, warmup_steps=0, total_steps=4))
    tiny.train(tmp_path, whole, tiny.digits(), max_steps=5, callbacks=[uninterrupted])
    assert fitted.lr_scheduler_configs[0].scheduler.total_steps == 4
    assert rates[1:] == pytest.approx(uninterrupted.seen[3:])
    assert rates[0] == pytest.approx(uninterrupted.seen[2])


def test_a_changed_warmup_wins(tmp_path):
    before = tiny.vae(scheduler=functools.partial(WarmupConstant, warmup_steps=1, total_steps=9))
    after = tiny.vae(scheduler=functools.partial(WarmupConstant, warmup_steps=7, total_steps=9))
    _, rates = _resumed(tmp_path, before, after, steps=(2, 5))
    assert rates[1:] == pytest.approx([4e-3 / 8, 5e-3 / 8])


def test_changed_milestones_of_a_schedule_of_torch_win(tmp_path):
    multi_step = functools.partial(torch.optim.lr_scheduler.MultiStepLR, gamma=0.1)
    before = tiny.vae(scheduler=functools.partial(multi_step, milestones=[50]))
    after = tiny.vae(scheduler=functools.partial(multi_step, milestones=[3]))
    _, rates = _resumed(tmp_path, before, after, steps=(2, 5))
    assert rates == pytest.approx([1e-3, 1e-4, 1e-4])


def test_a_changed_patience_and_factor_of_reduce_on_plateau_win(tmp_path):
    plateau = functools.partial(ReduceLROnPlateau, monitor="val/loss")
    before = tiny.vae(scheduler=functools.partial(plateau, patience=9, factor=0.5))
    after = tiny.vae(scheduler=functools.partial(plateau, patience=2, factor=0.1))
    validating = {"limit_val_batches": 1, "val_check_interval": 1, "limit_train_batches": 1}
    fitted, _ = _resumed(tmp_path, before, after, **validating)
    schedule = fitted.lr_scheduler_configs[0].scheduler
    assert (schedule.patience, schedule.factor) == (2, 0.1)


def test_a_changed_min_lr_of_reduce_on_plateau_wins(tmp_path):
    plateau = functools.partial(ReduceLROnPlateau, monitor="val/loss")
    before = tiny.vae(scheduler=functools.partial(plateau, min_lr=0.1))
    after = tiny.vae(scheduler=functools.partial(plateau, min_lr=1e-5))
    fitted, _ = _resumed(tmp_path, before, after)
    assert fitted.lr_scheduler_configs[0].scheduler.min_lrs == [1e-5]


@pytest.mark.parametrize(
    ("change", "best"), [({"monitor": "val/kl"}, math.inf), ({"mode": "max"}, -math.inf), ({"patience": 3}, 7.0)]
)
def test_reduce_on_plateau_forgets_the_best_of_another_score(change, best):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    options = {"monitor": "val/loss"}
    before, after = (
        {"optimizer": optimizer, "lr_scheduler": {"scheduler": ReduceLROnPlateau(optimizer, **options | new)}}
        for new in ({}, change)
    )
    schedule = before["lr_scheduler"]["scheduler"]
    schedule.step(7.0)
    trainer = L.Trainer(accelerator="cpu", logger=False, barebones=True)
    trainer.strategy.optimizers = [optimizer]
    trainer.strategy.lr_scheduler_configs = [LRSchedulerConfig(schedule)]
    apply_changed_options(trainer, optimization_options(before), after)
    assert schedule.best == best


WORSE = {"factor": 0.5, "patience": 0, "threshold": 1e9}
SCHEDULES = {
    "warm-up": functools.partial(WarmupPlateau, warmup_steps=1, **WORSE),
    "torch": functools.partial(ReduceLROnPlateau, threshold_mode="abs", **WORSE),
}
MODES = {
    "manual": (lambda plateau, seed: tiny.gan(seed=seed, generator_scheduler=plateau("val/generator_loss")), tiny.ring),
    "automatic": (lambda plateau, seed: tiny.vae(seed=seed, scheduler=plateau("val/loss")), tiny.digits),
}
VALIDATING = {"limit_val_batches": 1, "val_check_interval": 2, "limit_train_batches": 6}


@pytest.mark.parametrize("stop", [3, 4, 6], ids=["between validations", "at a validation", "at an epoch's last one"])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize(("build", "data"), MODES.values(), ids=MODES)
def test_a_plateau_resumes_bit_for_bit_also_from_just_before_a_validation(tmp_path, build, data, schedule, stop):
    def plateau(monitor):
        return functools.partial(schedule, monitor=monitor)

    whole, uninterrupted = build(plateau, 0), Rates()
    tiny.train(tmp_path, whole, data(), max_steps=9, callbacks=[uninterrupted], **VALIDATING)
    after = build(plateau, 1)
    _, rates = _resumed(tmp_path, build(plateau, 0), after, steps=(stop, 9), data=data, **VALIDATING)
    assert rates == uninterrupted.seen[stop:]
    assert rates[-1] == 1e-3 / 2**3  # of four validations the first sets the best, or falls in no warm-up
    tiny.assert_same(tiny.weights(after), tiny.weights(whole))


class Validations(L.Callback):
    """The step that each validation is logged at, and its score."""

    def __init__(self) -> None:
        self.scores: dict[int, float] = {}

    def on_validation_end(self, trainer, pl_module) -> None:
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        self.scores[step] = float(trainer.callback_metrics["val/loss"])

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        assert trainer.training


def _validations(tmp_path, save, scheduler, **kwargs) -> dict[int, float]:
    """Of a run that goes on from its fourth update to the seventh."""
    options = VALIDATING | {"limit_val_batches": 3} | kwargs
    data = {"eval_batch_size": 7}
    tiny.train(tmp_path, tiny.vae(scheduler=scheduler), tiny.digits(**data), max_steps=4, callbacks=[save], **options)
    seen, after = Validations(), tiny.vae(scheduler=scheduler, seed=1)
    options |= {"callbacks": [seen], "ckpt_path": next(tmp_path.glob("*.ckpt")), "max_steps": 7}
    tiny.train(tmp_path, after, tiny.digits(**data), **options)
    return seen.scores


def test_the_validation_a_checkpoint_was_written_before_is_run_whole_and_at_its_own_step(tmp_path):
    plateau = functools.partial(WarmupPlateau, monitor="val/loss")
    uninterrupted = Validations()
    options = VALIDATING | {"limit_val_batches": 3, "max_steps": 7, "callbacks": [uninterrupted]}
    tiny.train(tmp_path, tiny.vae(scheduler=plateau), tiny.digits(eval_batch_size=7), **options)
    resumed = _validations(tmp_path, Checkpoint(100, dirpath=str(tmp_path)), plateau)
    assert resumed == {step: uninterrupted.scores[step] for step in (3, 5)}


def test_a_score_computed_between_validations_is_there_at_the_validation_that_is_due(tmp_path):
    class Score(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            if trainer.global_step == 4:
                trainer.callback_metrics["val/fid"] = torch.tensor(0.1)

    plateau = functools.partial(WarmupPlateau, monitor="val/fid")
    options = VALIDATING | {"val_check_interval": 4, "limit_train_batches": 8}
    tiny.train(
        tmp_path,
        tiny.vae(scheduler=plateau),
        tiny.digits(),
        max_steps=4,
        callbacks=[Score(), Checkpoint(dirpath=str(tmp_path))],
        **options,
    )
    after = tiny.vae(scheduler=plateau)
    fitted = tiny.train(tmp_path, after, tiny.digits(), max_steps=5, ckpt_path=tmp_path / "last.ckpt", **options)
    best = fitted.lr_scheduler_configs[0].scheduler.state_dict()["plateau"]["best"]
    assert best == float(torch.tensor(0.1))


def test_a_validation_is_not_repeated_if_no_schedule_needs_it(tmp_path):
    assert list(_validations(tmp_path, Checkpoint(100, dirpath=str(tmp_path)), None)) == [5]


def test_a_validation_is_not_repeated_if_the_checkpoint_was_written_after_it(tmp_path):
    plateau = functools.partial(WarmupPlateau, monitor="val/loss")
    best = ModelCheckpoint(str(tmp_path), filename="best", monitor="val/loss", mode="max", every_n_epochs=1)
    steps = _validations(tmp_path, best, plateau, val_check_interval=4, limit_train_batches=8)
    assert steps == {}


def test_the_validation_of_a_run_that_stops_early_is_not_repeated(tmp_path):
    class Stops(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            trainer.should_stop = trainer.global_step == 3

    plateau = functools.partial(WarmupPlateau, monitor="val/loss")
    callbacks = [Stops(), Checkpoint(100, dirpath=str(tmp_path))]
    tiny.train(tmp_path, tiny.vae(scheduler=plateau), tiny.digits(), max_steps=9, callbacks=callbacks, **VALIDATING)
    assert load_checkpoint(tmp_path / "last.ckpt")["global_step"] == 3
    assert load_checkpoint(tmp_path / "last.ckpt")["validation"]["is_due"] is False


def test_a_checkpoint_written_after_training_has_no_validation_due(tmp_path):
    fitted = tiny.train(tmp_path, tiny.vae(), tiny.digits(), max_steps=4, **VALIDATING)
    fitted.save_checkpoint(tmp_path / "after.ckpt")
    assert load_checkpoint(tmp_path / "after.ckpt")["validation"]["is_due"] is False


def test_without_the_schedule_of_the_checkpoint_the_configured_rate_is_used(tmp_path):
    before = tiny.vae(scheduler=functools.partial(WarmupLinear, warmup_steps=0, total_steps=2))
    _, rates = _resumed(tmp_path, before, tiny.vae(), steps=(2, 4))
    assert rates == pytest.approx([1e-3, 1e-3])


def test_an_unchanged_resume_changes_nothing(tmp_path):
    schedule = functools.partial(WarmupCosine, warmup_steps=1, total_steps=8)
    whole = tiny.vae(scheduler=schedule)
    tiny.train(tmp_path, whole, tiny.digits(), max_steps=4)
    after = tiny.vae(seed=1, scheduler=schedule)
    _resumed(tmp_path, tiny.vae(scheduler=schedule), after, steps=(2, 4))
    tiny.assert_same(tiny.weights(after), tiny.weights(whole))


def test_settings_of_a_checkpoint_apply_to_the_resumed_run_only(tmp_path):
    """A module loaded from a checkpoint and trained anew uses the rate it was given, as it stands."""
    tiny.train(tmp_path, tiny.vae(), tiny.digits(), callbacks=[Checkpoint(dirpath=str(tmp_path))])
    again = type(tiny.vae()).load_from_checkpoint(
        tmp_path / "last.ckpt", optimizer={"class_path": "torch.optim.Adam", "init_args": {"lr": 1e-4}}
    )
    rates = Rates()
    tiny.train(tmp_path, again, tiny.digits(), max_steps=1, callbacks=[rates])
    assert rates.seen == [pytest.approx(1e-4)]


def test_a_rate_of_zero_in_the_checkpoint_does_not_hide_the_new_one(tmp_path):
    _, rates = _resumed(tmp_path, tiny.vae(optimizer=_adam(lr=0.0)), tiny.vae(optimizer=_adam(lr=2e-3)))
    assert rates == [2e-3]


def test_options_are_plain_data_with_the_unscheduled_rate():
    module = tiny.gan(generator_scheduler=functools.partial(WarmupLinear, warmup_steps=3, total_steps=9))
    generator, discriminator = optimization_options(module.configure_optimizers())
    assert generator["schedule"] == {"warmup_steps": 3, "total_steps": 9}
    assert discriminator["schedule"] is None
    assert generator["groups"][0]["lr"] == 1e-3
    assert generator["groups"][0]["betas"] == [0.9, 0.999]
    assert generator["groups"][0]["name"] == "generator"
    assert "params" not in generator["groups"][0]


def test_a_single_optimizer_has_one_entry():
    assert len(optimization_options(tiny.vae().configure_optimizers())) == 1
