"""What :class:`EMA` does with several averages, decays, buffers and devices. Its core is in ``test_ema.py``."""

import functools

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_generative.callbacks.checkpoint import Checkpoint
from lit_generative.callbacks.ema import EMA, averaged_weights, evaluated_weights
from lit_generative.training.averages import ema_record, ema_state
from lit_generative.training.checkpoint_io import load_checkpoint
from tests import tiny
from tests.callbacks.test_ema import Evaluated, History, _by_hand, _gan, _vae

TWO = {"fast": 10, "slow": 100}


def _stored(ema: EMA, profile: str = "ema") -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in ema.state_dict()["weights"][profile].items()}


def test_each_profile_has_its_own_half_life(tmp_path):
    ema, history = EMA(half_life=TWO, ramp_up=None), History()
    tiny.train(tmp_path, _gan(), tiny.ring(), max_steps=4, callbacks=[ema, history])
    for profile, half_life in TWO.items():
        torch.testing.assert_close(_stored(ema, profile), _by_hand(history, ["generator"], [6] * 4, half_life, 1e9))


def test_a_decay_counts_updates_as_papers_do(tmp_path):
    ema, history = EMA(decay={"a": 0.9, "b": 0.5}, ramp_up=None), History()
    tiny.train(tmp_path, _gan(), tiny.ring(), max_steps=4, callbacks=[ema, history])
    for profile, decay in (("a", 0.9), ("b", 0.5)):
        average = {k: v.double() for k, v in history.before.items() if k.startswith("generator")}
        for _, live in history.after:
            average = {k: decay * v + (1 - decay) * live[k].double() for k, v in average.items()}
        torch.testing.assert_close(_stored(ema, profile), {k: v.float() for k, v in average.items()})


def test_the_ramp_up_shortens_a_decay_early_too(tmp_path):
    ema, history = EMA(decay=0.5 ** (6 / 8), ramp_up=0.5), History()
    tiny.train(tmp_path, _gan(), tiny.ring(), max_steps=4, callbacks=[ema, history])
    # half-lives 3, 6, 8, 8 images
    torch.testing.assert_close(_stored(ema), _by_hand(history, ["generator"], [6] * 4, 8, 0.5))


def test_floating_buffers_are_averaged_if_asked_and_counters_are_not(tmp_path):
    ema, history, seen, module = EMA(half_life=20, buffers="average"), History(), Evaluated(), tiny.image_gan()
    fitted = tiny.train(tmp_path, module, tiny.digits(), callbacks=[ema, history, seen], limit_val_batches=1)
    live, expected = tiny.weights(module), _by_hand(history, ["generator"], [6] * 3, 20, 0.05)
    average = _stored(ema)
    names = [key for key in average if "running" in key]
    assert names
    assert not any("num_batches" in key for key in average)
    torch.testing.assert_close(average, {key: expected[key] for key in average})
    fitted.validate(module, tiny.digits(), verbose=False)
    tiny.assert_same(seen.seen[-1], live | average)
    tiny.assert_same(tiny.weights(module), live)


def test_averages_may_be_kept_in_main_memory(tmp_path):
    """The device is the same in a test; the path of another one is taken, and must give the same numbers."""
    results = []
    for device in ("same", "cpu"):
        ema, module = EMA(half_life=20, device=device), _gan()
        tiny.train(tmp_path, module, tiny.ring(), callbacks=[ema])
        assert {value.device.type for value in _stored(ema).values()} == {"cpu"}
        results.append(_stored(ema))
    tiny.assert_same(*results)


# which one is evaluated


