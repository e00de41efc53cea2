"""Weights and capacities step by step, and that a run and a resumed run use them."""

from __future__ import annotations

import contextlib
import warnings

import lightning as L
import pytest
import torch

from lit_generative.callbacks.checkpoint import Checkpoint
from lit_generative.callbacks.kl_schedule import CapacitySchedule, KLWarmup
from lit_generative.vae.objectives import Capacity, Elbo
from tests import families, tiny
from tests.vae.test_adversarial_module import model
from tests.vae.test_vq_module import vqvae


class Seen(Elbo):
    """Notes what each training step was given."""

    has_capacity = True

    def __init__(self) -> None:
        super().__init__()
        self.values: list[tuple[float, float | None]] = []

    def loss(self, draws):
        self.values.append((draws.kl_weight, draws.capacity))
        return super().loss(draws)


def train(tmp_path, *callbacks, steps: int = 6, **options) -> list[tuple[float, float | None]]:
    module = tiny.vae(objective=Seen())
    tiny.train(tmp_path, module, tiny.digits(), callbacks=list(callbacks), max_steps=steps, **options)
    return module.objective.values


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({"warmup_steps": 4}, [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]),
        ({"warmup_steps": 2, "start": 0.5}, [0.5, 0.75, 1.0, 1.0, 1.0, 1.0]),
        ({"warmup_steps": 2, "cycle_steps": 4}, [0.0, 0.5, 1.0, 1.0, 0.0, 0.5]),
        ({"warmup_steps": 1}, [0.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_the_weight_rises_update_by_update(tmp_path, options, weights):
    assert [weight for weight, _ in train(tmp_path, KLWarmup(**options))] == weights


def test_the_capacity_rises_update_by_update_and_stays(tmp_path):
    schedule = CapacitySchedule(start=1.0, end=3.0, num_steps=4)
    assert [capacity for _, capacity in train(tmp_path, schedule)] == [1.0, 1.5, 2.0, 2.5, 3.0, 3.0]


def test_without_them_the_objective_has_its_own_weight(tmp_path):
    assert train(tmp_path, steps=2) == [(1.0, None)] * 2


def test_validation_weighs_the_kl_fully(tmp_path):
    values = train(tmp_path, KLWarmup(10), steps=1, limit_val_batches=1, val_check_interval=1)
    assert values == [(0.0, None), (1.0, None)]


def test_a_resumed_run_goes_on_where_it_was(tmp_path):
    train(tmp_path, KLWarmup(4), Checkpoint(dirpath=str(tmp_path)), steps=3)
    resumed = train(tmp_path, KLWarmup(4), steps=6, ckpt_path=tmp_path / "last.ckpt")
    assert [weight for weight, _ in resumed] == [0.75, 1.0, 1.0]


class Terms(L.Callback):
    """What the KL term of each update was multiplied with, by the losses that were logged."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.weights: list[float] = []
        self.fails_at = fails_at

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        losses = {name: value.double() for name, value in trainer.callback_metrics.items()}
        difference = losses["train/autoencoder_loss"] - losses["train/reconstruction"]
        self.weights.append(float(difference / losses["train/kl"]))
        if trainer.global_step == self.fails_at:
            raise RuntimeError("fails")


def train_adversarial(tmp_path, module, *callbacks, steps: int = 6, **options) -> list[float]:
    terms = Terms(options.pop("fails_at", None))
    tiny.train(tmp_path, module, tiny.digits(), callbacks=[*callbacks, terms], max_steps=steps, **options)
    return terms.weights


def test_the_weight_rises_to_the_modules_own_and_is_that_again_afterwards(tmp_path):
    module = model("vectors", start_step=100, kl_weight=8.0)
    weights = train_adversarial(tmp_path, module, KLWarmup(4, start=0.2))
    torch.testing.assert_close(weights, [1.6, 3.2, 4.8, 6.4, 8.0, 8.0], rtol=1e-3, atol=0)
    assert module.kl_weight == 8.0
    module = tiny.vae()
    tiny.train(tmp_path, module, tiny.digits(), callbacks=[KLWarmup(3)], max_steps=2, limit_val_batches=0)
    assert module.kl_weight == 1.0


def test_a_resumed_run_goes_on_where_it_was_towards_the_modules_own_weight(tmp_path):
    modules = [model("vectors", seed=seed, start_step=100, kl_weight=8.0) for seed in range(2)]
    train_adversarial(tmp_path, modules[0], KLWarmup(4), Checkpoint(dirpath=str(tmp_path)), steps=3)
    for module in modules:  # one that was trained, and one as a new process builds it
        weights = train_adversarial(tmp_path, module, KLWarmup(4), ckpt_path=tmp_path / "last.ckpt")
        torch.testing.assert_close(weights, [6.0, 8.0, 8.0], rtol=1e-3, atol=0)


def test_a_run_that_fails_gives_the_weight_back(tmp_path):
    module, warmup = model("vectors", start_step=100, kl_weight=8.0), KLWarmup(4)
    with pytest.raises(RuntimeError, match="fails"):
        train_adversarial(tmp_path, module, warmup, fails_at=2)
    assert module.kl_weight == 8.0
    weights = train_adversarial(tmp_path, module, warmup)
    torch.testing.assert_close(weights[1:], [2.0, 4.0, 6.0, 8.0, 8.0], rtol=1e-3, atol=0)


def test_the_kl_follows_the_capacity(tmp_path):
    module = tiny.vae(objective=Capacity(gamma=100.0, capacity=2.0))
    run = tiny.train(tmp_path, module, tiny.digits(batch_size=64), max_steps=150)
    assert float(run.callback_metrics["train/kl"]) == pytest.approx(2.0, abs=0.5)


def test_a_warmup_longer_than_training_is_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="the warm-up of 7 updates is longer than training, 2: .* Lower warmup_steps"):
        train(tmp_path, KLWarmup(7), steps=2)


def test_a_module_without_what_is_scheduled_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"KLWarmup: VQVAE has no kl_weight\. Use it with a VAE or an AdversarialVAE"):
        tiny.train(tmp_path, vqvae(), tiny.digits(), callbacks=[KLWarmup(3)])
    schedule = CapacitySchedule(end=1.0, num_steps=2)
    with pytest.raises(TypeError, match=r"CapacitySchedule: AdversarialVAE has no capacity\. Use it with a VAE and"):
        tiny.train(tmp_path, model(), tiny.digits(), callbacks=[schedule])
    with pytest.raises(
        ValueError, match=r"objective aims at no capacity, so nothing would change\. Use the objective Cap"
    ):
        tiny.train(tmp_path, tiny.vae(objective=Elbo()), tiny.digits(), callbacks=[schedule])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: KLWarmup(0), "warmup_steps must be at least 1, got 0"),
        (lambda: KLWarmup(3, start=1.0), r"start is a share in \[0, 1\), got 1"),
        (lambda: KLWarmup(3, cycle_steps=2), "a cycle must hold its warm-up, got cycle_steps=2 < warmup_steps=3"),
        (lambda: CapacitySchedule(end=1.0, num_steps=0), "num_steps must be at least 1, got 0"),
        (lambda: CapacitySchedule(end=1.0, num_steps=5, start=2.0), "need 0 <= start < end, got start=2.0, end=1.0"),
    ],
)
def test_bad_numbers_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("options", "total"), [({"max_epochs": 1}, 2), ({"max_epochs": 2, "max_steps": 3}, 3), ({"max_epochs": 2}, 4)]
)
def test_a_warmup_longer_than_all_epochs_is_warned_of(tmp_path, options, total):
    data = tiny.digits(batch_size=500)  # two batches an epoch
    for warmup_steps, warned in ((total, False), (total + 1, True)):
        callbacks = [KLWarmup(warmup_steps)]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            tiny.trainer(tmp_path, callbacks=callbacks, **options).fit(families.build("vae"), data)
        found = [str(w.message) for w in caught if "longer than training" in str(w.message)]
        assert len(found) == warned
        assert not found or f"longer than training, {total}:" in found[0]


@pytest.mark.parametrize("fails", [False, True])
def test_the_capacity_is_the_objectives_own_again_after_training(tmp_path, fails):
    class Stop(L.Callback):
        def on_train_batch_end(self, *args):
            if fails:
                raise ArithmeticError

    module = tiny.vae(objective=Capacity(25.0))
    trainer = tiny.trainer(tmp_path, callbacks=[CapacitySchedule(3.0, 2), Stop()], max_steps=4)
    with pytest.raises(ArithmeticError) if fails else contextlib.nullcontext():
        trainer.fit(module, tiny.digits())
    assert module.capacity is None
