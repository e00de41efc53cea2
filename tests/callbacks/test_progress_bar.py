import re

import pytest
from lightning.pytorch.callbacks import Callback

from lit_generative.callbacks.progress_bar import RunProgressBar
from tests.families import build, digits, trainer


def run(tmp_path, family: str = "gan", **changes):
    bar = RunProgressBar(seconds=0.0)
    bar.seconds = 0.0
    t = trainer(
        tmp_path,
        callbacks=[bar],
        enable_progress_bar=True,
        enable_checkpointing=False,
        log_every_n_steps=1,
        **{"max_steps": 7} | changes,
    )
    module = build(family)
    t.fit(module, digits())
    return t, module


def test_it_counts_updates_to_the_end_of_the_run_over_all_epochs(tmp_path, capsys):
    run(tmp_path)
    shown = capsys.readouterr().err
    assert "training: 100%" in shown
    assert "7/7" in shown


def test_epochs_are_counted_in_updates_too(tmp_path, capsys):
    run(tmp_path, max_steps=-1, max_epochs=2)
    assert "10/10" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("family", "losses"),
    [("gan", ["generator_loss", "discriminator_loss"]), ("vae", ["loss", "reconstruction", "kl"]), ("ddpm", ["loss"])],
)
def test_it_shows_the_losses_that_matter(tmp_path, capsys, family, losses):
    run(tmp_path, family)
    last = capsys.readouterr().err.rpartition("training: 100%")[2]
    assert sorted(re.findall(r"(\w+)=", last)) == sorted(losses)


def test_test_and_predict_have_bars_of_their_own(tmp_path, capsys):
    t, module = run(tmp_path, "vae")
    capsys.readouterr()
    t.test(module, digits())
    t.predict(module, digits(num_predict_samples=3), return_predictions=False)
    shown = capsys.readouterr().err
    assert "testing: 100%" in shown
    assert "sampling: 100%" in shown


def test_a_disabled_bar_shows_nothing(tmp_path, capsys):
    bar = RunProgressBar()
    bar.disable()
    trainer(tmp_path, callbacks=[bar], enable_progress_bar=True, enable_checkpointing=False, max_steps=2).fit(
        build("vae"), digits()
    )
    assert "training" not in capsys.readouterr().err
    bar.enable()
    assert bar._enabled


class Breaks(Callback):
    def on_train_batch_end(self, *args):
        raise RuntimeError("broken")


def test_the_bar_is_closed_after_an_error(tmp_path):
    bar = RunProgressBar()
    t = trainer(tmp_path, callbacks=[bar, Breaks()], enable_progress_bar=True, enable_checkpointing=False)
    with pytest.raises(RuntimeError, match="broken"):
        t.fit(build("vae"), digits())
    assert bar._bar is None
