from types import SimpleNamespace

import pytest

from lit_generative.training.run import global_seed, log_now, measures_now


def test_the_seed_is_that_of_seed_everything_or_zero(monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    assert global_seed() == 0
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert global_seed() == 7


@pytest.mark.parametrize(("every", "logged"), [(3, [2, 5]), (1, [0, 1, 2, 3, 4, 5]), (0, [])])
def test_every_nth_batch_is_logged(every, logged):
    def trainer(stepped):
        loop = SimpleNamespace(epoch_loop=SimpleNamespace(_batches_that_stepped=stepped))
        return SimpleNamespace(log_every_n_steps=every, fit_loop=loop)

    assert [i for i in range(6) if log_now(trainer(i))] == logged


@pytest.mark.parametrize(("every", "measured"), [(2, [2, 4]), (1, [1, 2, 3, 4]), (None, [])])
def test_something_is_measured_after_every_nth_update_and_never_within_one(every, measured):
    def trainer(step, within):
        return SimpleNamespace(global_step=step, fit_loop=SimpleNamespace(_should_accumulate=lambda: within))

    assert [step for step in range(1, 5) if measures_now(trainer(step, False), every)] == measured
    assert not any(measures_now(trainer(step, True), every) for step in range(1, 5))