@pytest.mark.parametrize(("evaluate", "expected"), [("first", "fast"), ("slow", "slow"), (None, None)])
def test_evaluation_uses_the_profile_it_is_told(tmp_path, evaluate, expected):
    ema, seen, module = EMA(half_life=TWO, ramp_up=None, evaluate=evaluate), Evaluated(), _vae()
    fitted = tiny.train(tmp_path, module, tiny.digits(), callbacks=[ema, seen], limit_val_batches=1)
    live = tiny.weights(module)
    weights = live if expected is None else live | _stored(ema, expected)
    for run in (fitted.validate, fitted.test):
        run(module, tiny.digits(), verbose=False)
        tiny.assert_same(seen.seen[-1], weights)
    with averaged_weights(fitted):
        tiny.assert_same(tiny.weights(module), weights)
    tiny.assert_same(tiny.weights(module), live)


def test_every_profile_and_the_raw_weights_can_be_borrowed_within_one_another(tmp_path):
    ema, module = EMA(half_life=TWO, ramp_up=None), _gan()
    fitted = tiny.train(tmp_path, module, tiny.ring(), callbacks=[ema])
    live = tiny.weights(module)
    wanted = {name: live | _stored(ema, name) for name in TWO} | {"raw": live}
    for outer in wanted:
        with averaged_weights(fitted, outer):
            for inner in wanted:
                with averaged_weights(fitted, inner):
                    tiny.assert_same(tiny.weights(module), wanted[inner])
                tiny.assert_same(tiny.weights(module), wanted[outer])
        tiny.assert_same(tiny.weights(module), live)


def test_an_unknown_profile_is_refused_with_those_there_are(tmp_path):
    fitted = tiny.train(tmp_path, _gan(), tiny.ring(), callbacks=[EMA(half_life=TWO, ramp_up=None)])
    with pytest.raises(ValueError, match=r"EMA: there is no profile 'ema'. There are: \['fast', 'slow'\]"):
        averaged_weights(fitted, "ema").__enter__()
    with pytest.raises(ValueError, match=r"EMA: evaluate='ema' is none of the profiles \['fast', 'slow'\]"):
        tiny.train(tmp_path, _gan(), tiny.ring(), callbacks=[EMA(half_life=TWO, ramp_up=None, evaluate="ema")])


@pytest.mark.parametrize(
    ("ema", "expected"),
    [
        (EMA(half_life=20), {"weights": "ema", "profile": "ema", "half_life": 20, "images": 18}),
        (EMA(), {"weights": "ema", "profile": "ema", "half_life": 20_000, "images": 18}),
        (EMA(decay={"a": 0.9, "b": 0.5}, evaluate="b"), {"weights": "ema", "profile": "b", "decay": 0.5, "images": 18}),
        (EMA(evaluate=None), {"weights": "raw"}),
    ],
)
def test_which_weights_are_evaluated_is_told_as_plain_data(tmp_path, ema, expected):
    untrained = tiny.trainer(tmp_path, callbacks=[ema])
    assert evaluated_weights(untrained) == {"weights": "raw"}
    assert evaluated_weights(tiny.train(tmp_path, _gan(), tiny.ring(), callbacks=[ema])) == expected
    assert evaluated_weights(tiny.trainer(tmp_path)) == {"weights": "raw"}


# checkpoints


def _saved(tmp_path, *callbacks):
    tiny.train(tmp_path, _vae(), tiny.digits(), callbacks=[*callbacks, Checkpoint(dirpath=str(tmp_path))])
    return tmp_path / "last.ckpt"


def test_a_profile_that_the_checkpoint_lacks_starts_from_the_weights_and_this_is_said(tmp_path, caplog):
    path = _saved(tmp_path, EMA(half_life=20))
    saved, ema, history = load_checkpoint(path), EMA(half_life={"new": 30, "ema": 20}, ramp_up=None), History()
    with caplog.at_level("INFO"):
        tiny.train(tmp_path, _vae(), tiny.digits(), max_steps=4, callbacks=[ema, history], ckpt_path=path)
    assert "the checkpoint has the averages ['ema'], the config ['new', 'ema']" in caplog.text
    assert set(ema.state_dict()["weights"]) == {"new", "ema"}
    expected = _by_hand(history, ["encoder", "decoder"], [6], 30, 1e9)
    torch.testing.assert_close(_stored(ema, "new"), expected)
    assert not torch.equal(*(weights["encoder.layers.0.weight"] for weights in (_stored(ema), ema_state(saved))))


