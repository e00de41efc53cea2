import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping

from lit_generative.callbacks.ema import EMA
from lit_generative.callbacks.prior_drift import PriorDrift
from tests import tiny
from tests.callbacks.prompted import PROMPTS, Draws, subject
from tests.callbacks.test_prompt_evaluation import fit
from tests.data.test_resumable import SaveOn
from tests.metrics.tiny_features import TinyFeatures

EVERY_2 = {"val_check_interval": 2, "limit_val_batches": 1, "check_val_every_n_epoch": None}


def drift(**changes) -> PriorDrift:
    return PriorDrift(**{"prompts": PROMPTS, "num_samples": 7, "batch_size": 3} | changes)


def test_it_is_the_mean_difference_from_the_pictures_before_training(tmp_path):
    callback, module = drift(extractor=TinyFeatures()), Draws()
    before = drift().draw(tiny.trainer(tmp_path), module)
    trainer = fit(tmp_path, callback, module=module)
    after = drift().draw(tiny.trainer(tmp_path), module)
    expected = (after.double() / 255 - before.double() / 255).abs().mean()
    features = [TinyFeatures().eval()(x).embedding.double() for x in (before, after)]
    cosines = torch.cosine_similarity(*features)
    assert callback.scores["prior_drift"] == pytest.approx(float(expected))
    assert callback.scores["prior_drift"] > 0.05
    assert callback.scores["prior_feature_drift"] == pytest.approx(float(1 - cosines.mean()), rel=1e-5)
    for name, value in callback.scores.items():
        assert float(trainer.callback_metrics[f"val/{name}"]) == pytest.approx(value, rel=1e-6)


def test_a_value_by_hand(tmp_path):
    callback = drift()
    callback._before = torch.tensor([0, 100, 255], dtype=torch.uint8).reshape(3, 1, 1, 1)
    pictures = torch.tensor([51, 49, 255], dtype=torch.uint8).reshape(3, 1, 1, 1)
    assert callback.score(tiny.trainer(tmp_path), pictures) == {"prior_drift": pytest.approx(2 * 51 / 255 / 3)}


def test_an_unchanged_model_has_no_drift(tmp_path):
    class Still(Draws):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    callback = drift(extractor=TinyFeatures())
    fit(tmp_path, callback, module=Still())
    assert callback.scores["prior_drift"] == 0
    assert callback.scores["prior_feature_drift"] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("options", [{}, {"every_n_steps": 2}])
def test_training_can_be_stopped_at_a_drift(tmp_path, options):
    callback, module = drift(**options), Draws()
    stop = EarlyStopping("val/prior_drift", mode="max", stopping_threshold=0.1, patience=10**6)
    trainer = fit(tmp_path, callback, stop, module=module, max_steps=100)
    assert 0 < trainer.global_step < 20
    assert callback.scores["prior_drift"] > 0.1
    whole = drift()
    late = EarlyStopping("val/prior_drift", mode="max", stopping_threshold=0.99, patience=10**6)
    assert fit(tmp_path, whole, late, max_steps=20).global_step == 20
    assert 0.1 < whole.scores["prior_drift"] < 0.99


def test_what_is_found_before_and_between_measurements_stops_nothing(tmp_path):
    found = []

    class Watch(EarlyStopping):
        def on_validation_end(self, trainer, pl_module) -> None:
            found.append(float(trainer.callback_metrics[self.monitor]))
            super().on_validation_end(trainer, pl_module)

    callback = drift(every_n_steps=4)
    fit(tmp_path, callback, Watch("val/prior_drift", mode="max", stopping_threshold=0.9, patience=10**6), max_steps=8)
    assert found[0] == 0
    assert found[2] == found[1] > 0  # the last one stands
    assert len(found) == 4


def test_a_resumed_run_compares_with_the_untuned_model(tmp_path):
    first, resumed, whole = drift(), drift(), drift()
    fit(tmp_path, first, SaveOn("on_train_batch_end", 4, tmp_path / "a.ckpt"), max_steps=4)
    trainer = tiny.trainer(tmp_path, callbacks=[resumed], max_steps=8, **EVERY_2)
    trainer.fit(Draws(), subject(), ckpt_path=tmp_path / "a.ckpt")
    fit(tmp_path, whole, max_steps=8)
    assert torch.equal(resumed.state_dict()["before"], whole.state_dict()["before"])
    assert resumed.scores == pytest.approx(whole.scores)
    loaded = torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"]["PriorDrift"]
    assert (loaded["before"].shape, loaded["before"].dtype) == ((7, 3, 6, 5), torch.uint8)


def test_a_validation_alone_compares_with_what_the_checkpoint_holds(tmp_path):
    first, second = drift(), drift()
    module = Draws()
    fit(tmp_path, first, module=module).save_checkpoint(tmp_path / "a.ckpt")
    trainer = tiny.trainer(tmp_path, callbacks=[second])
    (result,) = trainer.validate(Draws(), subject(), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert result["val/prior_drift"] == pytest.approx(first.scores["prior_drift"])
    trainer = tiny.trainer(tmp_path, callbacks=[drift()])
    with pytest.warns(UserWarning, match="PriorDrift: nothing is measured, as no checkpoint was loaded"):
        assert trainer.validate(module, subject(), verbose=False) == [{}]


def test_a_model_that_was_trained_without_it_is_refused(tmp_path):
    fit(tmp_path, max_steps=2).save_checkpoint(tmp_path / "a.ckpt")
    trainer = tiny.trainer(tmp_path, callbacks=[drift()], max_steps=4, **EVERY_2)
    with pytest.raises(ValueError, match="nothing to compare with, as the model was trained for 2 updates without"):
        trainer.fit(Draws(), subject(), ckpt_path=tmp_path / "a.ckpt")


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"prompts": ["a"]}, {"num_samples": 8}, {"guidance_scale": 2.0}, {"num_steps": 3}]
)
def test_a_resume_with_other_settings_is_refused(tmp_path, change):
    fit(tmp_path, drift(), max_steps=2).save_checkpoint(tmp_path / "a.ckpt")
    trainer = tiny.trainer(tmp_path, callbacks=[drift(**change)], max_steps=4, **EVERY_2)
    (name,) = change
    with pytest.raises(ValueError, match=f"PriorDrift: the pictures in the checkpoint and those to come .* in {name} "):
        trainer.fit(Draws(), subject(), ckpt_path=tmp_path / "a.ckpt")


def test_pictures_of_another_size_are_refused(tmp_path):
    callback = drift()
    callback._before = torch.zeros(7, 3, 5, 5, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"shape of those before training, \(7, 3, 5, 5\), got \(7, 3, 6, 5\)"):
        callback.measure(tiny.trainer(tmp_path), Draws())


def test_drawing_before_training_shifts_no_random_numbers(tmp_path):
    rolls = []
    for callbacks in ([], [drift()]):
        module = Draws(careless=True)
        torch.manual_seed(0)
        fit(tmp_path, *callbacks, module=module)
        rolls.append(module.rolls)
    assert rolls[0] == rolls[1]


def test_averaged_weights_have_drifted_less(tmp_path):
    scores = []
    for callbacks in ([], [EMA(half_life=1e3, ramp_up=None)]):
        callback = drift()
        fit(tmp_path, *callbacks, callback)
        scores.append(callback.scores["prior_drift"])
    assert 0 < scores[1] < scores[0] / 2


def test_a_module_without_prompts_is_refused(tmp_path):
    with pytest.raises(TypeError, match="PriorDrift: VAE has no sample_prompts"):
        tiny.train(tmp_path, tiny.vae(), tiny.digits(), callbacks=[drift()])
