"""Stages open when they should, under both modes of optimization, also after a resume and on two processes."""

from __future__ import annotations

import functools
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from lit_generative.callbacks.checkpoint import Checkpoint
from lit_generative.callbacks.unfreezing import GradualUnfreezing
from lit_generative.training.lr_schedules import WarmupLinear
from tests import processes, tiny
from tests.callbacks import unfreezing_process

ROOT = Path(__file__).parents[2]
STAGES = [["decoder"], ["encoder.*.bias", "encoder.*.weight"]]


class Moves(L.Callback):
    """Notes after each batch which top sub-modules have moved in it."""

    def __init__(self) -> None:
        self.seen: list[set[str]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.before = tiny.weights(pl_module)

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        now = pl_module.state_dict()
        self.seen.append({k.split(".")[0] for k, v in self.before.items() if not torch.equal(v, now[k])})


def moves(tmp_path, callback, module=None, data=None, **options):
    noted = Moves()
    tiny.train(tmp_path, module or tiny.vae(), data or tiny.digits(), callbacks=[callback, noted], **options)
    return noted.seen


def test_a_stage_opens_every_so_many_steps(tmp_path):
    seen = moves(tmp_path, GradualUnfreezing(STAGES, every=2, unit="step"), max_steps=4)
    assert seen == [{"decoder"}] * 2 + [{"encoder", "decoder"}] * 2


def test_a_stage_opens_at_its_milestone_in_epochs(tmp_path):
    options = {"max_steps": -1, "max_epochs": 3, "limit_train_batches": 1}
    assert moves(tmp_path, GradualUnfreezing(STAGES, milestones=[2]), **options) == [
        {"decoder"},
        {"decoder"},
        {"encoder", "decoder"},
    ]


def test_under_manual_optimization_what_no_stage_names_trains_on(tmp_path):
    stages = [["generator.layers.2"], ["generator.layers.0"]]
    callback = GradualUnfreezing(stages, every=2, unit="step")
    module = tiny.gan()
    first = module.generator.layers[0].weight.detach().clone()
    seen = moves(tmp_path, callback, module, tiny.ring(), max_steps=2)
    assert seen == [{"generator", "discriminator"}] * 2
    torch.testing.assert_close(module.generator.layers[0].weight, first, rtol=0, atol=0)


def test_later_stages_have_lower_rates_and_the_schedule_scales_all(tmp_path):
    module = tiny.vae(
        optimizer=functools.partial(torch.optim.AdamW, lr=0.1),
        scheduler=functools.partial(WarmupLinear, warmup_steps=10, total_steps=100),
    )
    trainer = tiny.train(
        tmp_path, module, tiny.digits(), callbacks=[GradualUnfreezing(STAGES, every=1, unit="step", rate_decay=0.25)]
    )
    groups = trainer.optimizers[0].param_groups
    assert groups[1]["lr"] == pytest.approx(0.25 * groups[0]["lr"])
    assert 0 < groups[0]["lr"] < 0.1
    assert [len(group["params"]) for group in groups] == [4, 4]


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    def callbacks():
        return [GradualUnfreezing(STAGES, every=3, unit="step", rate_decay=0.5), Checkpoint(dirpath=str(tmp_path))]

    whole, half, resumed = tiny.vae(), tiny.vae(), tiny.vae(seed=1)
    tiny.train(tmp_path, whole, tiny.digits(), callbacks=callbacks()[:1], max_steps=6)
    tiny.train(tmp_path, half, tiny.digits(), callbacks=callbacks(), max_steps=4)
    tiny.train(
        tmp_path, resumed, tiny.digits(), callbacks=callbacks(), max_steps=6, ckpt_path=str(tmp_path / "last.ckpt")
    )
    tiny.assert_same(tiny.weights(resumed), tiny.weights(whole))


def test_frozen_batch_norms_keep_their_statistics_and_open_ones_follow(tmp_path):
    module = tiny.image_gan()
    norms = [name for name, part in module.generator.named_modules() if isinstance(part, nn.BatchNorm2d)]
    stages = [["discriminator"], [f"generator.{name}" for name in norms]]
    frozen = GradualUnfreezing(stages, every=2, unit="step")
    before = tiny.weights(module)
    tiny.train(tmp_path, module, tiny.digits(), callbacks=[frozen], max_steps=2)
    key = f"generator.{norms[0]}.running_mean"
    tiny.assert_same(module.state_dict()[key], before[key])
    module = tiny.image_gan()
    tiny.train(
        tmp_path, module, tiny.digits(), callbacks=[GradualUnfreezing(stages, every=2, unit="step")], max_steps=3
    )
    assert not torch.equal(module.state_dict()[key], before[key])


def test_validation_does_not_wake_frozen_statistics(tmp_path):
    module = tiny.image_gan()
    norms = [name for name, part in module.generator.named_modules() if isinstance(part, nn.BatchNorm2d)]
    stages = [["discriminator"], [f"generator.{name}" for name in norms]]
    before = tiny.weights(module)
    options = {"max_steps": 3, "limit_val_batches": 1, "val_check_interval": 1}
    tiny.train(tmp_path, module, tiny.digits(), callbacks=[GradualUnfreezing(stages, every=9, unit="step")], **options)
    key = f"generator.{norms[0]}.running_mean"
    tiny.assert_same(module.state_dict()[key], before[key])


def test_after_training_everything_asks_for_gradients_again(tmp_path):
    module = tiny.vae()
    tiny.train(tmp_path, module, tiny.digits(), callbacks=[GradualUnfreezing(STAGES, every=9)], max_steps=1)
    assert all(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": [["decoder"]], "every": 1}, "at least two lists"),
        ({"stages": [["decoder"], []], "every": 1}, "at least two lists"),
        ({"stages": STAGES}, "give every or milestones"),
        ({"stages": STAGES, "every": 1, "milestones": [1]}, "give every or milestones"),
        ({"stages": STAGES, "every": 0}, "every must be at least 1"),
        ({"stages": STAGES, "milestones": [1, 2]}, "2 stages need 1 rising milestones"),
        ({"stages": [["a"], ["b"], ["c"]], "milestones": [2, 2]}, "rising"),
        ({"stages": STAGES, "every": 1, "unit": "batch"}, "unit must be epoch or step"),
        ({"stages": STAGES, "every": 1, "rate_decay": 0.0}, "rate_decay must lie"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GradualUnfreezing(**options)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([["decoder"], ["encodr"]], r"'encodr'\. The nearest are: .*encoder"),
        ([["decoder"], ["*.bias"]], "stage 1 names decoder.*, which stage 0 opens already"),
    ],
)
def test_stages_that_do_not_fit_the_module_are_refused(tmp_path, stages, message):
    with pytest.raises(ValueError, match=message):
        tiny.train(tmp_path, tiny.vae(), tiny.digits(), callbacks=[GradualUnfreezing(stages, every=1)])


def test_weights_that_the_module_never_trains_are_refused(tmp_path):
    module = tiny.vae()
    module.encoder.requires_grad_(False)
    with pytest.raises(ValueError, match=r"stage 1 names encoder\..*, which the module never trains"):
        tiny.train(tmp_path, module, tiny.digits(), callbacks=[GradualUnfreezing(STAGES, every=1)])


def test_plain_ddp_is_refused_under_automatic_optimization_only():
    callback = GradualUnfreezing(STAGES, every=1)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, barebones=False)
    trainer.strategy.__class__ = DDPStrategy
    trainer.strategy._ddp_kwargs = {}
    with pytest.raises(ValueError, match="ddp_find_unused_parameters_true"):
        callback.setup(trainer, tiny.vae(), "fit")
    trainer.strategy._ddp_kwargs = {"find_unused_parameters": True}
    callback.setup(trainer, tiny.vae(), "fit")


def test_rates_need_a_module_of_ours():
    callback = GradualUnfreezing([["a"], ["b"]], every=1, rate_decay=0.5)
    module = L.LightningModule()
    module.a, module.b = nn.Linear(1, 1), nn.Linear(1, 1)
    with pytest.raises(TypeError, match="needs a GenerativeModule"):
        callback.setup(L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False), module, "fit")


@pytest.mark.slow
def test_two_processes_make_the_updates_of_one(tmp_path):
    one = unfreezing_process.train(1, tmp_path).state_dict()
    processes.run(Path(__file__).with_name("unfreezing_process.py"), 2, tmp_path)
    two = [torch.load(tmp_path / f"weights_{rank}.pt", weights_only=True) for rank in (0, 1)]
    for name, value in one.items():
        assert torch.equal(two[0][name], two[1][name]), name
        torch.testing.assert_close(two[0][name], value, rtol=0, atol=1e-10)
