import time

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from lit_generative.callbacks.checkpoint import Checkpoint
from lit_generative.callbacks.throughput import Throughput
from tests import tiny


class Clock:
    """Stands still but where a test lets time pass."""

    def __init__(self, monkeypatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


class Slow(L.Callback):
    """Takes seconds of the clock in the hooks it is told of."""

    def __init__(self, clock: Clock, **seconds: float) -> None:
        self.clock, self.seconds = clock, seconds

    def _pass(self, hook: str) -> None:
        self.clock.now += self.seconds.get(hook, 0.0)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        first = trainer.fit_loop.total_batch_idx == 0
        self._pass("first_batch" if first else "batch")

    def on_validation_batch_start(self, *args) -> None:
        self._pass("validation")


class Logged(L.pytorch.loggers.CSVLogger):
    def __init__(self, tmp_path) -> None:
        super().__init__(tmp_path)
        self.rates: dict[int, float] = {}
        self.batches: dict[int, float] = {}

    def log_metrics(self, metrics, step=None) -> None:
        if "train/images_per_second" in metrics:
            self.rates[step] = metrics["train/images_per_second"]
            self.batches[step] = metrics["train/effective_batch"]


MODES = {"manual": (tiny.gan, tiny.ring), "automatic": (tiny.vae, tiny.digits)}
modes = pytest.mark.parametrize(("build", "data"), MODES.values(), ids=MODES)


def _logged(tmp_path, build, data, *callbacks, **kwargs) -> Logged:
    logger = Logged(tmp_path)
    options = {"max_steps": 6, "log_every_n_steps": 3, "logger": logger, "callbacks": [Throughput(), *callbacks]}
    tiny.train(tmp_path, build(), data(), **options | kwargs)
    return logger


@modes
def test_images_per_second_is_the_mean_since_the_last_time_without_the_first_batch(tmp_path, clock, build, data):
    logger = _logged(tmp_path, build, data, Slow(clock, batch=0.5, first_batch=99))
    # batches of 6 images, half a second each; of the first three batches two count
    assert logger.rates == pytest.approx({2: 12.0, 5: 12.0})
    assert logger.batches == {2: 6.0, 5: 6.0}


def test_windows_do_not_leak_into_each_other(tmp_path, clock):
    class Faster(Slow):
        def on_train_batch_start(self, trainer, *args) -> None:
            self.clock.now += 1.0 if trainer.global_step < 3 else 0.25

    logger = _logged(tmp_path, tiny.vae, tiny.digits, Faster(clock))
    assert logger.rates == pytest.approx({2: 6.0, 5: 24.0})


@modes
def test_validation_does_not_count(tmp_path, clock, build, data):
    slow = Slow(clock, batch=0.5, validation=40.0)
    options = {"limit_val_batches": 2, "val_check_interval": 2, "limit_train_batches": 4}
    assert _logged(tmp_path, build, data, slow, **options).rates == pytest.approx({2: 12.0, 5: 12.0})


def test_writing_a_checkpoint_does_not_count(tmp_path, clock, monkeypatch):
    class Saves(Checkpoint):
        def _save_checkpoint(self, trainer, filepath) -> None:
            super()._save_checkpoint(trainer, filepath)
            clock.now += 70.0

    logger = _logged(tmp_path, tiny.vae, tiny.digits, Slow(clock, batch=0.5), Saves(1, dirpath=str(tmp_path)))
    assert logger.rates == pytest.approx({2: 12.0, 5: 12.0})


def test_loading_counts(tmp_path, clock):
    class Loader(DataLoader):
        def __iter__(self):
            for batch in super().__iter__():
                clock.now += 2.0
                yield batch

    batches = [{"image": torch.zeros(4, 2), "label": torch.zeros(4, dtype=torch.int64)}] * 9
    logger = Logged(tmp_path)
    fitted = tiny.trainer(tmp_path, max_steps=6, log_every_n_steps=3, logger=logger, callbacks=[Throughput()])
    fitted.fit(tiny.gan(), Loader(batches, batch_size=None))
    assert logger.rates == pytest.approx({2: 2.0, 5: 2.0})


def test_accumulated_batches_are_one_effective_batch(tmp_path, clock):
    class SlowAfterTheThirdUpdate(Slow):
        def on_train_batch_start(self, trainer, *args) -> None:
            self.clock.now += 2.0 if trainer.fit_loop.total_batch_idx in (12, 13, 14) else 0.5

    slow = SlowAfterTheThirdUpdate(clock)
    logger = _logged(tmp_path, tiny.vae, tiny.digits, slow, accumulate_grad_batches=4)
    assert logger.batches == {2: 24.0, 5: 24.0}
    assert logger.rates == pytest.approx({2: 12.0, 5: 12 * 6 / (3 * 2.0 + 9 * 0.5)})


def test_all_processes_count(tmp_path, clock, monkeypatch):
    monkeypatch.setattr(L.Trainer, "world_size", property(lambda self: 3))
    data = [{"image": torch.zeros(4, 2), "label": torch.zeros(4, dtype=torch.int64)}] * 9
    logger = Logged(tmp_path)
    callbacks = [Throughput(), Slow(clock, batch=0.5)]
    fitted = tiny.trainer(tmp_path, max_steps=3, log_every_n_steps=3, logger=logger, callbacks=callbacks)
    fitted.fit(tiny.gan(), DataLoader(data, batch_size=None))
    assert logger.batches == {2: 12.0}
    assert logger.rates == pytest.approx({2: 24.0})


def test_it_starts_anew_when_the_run_resumes(tmp_path, clock):
    throughput = Throughput()
    slow = Slow(clock, batch=0.5)
    callbacks = [throughput, slow, Checkpoint(dirpath=str(tmp_path))]
    tiny.train(tmp_path, tiny.vae(), tiny.digits(), max_steps=4, log_every_n_steps=3, callbacks=callbacks)
    clock.now += 1000.0
    slow.seconds = {"batch": 0.25}
    logger = Logged(tmp_path)
    options = {"log_every_n_steps": 3, "logger": logger, "callbacks": callbacks, "ckpt_path": tmp_path / "last.ckpt"}
    tiny.train(tmp_path, tiny.vae(), tiny.digits(), max_steps=9, **options)
    assert logger.rates == pytest.approx({5: 24.0, 8: 24.0})


def test_logging_at_every_update_starts_with_the_second(tmp_path, clock):
    logger = _logged(tmp_path, tiny.vae, tiny.digits, Slow(clock, batch=0.5), log_every_n_steps=1)
    assert list(logger.rates) == [1, 2, 3, 4, 5]


def test_nothing_is_logged_where_logging_is_off(tmp_path):
    assert _logged(tmp_path, tiny.vae, tiny.digits, log_every_n_steps=0).rates == {}


def test_batches_without_images_are_refused():
    module = tiny.gan()
    match = r"Throughput: counts batch\['image'\], but a batch is a dict without it. Leave"
    with pytest.raises(TypeError, match=match):
        Throughput().on_train_batch_end(tiny.trainer("."), module, None, {"text": [1, 2]}, 0)


def test_it_does_not_change_training_by_one_bit(tmp_path):
    trained = []
    for callbacks in ([], [Throughput()]):
        module = tiny.vae()
        tiny.train(tmp_path, module, tiny.digits(), callbacks=callbacks)
        trained.append(tiny.weights(module))
    tiny.assert_same(trained[1], trained[0])