@pytest.mark.parametrize(
    "config", [EMA(half_life={"other": 5}), EMA(decay=0.5, modules=["decoder"], buffers="average")]
)
def test_evaluating_a_checkpoint_uses_the_averages_in_it_whatever_the_config_has(tmp_path, config):
    path, seen = _saved(tmp_path, EMA(half_life=TWO, ramp_up=None)), Evaluated()
    trainer = tiny.trainer(tmp_path, callbacks=[config, seen])
    trainer.test(_vae(seed=9), tiny.digits(), ckpt_path=path, verbose=False)
    checkpoint = load_checkpoint(path)
    tiny.assert_same(seen.seen[-1], dict(checkpoint["state_dict"]) | ema_state(checkpoint, "fast"))
    told = evaluated_weights(trainer)
    assert (told["weights"], told["profile"], told["images"]) == ("ema", "fast", 18)


def test_evaluating_a_profile_that_the_checkpoint_lacks_is_refused(tmp_path):
    path = _saved(tmp_path, EMA(half_life=20))
    trainer = tiny.trainer(tmp_path, callbacks=[EMA(half_life=TWO, ramp_up=None, evaluate="slow")])
    with pytest.raises(ValueError, match=r"EMA: there is no profile 'slow'. There are: \['ema'\]"):
        trainer.test(_vae(), tiny.digits(), ckpt_path=path, verbose=False)


def test_an_old_checkpoint_is_read(tmp_path):
    checkpoint = load_checkpoint(_saved(tmp_path, EMA(half_life=20)))
    state = checkpoint["callbacks"]["EMA"]
    assert state.pop("settings") == {"ema": {"half_life": 20}}  # files of the first version do not have it
    assert set(state["weights"]) == {"ema"}
    assert state["images"] == 18
    assert ema_record(checkpoint) == {"weights": "ema", "profile": "ema", "images": 18}
    ema = EMA(half_life=20)
    ema.load_state_dict(state)
    tiny.assert_same(ema.state_dict()["weights"]["ema"], ema_state(checkpoint))


def test_an_average_is_chosen_by_name(tmp_path):
    checkpoint = load_checkpoint(_saved(tmp_path, EMA(half_life=TWO, ramp_up=None)))
    saved = checkpoint["callbacks"]["EMA"]["weights"]
    tiny.assert_same(ema_state(checkpoint, "slow"), saved["slow"])
    tiny.assert_same(ema_state(checkpoint), saved["fast"])
    with pytest.raises(ValueError, match=r"has no average 'ema'. It has: \['fast', 'slow'\]"):
        ema_state(checkpoint, "ema")


def test_checkpoints_of_weights_only_are_refused(tmp_path):
    callbacks = [EMA(), ModelCheckpoint(dirpath=tmp_path, save_weights_only=True)]
    with pytest.raises(ValueError, match="EMA: a checkpoint callback has save_weights_only=True, and its files would"):
        tiny.train(tmp_path, _gan(), tiny.ring(), callbacks=callbacks)


def test_saving_while_the_module_holds_the_average_is_refused(tmp_path):
    fitted = tiny.train(tmp_path, _gan(), tiny.ring(), callbacks=[EMA(), Checkpoint(dirpath=str(tmp_path))])
    with averaged_weights(fitted), pytest.raises(RuntimeError, match="the module holds averaged weights now"):
        fitted.save_checkpoint(tmp_path / "wrong.ckpt")


