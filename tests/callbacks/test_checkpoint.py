import os
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import lightning as L
import pytest

from lit_generative.callbacks.checkpoint import Checkpoint
from lit_generative.training.checkpoint_io import load_checkpoint
from tests import tiny


class Saves(Checkpoint):
    """Notes the step of each save."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.steps: list[int] = []

    def _save(self, trainer) -> None:
        self.steps.append(trainer.global_step)
        super()._save(trainer)


def _steps(tmp_path, every: int, module=tiny.gan, data=tiny.ring, **kwargs) -> list[int]:
    saves = Saves(every, dirpath=str(tmp_path))
    tiny.train(tmp_path, module(), data(), callbacks=[saves], **kwargs)
    assert load_checkpoint(tmp_path / "last.ckpt")["global_step"] == saves.steps[-1]
    return saves.steps


@pytest.mark.parametrize(
    ("module", "data"), [(tiny.gan, tiny.ring), (tiny.vae, tiny.digits)], ids=["manual", "automatic"]
)
def test_it_saves_every_n_counted_updates_and_at_max_steps(tmp_path, module, data):
    assert _steps(tmp_path, 3, module, data, max_steps=7) == [3, 6, 7]


def test_the_updates_of_a_discriminator_are_not_counted(tmp_path):
    assert _steps(tmp_path, 2, lambda: tiny.gan(discriminator_steps=3), max_steps=5) == [2, 4, 5]


def test_it_saves_at_the_end_of_the_last_epoch_and_at_no_other(tmp_path):
    assert _steps(tmp_path, 100, max_epochs=3, max_steps=-1, limit_train_batches=4) == [12]


@pytest.mark.parametrize(
    ("options", "ended"),
    [
        ({"max_steps": 3}, 0),
        ({"max_steps": 4, "limit_train_batches": 4}, 0),
        ({"max_steps": -1, "max_epochs": 2, "limit_train_batches": 4}, 1),
    ],
)
def test_the_end_is_saved_while_its_epoch_still_runs_since_only_then_it_resumes_exactly(tmp_path, options, ended):
    _steps(tmp_path, 100, **options)
    epochs = load_checkpoint(tmp_path / "last.ckpt")["loops"]["fit_loop"]["epoch_progress"]["current"]
    assert (epochs["started"], epochs["processed"]) == (ended + 1, ended)


def test_a_run_ended_by_max_steps_in_the_middle_of_an_epoch_is_saved_once(tmp_path):
    assert _steps(tmp_path, 4, max_epochs=5, max_steps=8, limit_train_batches=5) == [4, 8]


def test_with_accumulated_gradients_it_saves_once_an_update_and_after_it(tmp_path):
    options = {"accumulate_grad_batches": 3, "max_steps": 3}
    assert _steps(tmp_path, 1, tiny.vae, tiny.digits, **options) == [1, 2, 3]
    assert _batch(tmp_path / "last.ckpt") == 9


def _batch(path) -> int:
    return load_checkpoint(path)["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["processed"]


def test_a_resumed_run_does_not_save_while_gradients_are_being_accumulated(tmp_path):
    saves = Saves(2, dirpath=str(tmp_path))
    options = {"accumulate_grad_batches": 3, "max_steps": 2}
    tiny.train(tmp_path, tiny.vae(), tiny.digits(), callbacks=[saves], **options)
    resumed = Saves(2, dirpath=str(tmp_path))
    last = tmp_path / "last.ckpt"
    options = {"accumulate_grad_batches": 3, "max_steps": 4}
    tiny.train(tmp_path, tiny.vae(), tiny.digits(), callbacks=[resumed], ckpt_path=last, **options)
    assert resumed.steps == [4]


@pytest.mark.parametrize(("keep_all", "expected"), [(False, []), (True, [2, 4, 5])])
def test_only_the_newest_is_kept_unless_all_are_asked_for(tmp_path, keep_all, expected):
    callback = Checkpoint(2, keep_all=keep_all, dirpath=str(tmp_path / "kept"))
    tiny.train(tmp_path, tiny.gan(), tiny.ring(), max_steps=5, callbacks=[callback])
    names = [f"step_{step:07d}.ckpt" for step in expected]
    assert sorted(os.listdir(tmp_path / "kept")) == ["last.ckpt", *names]
    for step, name in zip(expected, names, strict=True):
        assert load_checkpoint(tmp_path / "kept" / name)["global_step"] == step


def test_a_second_run_in_the_same_folder_replaces_the_first(tmp_path):
    for _ in range(2):
        tiny.train(tmp_path, tiny.gan(), tiny.ring(), callbacks=[Checkpoint(dirpath=str(tmp_path / "kept"))])
    assert os.listdir(tmp_path / "kept") == ["last.ckpt"]


def test_without_a_dirpath_it_saves_in_the_runs_folder(tmp_path):
    logger = L.pytorch.loggers.CSVLogger(tmp_path, name="runs", version="one")
    tiny.train(tmp_path, tiny.gan(), tiny.ring(), callbacks=[Checkpoint()], logger=logger)
    assert (tmp_path / "runs" / "one" / "checkpoints" / "last.ckpt").is_file()


def test_validation_and_the_ends_of_epochs_save_nothing(tmp_path):
    options = {"limit_train_batches": 4, "limit_val_batches": 1, "val_check_interval": 2, "num_sanity_val_steps": 1}
    assert _steps(tmp_path, 5, max_steps=11, **options) == [5, 10, 11]


class Stops(L.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        trainer.should_stop = trainer.global_step == 3


def test_a_run_that_is_stopped_early_is_saved(tmp_path):
    saves = Saves(100, dirpath=str(tmp_path))
    options = {"max_steps": 9, "min_epochs": 0, "callbacks": [Stops(), saves]}
    fitted = tiny.train(tmp_path, tiny.gan(), tiny.ring(), **options)
    assert fitted.global_step == 3
    assert saves.steps == [3]
    assert load_checkpoint(tmp_path / "last.ckpt")["global_step"] == 3


class StopsAtValidation(L.Callback):
    def on_validation_end(self, trainer, pl_module) -> None:
        trainer.should_stop = trainer.global_step == 4


def test_a_run_that_is_stopped_at_validation_is_saved(tmp_path):
    saves = Saves(100, dirpath=str(tmp_path))
    options = {
        "max_steps": 9,
        "limit_val_batches": 1,
        "val_check_interval": 2,
        "callbacks": [StopsAtValidation(), saves],
    }
    fitted = tiny.train(tmp_path, tiny.gan(), tiny.ring(), **options)
    assert fitted.global_step == 4
    assert saves.steps == [4]
    assert load_checkpoint(tmp_path / "last.ckpt")["global_step"] == 4


def test_a_run_that_is_stopped_early_resumes_exactly(tmp_path):
    whole = tiny.gan()
    tiny.train(tmp_path, whole, tiny.ring(), max_steps=5)
    stopped = [Stops(), Checkpoint(100, dirpath=str(tmp_path))]
    tiny.train(tmp_path, tiny.gan(), tiny.ring(), max_steps=9, callbacks=stopped)
    resumed = tiny.gan(seed=9)
    tiny.train(tmp_path, resumed, tiny.ring(), max_steps=5, ckpt_path=tmp_path / "last.ckpt")
    tiny.assert_same(tiny.weights(resumed), tiny.weights(whole))


def test_a_run_that_is_out_of_time_is_saved(tmp_path):
    callback = Checkpoint(10**9, dirpath=str(tmp_path))
    options = {"max_time": timedelta(seconds=0.2), "max_steps": -1, "max_epochs": -1}
    fitted = tiny.train(tmp_path, tiny.gan(), tiny.ring(), callbacks=[callback], **options)
    assert load_checkpoint(tmp_path / "last.ckpt")["global_step"] == fitted.global_step > 0


@pytest.mark.parametrize("steps", [0, -1])
def test_less_than_one_step_is_refused(steps):
    with pytest.raises(ValueError, match=f"Checkpoint: every_n_steps must be at least 1, got {steps}"):
        Checkpoint(steps)


def test_a_fast_dev_run_saves_nothing_and_leaves_the_signals_alone(tmp_path):
    class Look(L.Callback):
        def on_train_batch_end(self, trainer, *args) -> None:
            self.handler = signal.getsignal(signal.SIGINT)

    look, before = Look(), signal.getsignal(signal.SIGINT)
    options = {"fast_dev_run": 2, "max_steps": 2, "callbacks": [look, Checkpoint(1, dirpath=str(tmp_path / "kept"))]}
    tiny.train(tmp_path, tiny.gan(), tiny.ring(), **options)
    assert not (tmp_path / "kept").exists()
    assert look.handler == before


# signals


class Signals(L.Callback):
    """Sends this process a signal in the middle of a batch."""

    def __init__(self, number: int, at: int = 2, times: int = 1) -> None:
        self.number, self.at, self.times = number, at, times

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        if trainer.global_step == self.at and optimizer is trainer.optimizers[-1]:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)


@pytest.fixture
def handlers():
    """Those of a fresh process; whatever a test does to them is undone."""
    before = _handlers()
    fresh = [signal.default_int_handler, signal.SIG_DFL]
    _set_handlers(fresh)
    yield fresh
    _set_handlers(before)


def _handlers() -> list:
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def _set_handlers(handlers: list) -> None:
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), handlers, strict=True):
        signal.signal(number, handler)


def test_handlers_are_restored_after_fit(tmp_path, handlers):
    tiny.train(tmp_path, tiny.gan(), tiny.ring(), callbacks=[Checkpoint(dirpath=str(tmp_path))])
    assert _handlers() == handlers


class Fails(L.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        raise KeyError


def test_handlers_are_restored_after_a_fit_that_fails(tmp_path, handlers):
    with pytest.raises(KeyError):
        tiny.train(tmp_path, tiny.gan(), tiny.ring(), callbacks=[Fails(), Checkpoint(dirpath=str(tmp_path))])
    assert _handlers() == handlers


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_handlers_are_restored_after_a_signal(tmp_path, handlers, number):
    callbacks = [Signals(number), Checkpoint(dirpath=str(tmp_path))]
    with pytest.raises(SystemExit):
        tiny.train(tmp_path, tiny.gan(), tiny.ring(), max_steps=9, callbacks=callbacks)
    assert _handlers() == handlers


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_at_the_end_of_its_batch_and_exits_with_its_number(tmp_path, handlers, number, capfd):
    saves = Saves(100, dirpath=str(tmp_path))
    with pytest.raises(SystemExit) as info:
        tiny.train(tmp_path, tiny.gan(), tiny.ring(), max_steps=9, callbacks=[Signals(number), saves])
    assert info.value.code == 128 + number
    assert saves.steps == [3]
    assert _batch(tmp_path / "last.ckpt") == 3
    assert "Once more stops at once" in capfd.readouterr().err


def test_a_run_stopped_by_a_signal_resumes_exactly(tmp_path, handlers):
    whole = tiny.gan()
    tiny.train(tmp_path, whole, tiny.ring(), max_steps=5)
    callbacks = [Signals(signal.SIGTERM), Checkpoint(100, dirpath=str(tmp_path))]
    with pytest.raises(SystemExit):
        tiny.train(tmp_path, tiny.gan(), tiny.ring(), max_steps=9, callbacks=callbacks)
    resumed = tiny.gan(seed=9)
    tiny.train(tmp_path, resumed, tiny.ring(), max_steps=5, ckpt_path=tmp_path / "last.ckpt")
    tiny.assert_same(tiny.weights(resumed), tiny.weights(whole))


def test_a_signal_while_gradients_are_accumulated_saves_after_the_update(tmp_path, handlers):
    class InTheFirstOfThree(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            if batch_idx == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    callbacks = [InTheFirstOfThree(), Checkpoint(100, dirpath=str(tmp_path))]
    options = {"accumulate_grad_batches": 3, "max_steps": 9, "callbacks": callbacks}
    with pytest.raises(SystemExit):
        tiny.train(tmp_path, tiny.vae(), tiny.digits(), **options)
    assert _batch(tmp_path / "last.ckpt") % 3 == 0


def test_the_second_signal_means_now(tmp_path, handlers):
    saves = Saves(100, dirpath=str(tmp_path))
    with pytest.raises(SystemExit) as info:  # Lightning makes an exit with 1 of a KeyboardInterrupt
        tiny.train(tmp_path, tiny.gan(), tiny.ring(), max_steps=9, callbacks=[Signals(signal.SIGINT, times=2), saves])
    assert info.value.code == 1
    assert saves.steps == []


def test_the_same_callback_can_train_on_after_a_signal(tmp_path, handlers):
    saves = Saves(100, dirpath=str(tmp_path))
    with pytest.raises(SystemExit):
        tiny.train(tmp_path, tiny.gan(), tiny.ring(), max_steps=9, callbacks=[Signals(signal.SIGINT), saves])
    last = tmp_path / "last.ckpt"
    fitted = tiny.train(tmp_path, tiny.gan(), tiny.ring(), max_steps=5, callbacks=[saves], ckpt_path=last)
    assert fitted.global_step == 5


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import tiny
from lit_generative.callbacks.checkpoint import Checkpoint

class Announces(tiny.L.Callback):
    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 5:
            print("running", flush=True)

callbacks = [Announces(), Checkpoint(10**9, dirpath=sys.argv[2])]
tiny.train(sys.argv[2], tiny.gan(), tiny.ring(), max_steps=-1, max_epochs=-1, callbacks=callbacks)
"""


@pytest.mark.slow  # two processes that import everything anew
def test_a_training_process_that_is_told_to_stop_saves_and_says_so_by_its_exit_code(tmp_path):
    exits = {signal.SIGTERM: 143, signal.SIGINT: 130}
    command = [sys.executable, "-c", SCRIPT, str(Path(tiny.__file__).parent)]
    folders = {number: tmp_path / number.name for number in exits}
    processes = {
        number: subprocess.Popen([*command, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for number, folder in folders.items()
    }
    try:
        for number, process in processes.items():
            assert process.stdout.readline() == "running\n"
            process.send_signal(number)
            _, errors = process.communicate(timeout=60)
            assert process.returncode == exits[number]
            assert f"Stopped by {number.name} at step" in errors
            assert "Traceback" not in errors
            assert load_checkpoint(folders[number] / "last.ckpt")["global_step"] >= 5
    finally:
        for process in processes.values():
            process.kill()
