"""``litgen ema``: an average of any length from a run's snapshots."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lit_generative.__main__ import main
from lit_generative.callbacks.checkpoint import Checkpoint
from lit_generative.callbacks.ema import EMA, evaluated_weights
from lit_generative.callbacks.posthoc_ema import FOLDER, PostHocEMA
from lit_generative.loading import load_ema, load_module
from lit_generative.training.checkpoint_io import load_checkpoint
from tests import tiny
from tests.callbacks.test_ema import Evaluated


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    callbacks = [EMA(half_life=20), PostHocEMA(every_n_steps=4), Checkpoint(dirpath=str(folder / "checkpoints"))]
    tiny.train(folder, tiny.image_gan(), tiny.digits(), max_steps=12, callbacks=callbacks)
    return folder


def _ema(folder, *options: str) -> int:
    return main(["ema", "--run", str(folder), *options])


def test_it_writes_a_checkpoint_and_says_the_error_to_expect(run_folder, capsys):
    assert _ema(run_folder, "--sigma_rel", "0.08") == 0
    path = run_folder / "checkpoints/posthoc_0.080.ckpt"
    wrote, expected = capsys.readouterr().out.splitlines()
    assert wrote == f"wrote {path}"
    assert 0 < float(expected.removeprefix("expected relative error of the average's profile: ")) < 0.1
    state = load_checkpoint(path)["callbacks"]["EMA"]
    assert list(state["weights"]) == ["posthoc_0.080"]
    assert state["images"] == 72


def test_a_stored_width_gives_the_stored_average_and_a_step_the_one_of_then(run_folder, tmp_path):
    source = load_checkpoint(run_folder / "checkpoints/last.ckpt")
    assert _ema(run_folder, "--sigma_rel", "0.1", "--out", str(tmp_path / "a.ckpt")) == 0
    average = load_ema(tmp_path / "a.ckpt", "posthoc_0.100")
    tiny.assert_same(average, source["callbacks"]["PostHocEMA"]["averages"]["0.1"])
    assert any("running_mean" in key for key in average)
    assert _ema(run_folder, "--sigma_rel", "0.1", "--step", "4") == 0
    earlier = load_ema(run_folder / "checkpoints/posthoc_0.100_step_4.ckpt")
    assert not torch.equal(earlier["generator.layers.0.weight"], average["generator.layers.0.weight"])


@pytest.mark.parametrize("option", [(), ("--ema",), ("--ema_profile", "posthoc_0.080"), ("--no-ema",)])
def test_sampling_uses_the_average_in_every_way(run_folder, tmp_path, option):
    path = tmp_path / "new.ckpt"
    assert _ema(run_folder, "--sigma_rel", "0.08", "--out", str(path)) == 0
    tiny.assert_same(
        tiny.weights(load_module(path))["generator.layers.0.weight"], load_ema(path)["generator.layers.0.weight"]
    )
    out = str(tmp_path / "out")
    assert main(["sample", "--ckpt_path", str(path), "--format", "npz", "--num", "2", "--out", out, *option]) == 0
    samples = load_module(path).sample(2, generator=[torch.Generator().manual_seed(1) for _ in range(2)])
    assert np.load(tmp_path / "out/samples.npz")["images"].shape == (2, 8, 8, 1)
    assert samples.isfinite().all()


@pytest.mark.parametrize("callbacks", [[], [EMA()], [EMA(half_life={"a": 1, "b": 2}, buffers="average")]])
def test_testing_uses_the_average_whatever_callbacks_the_config_has(run_folder, tmp_path, callbacks):
    path, seen = tmp_path / "new.ckpt", Evaluated()
    assert _ema(run_folder, "--sigma_rel", "0.08", "--out", str(path)) == 0
    trainer = tiny.trainer(tmp_path, callbacks=[*callbacks, seen])
    module = tiny.image_gan(seed=9)
    trainer.test(module, tiny.digits(), ckpt_path=path, verbose=False)
    average = load_ema(path)
    tiny.assert_same({key: seen.seen[-1][key] for key in average}, average)
    if callbacks:
        assert evaluated_weights(trainer) == {"weights": "ema", "profile": "posthoc_0.080", "images": 72}


def test_training_does_not_go_on_from_it(run_folder, tmp_path):
    path = tmp_path / "new.ckpt"
    assert _ema(run_folder, "--sigma_rel", "0.08", "--out", str(path)) == 0
    with pytest.raises(KeyError, match="restore optimizer state"):
        tiny.train(tmp_path, tiny.image_gan(), tiny.digits(), max_steps=20, ckpt_path=path)


def test_a_folder_of_runs_means_the_newest_with_its_own_snapshots(tmp_path):
    for version, steps in ((0, 4), (1, 6)):
        folder = tmp_path / f"version_{version}"
        callbacks = [PostHocEMA(every_n_steps=2), Checkpoint(dirpath=str(folder / "checkpoints"))]
        tiny.train(folder, tiny.gan(seed=version), tiny.ring(), max_steps=steps, callbacks=callbacks)
    assert _ema(tmp_path, "--sigma_rel", "0.1", "--step", "6") == 0
    assert (tmp_path / "version_1/checkpoints/posthoc_0.100_step_6.ckpt").exists()
    assert len(list((tmp_path / "version_1" / FOLDER).iterdir())) == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--sigma_rel", "0.3"), "sigma_rel must lie between 0 and 0.2887"),
        (("--sigma_rel", "0.1", "--step", "13"), "averages of updates 4 to 12, got 13"),
        (("--sigma_rel", "0.1", "--out", "checkpoints/last.ckpt"), "is the run's own checkpoint"),
    ],
)
def test_what_cannot_be_made_is_one_readable_error(run_folder, monkeypatch, capsys, options, message):
    monkeypatch.chdir(run_folder)
    assert _ema(run_folder, *options) == 1
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert message in error


def test_a_run_without_the_callback_is_one_readable_error(tmp_path, capsys):
    assert _ema(tmp_path, "--sigma_rel", "0.1") == 1
    assert "There is no last.ckpt below" in capsys.readouterr().err
    tiny.train(tmp_path, tiny.gan(), tiny.ring(), callbacks=[EMA(), Checkpoint(dirpath=str(tmp_path))])
    assert _ema(tmp_path, "--sigma_rel", "0.1") == 1
    assert "the run had no PostHocEMA callback" in capsys.readouterr().err
