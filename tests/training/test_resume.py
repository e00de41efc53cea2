"""What a config changes wins on resume. That an unchanged resume is exact is tested in tests/test_resume.py."""

import functools

import lightning as L
import pytest
import torch
from lightning.pytorch.cli import ReduceLROnPlateau

from lit_generative.callbacks.checkpoint import Checkpoint
from lit_generative.training.checkpoint_io import load_checkpoint
from lit_generative.training.lr_schedules import WarmupConstant, WarmupCosine, WarmupLinear
from lit_generative.training.resume import optimization_options
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