def test_the_average_can_be_borrowed_before_the_first_batch_of_a_resumed_run(tmp_path):
    path = _saved(tmp_path, EMA(half_life=20))
    expected = ema_state(load_checkpoint(path))

    class Early(tiny.L.Callback):
        def on_fit_start(self, trainer, pl_module) -> None:
            with averaged_weights(trainer):
                tiny.assert_same({key: tiny.weights(pl_module)[key] for key in expected}, expected)

    tiny.train(
        tmp_path, _vae(seed=9), tiny.digits(), max_steps=4, callbacks=[Early(), EMA(half_life=20)], ckpt_path=path
    )


def test_an_update_writes_into_the_same_tensors():
    """One call a profile; lists made anew at each step would cost as much as a small update."""
    ema, module = EMA(half_life=TWO, ramp_up=None), _gan()
    trainer = tiny.L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    ema.setup(trainer, module, "fit")
    ema.on_train_start(trainer, module)
    before = [value for average in ema._lists.values() for value in average]
    calls = []
    lerp = functools.partial(torch._foreach_lerp_)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "_foreach_lerp_", lambda *args: (calls.append(args), lerp(*args)))
        ema.on_before_optimizer_step(trainer, module, module.configure_optimizers()[0]["optimizer"])
        ema.on_train_batch_end(trainer, module, None, torch.zeros(5, 2), 0)
    assert len(calls) == 2
    assert calls[0][1] is calls[1][1]
    assert all(a is b for a, b in zip(before, [v for c in calls for v in c[0]], strict=True))


def test_an_average_that_was_never_updated_is_not_evaluated():
    ema, module = EMA(), _gan()
    trainer = tiny.L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[ema])
    ema.setup(trainer, module, "fit")
    ema.on_train_start(trainer, module)
    assert evaluated_weights(trainer) == {"weights": "raw"}
    assert ema.state_dict()["weights"] == {}
    assert ema.state_dict()["images"] == 0


def test_an_average_may_be_updated_every_few_steps_and_counts_all_their_images(tmp_path):
    ema, module = EMA(half_life=30.0, ramp_up=None, every_n_steps=3), tiny.vae()
    expected = module.decoder.layers[0].weight.detach().clone()

    class ByHand(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args) -> None:
            if trainer.global_step % 3 == 0:
                expected.lerp_(pl_module.decoder.layers[0].weight.detach(), 1 - 0.5 ** (18 / 30))

    tiny.train(tmp_path, module, tiny.digits(batch_size=6), max_steps=7, callbacks=[ema, ByHand()])
    assert ema.images == 2 * 18
    assert ema.state_dict()["pending"] == 6
    torch.testing.assert_close(ema.state_dict()["weights"]["ema"]["decoder.layers.0.weight"], expected)


def test_a_decay_is_that_of_each_step_however_often_it_is_applied():
    assert EMA(decay=0.9, ramp_up=None, every_n_steps=3)._share(0.9) == pytest.approx(1 - 0.9**3)


@pytest.mark.parametrize("stop", [4, 6])
def test_a_resume_between_two_updates_of_the_average_is_exact(tmp_path, stop):
    def train(folder, steps, ckpt_path=None):
        ema = EMA(half_life=30.0, ramp_up=0.5, every_n_steps=3)
        options = {"max_steps": steps, "callbacks": [ema, Checkpoint(100, dirpath=str(folder))], "ckpt_path": ckpt_path}
        tiny.train(folder, tiny.vae(), tiny.digits(batch_size=6), **options)
        return ema

    whole = train(tmp_path / "whole", 9)
    train(tmp_path / "stopped", stop)
    resumed = train(tmp_path / "stopped", 9, tmp_path / "stopped" / "last.ckpt")
    assert resumed.images == whole.images
    tiny.assert_same(resumed.state_dict()["weights"]["ema"], whole.state_dict()["weights"]["ema"])


def test_updates_of_the_average_below_one_are_refused():
    with pytest.raises(ValueError, match="every_n_steps must be at least 1, got 0"):
        EMA(every_n_steps=0)
