"""Weights and capacities step by step, and that a run and a resumed run use them."""

from __future__ import annotations

import pytest

from lit_generative.callbacks.checkpoint import Checkpoint
from lit_generative.callbacks.kl_schedule import CapacitySchedule, KLWarmup
from lit_generative.vae.objectives import Capacity, Elbo
from tests import tiny


class Seen(Elbo):
    """Notes what each training step was given."""

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


def test_the_kl_follows_the_capacity(tmp_path):
    module = tiny.vae(objective=Capacity(gamma=100.0, capacity=2.0))
    run = tiny.train(tmp_path, module, tiny.digits(batch_size=64), max_steps=150)
    assert float(run.callback_metrics["train/kl"]) == pytest.approx(2.0, abs=0.5)


def test_a_warmup_longer_than_training_is_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="the warm-up of 7 updates is longer than training, 2: .* Lower warmup_steps"):
        train(tmp_path, KLWarmup(7), steps=2)


@pytest.mark.parametrize("callback", [KLWarmup(3), CapacitySchedule(end=1.0, num_steps=2)])
def test_a_module_without_a_kl_term_is_refused(tmp_path, callback):
    with pytest.raises(TypeError, match=f"{type(callback).__name__}: GAN has no kl_weight and capacity"):
        tiny.train(tmp_path, tiny.gan(), tiny.ring(), callbacks=[callback])


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
