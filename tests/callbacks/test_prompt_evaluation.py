import csv
import math
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lit_generative.callbacks.ema import EMA
from lit_generative.callbacks.prompt_evaluation import PromptEvaluation, unit_features
from lit_generative.training.csv_logger import CSVLogger
from lit_generative.types import PromptOptions
from tests import processes, tiny
from tests.callbacks import prompted
from tests.callbacks.prompted import PROMPTS, Draws, subject
from tests.metrics.tiny_features import TinyFeatures


class Brightness(PromptEvaluation):
    """Mean level of the pictures; keeps them, and the step they were drawn at."""

    score_names = ("brightness",)

    def __init__(self, prompts=PROMPTS, num_samples: int = 7, **changes) -> None:
        super().__init__(prompts, num_samples, **{"batch_size": 3} | changes)
        self.pictures: list[Tensor] = []
        self.steps: list[int] = []

    def score(self, trainer, pictures):
        self.pictures.append(pictures)
        self.steps.append(trainer.global_step)
        return {"brightness": float(pictures.float().mean())}


def fit(tmp_path, *callbacks, module=None, data=None, **changes) -> L.Trainer:
    options = {"max_steps": 6, "val_check_interval": 2, "limit_val_batches": 1, "check_val_every_n_epoch": None}
    trainer = tiny.trainer(tmp_path, callbacks=list(callbacks), **options | changes)
    trainer.fit(module or Draws(), data or subject())
    return trainer


def test_it_measures_at_each_validation_and_not_in_the_sanity_check(tmp_path):
    callback = Brightness()
    trainer = fit(tmp_path, callback, num_sanity_val_steps=1)
    assert callback.steps == [2, 4, 6]
    assert float(trainer.callback_metrics["val/brightness"]) == pytest.approx(callback.scores["brightness"], rel=1e-6)


@pytest.mark.parametrize("validates", [True, False])
def test_it_measures_every_n_updates(tmp_path, validates):
    callback = Brightness(every_n_steps=4)
    fit(tmp_path, callback, max_steps=9, limit_val_batches=1 if validates else 0)
    assert callback.steps == [4, 8]


def test_accumulated_batches_are_measured_once_an_update(tmp_path):
    callback = Brightness(every_n_steps=1)
    fit(tmp_path, callback, accumulate_grad_batches=2, max_steps=3, limit_val_batches=0)
    assert callback.steps == [1, 2, 3]


def test_pictures_take_turns_with_the_prompts_and_are_asked_for_in_batches(tmp_path):
    module = Draws()
    fit(tmp_path, Brightness(guidance_scale=2.0, num_steps=5), module=module, max_steps=2)
    a, b, c = PROMPTS
    assert [prompts for prompts, _ in module.asked] == [[a, b, c], [a, b, c], [a]]
    assert {options for _, options in module.asked} == {PromptOptions(guidance_scale=2.0, num_steps=5)}


def test_pictures_depend_on_the_seed_and_their_number_alone(tmp_path):
    drawn = {}
    for name, options in (("a", {}), ("batch", {"batch_size": 7}), ("more", {"num_samples": 9}), ("seed", {"seed": 1})):
        callback = Brightness(**options)
        trainer = tiny.trainer(tmp_path)
        drawn[name] = callback.draw(trainer, Draws())
    assert drawn["a"].shape == (7, 3, 6, 5)
    assert drawn["a"].dtype == torch.uint8
    assert torch.equal(drawn["a"], drawn["batch"])
    assert torch.equal(drawn["a"], drawn["more"][:7])
    assert not torch.equal(drawn["a"], drawn["seed"])
    assert len({x.numpy().tobytes() for x in drawn["a"]}) == 7


@pytest.mark.parametrize("options", [{}, {"every_n_steps": 1}])
def test_training_with_it_ends_in_the_same_bits_as_without(tmp_path, options):
    ends = []
    for callbacks in ([], [Brightness(**options)]):
        module = Draws(careless=True)
        torch.manual_seed(0)
        fit(tmp_path, *callbacks, module=module)
        assert module.dropout.training
        ends.append((tiny.weights(module), module.rolls))
    tiny.assert_same(ends[1], ends[0])
    assert len(ends[0][1]) == 6


@pytest.mark.parametrize("options", [{}, {"every_n_steps": 2}])
@pytest.mark.parametrize("ema_first", [True, False])
def test_pictures_come_from_the_averaged_weights(tmp_path, ema_first, options):
    callback, ema, module = Brightness(**options), EMA(half_life=1e6, ramp_up=1e9), Draws()
    trainer = fit(tmp_path, *([ema, callback] if ema_first else [callback, ema]), module=module)
    averaged = tiny.weights(module) | ema.state_dict()["weights"]["ema"]
    raw = Brightness().draw(tiny.trainer(tmp_path), module)
    module.load_state_dict(averaged)
    assert torch.equal(callback.pictures[-1], Brightness().draw(tiny.trainer(tmp_path), module))
    assert not torch.equal(callback.pictures[-1], raw)
    assert trainer.global_step == 6


def test_scores_are_logged_at_their_steps(tmp_path):
    for name, options in (("validation", {}), ("steps", {"every_n_steps": 2})):
        callback = Brightness(**options)
        fit(tmp_path, callback, logger=CSVLogger(tmp_path, name=name), log_every_n_steps=100)
        rows = list(csv.DictReader((tmp_path / name / "version_0/metrics.csv").open()))
        logged = {int(row["step"]): float(row["val/brightness"]) for row in rows if row["val/brightness"]}
        assert set(logged) == {1, 3, 5}
        assert logged[5] == pytest.approx(callback.scores["brightness"], rel=1e-6)


def test_a_checkpoint_callback_can_monitor_a_score(tmp_path):
    best = ModelCheckpoint(tmp_path / "best", monitor="val/brightness", save_top_k=-1, filename="{step}")
    fit(tmp_path, Brightness(every_n_steps=4), best, max_steps=8)
    values = {Path(path).stem: float(value) for path, value in best.best_k_models.items()}
    assert {name for name, value in values.items() if math.isfinite(value)} == {"step=4", "step=8"}
    assert "step=2" in values  # unmeasured, and not filed under another score


def test_a_resumed_run_finds_the_last_score(tmp_path):
    class Finds(L.Callback):
        def on_train_batch_start(self, trainer, *_) -> None:
            self.found = self.__dict__.get("found", float(trainer.callback_metrics["val/brightness"]))

    first, second, finds = Brightness(), Brightness(), Finds()
    fit(tmp_path, first).save_checkpoint(tmp_path / "a.ckpt")
    trainer = tiny.trainer(tmp_path, callbacks=[second, finds], max_steps=8)
    trainer.fit(Draws(), subject(), ckpt_path=tmp_path / "a.ckpt")
    assert finds.found == pytest.approx(first.scores["brightness"])


def test_a_validation_alone_measures(tmp_path):
    callback = Brightness(every_n_steps=100)
    trainer = tiny.trainer(tmp_path, callbacks=[callback])
    (result,) = trainer.validate(Draws(), subject(), verbose=False)
    assert result["val/brightness"] == pytest.approx(callback.scores["brightness"], rel=1e-6)


def test_features_have_length_one_whatever_the_batch():
    pictures = torch.randint(256, (70, 3, 6, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features = unit_features(TinyFeatures(dim=4), pictures, torch.device("cpu"))
    raw = TinyFeatures(dim=4).eval()(pictures).embedding.double()
    assert features.shape == (70, 4)
    torch.testing.assert_close(features, raw / raw.norm(dim=1, keepdim=True))


def test_a_picture_that_is_not_finite_is_named(tmp_path):
    module = Draws()
    module.level.data[1] = float("nan")
    with pytest.raises(ValueError, match="Draws, process 0, image 0: NaN or infinite"):
        Brightness().measure(tiny.trainer(tmp_path), module)


def test_a_module_without_prompts_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"Brightness: VAE has no sample_prompts\(\) to draw from"):
        tiny.train(tmp_path, tiny.vae(), tiny.digits(), callbacks=[Brightness()])


def test_a_module_that_draws_texts_is_refused(tmp_path):
    module = Draws()
    module.sample_prompts = lambda prompts, options, generator: list(prompts)
    with pytest.raises(TypeError, match="Brightness: Draws draws texts, not pictures"):
        fit(tmp_path, Brightness(), module=module)


def test_a_run_that_never_measures_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"Brightness: it measures at each validation, and this run has none."):
        fit(tmp_path, Brightness(), limit_val_batches=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": []}, r"prompts must be a list with at least one text, got \[\]"),
        ({"prompts": "a dog"}, "prompts must be a list with at least one text, got 'a dog'"),
        ({"num_samples": 2}, "num_samples must be at least 1 of each prompt, got 2"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"every_n_steps": 0}, "every_n_steps must be at least 1, got 0"),
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
    ],
)
def test_a_wrong_argument_is_refused(changes, message):
    with pytest.raises(ValueError, match=f"Brightness: {message}"):
        Brightness(**changes)


@pytest.mark.slow
def test_two_processes_draw_and_score_as_one_does(tmp_path):
    processes.run(prompted.__file__, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    alone = prompted.measured(tmp_path / "alone", devices=1)
    assert torch.equal(first["before"], alone["before"])
    assert len(second["before"]) == 0
    assert second["scores"] == first["scores"]
    assert first["scores"] == pytest.approx(alone["scores"], abs=1e-3)  # the weights differ in their last bits
