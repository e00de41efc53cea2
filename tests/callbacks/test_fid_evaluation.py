import csv
import functools
import json
import math
import warnings

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ReduceLROnPlateau

from lit_generative.callbacks.ema import EMA
from lit_generative.callbacks.fid_evaluation import FIDEvaluation, default_measures
from lit_generative.data.mixtures import RingMixture
from lit_generative.diffusion.conditions import SuperResolution
from lit_generative.metrics.frechet import Frechet
from lit_generative.metrics.kernel import Kernel
from lit_generative.metrics.mode_coverage import ModeCoverage
from lit_generative.metrics.record import check_comparable
from lit_generative.networks.diffusers_unet import DiffusersUNet
from lit_generative.training.csv_logger import CSVLogger
from tests import families, tiny
from tests.metrics.tiny_features import TinyFeatures

EVERY_3 = {"val_check_interval": 3, "check_val_every_n_epoch": None}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LITGEN_CACHE", str(tmp_path / "cache"))


def evaluation(**changes) -> FIDEvaluation:
    return FIDEvaluation(**{"extractor": TinyFeatures(), "num_samples": 40, "batch_size": 16} | changes)


def fit(tmp_path, *callbacks, family: str = "vae", module=None, data=None, **changes) -> L.Trainer:
    options = {"max_steps": 6, "val_check_interval": 3, "num_sanity_val_steps": 1} | changes
    if isinstance(options["val_check_interval"], int):
        options["check_val_every_n_epoch"] = None
    trainer = families.trainer(tmp_path, callbacks=list(callbacks), **options)
    trainer.fit(module or families.build(family), data or families.digits())
    return trainer


class Steps(L.Callback):
    """Notes at which steps an evaluation found new scores."""

    def __init__(self, watched: FIDEvaluation) -> None:
        self.watched, self.steps, self.values = watched, [], []
        original = watched.evaluate

        def evaluate(trainer, pl_module, stage):
            scores = original(trainer, pl_module, stage)
            self.steps.append(trainer.global_step)
            self.values.append(scores)
            return scores

        watched.evaluate = evaluate


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_validation_gives_all_scores(tmp_path, family):
    callback = evaluation()
    steps = Steps(callback)
    trainer = fit(tmp_path, callback, family=family)
    assert steps.steps == [3, 6]  # and not in the sanity check
    names = {
        "fd_tiny",
        "kid",
        "kid_se",
        "is",
        "is_std",
        "precision",
        "recall",
        "density",
        "coverage",
        "modes",
        "mode_kl",
    }
    assert set(callback.scores) == {f"val/{name}" for name in names}
    for name, value in callback.scores.items():
        assert float(trainer.callback_metrics[name]) == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"every_n_steps": 2}, [2, 4, 6, 8, 10]),
        ({"every_n_epochs": 2}, [10]),
        ({}, [5, 10]),
    ],
)
def test_it_evaluates_when_it_is_told_to(tmp_path, options, expected):
    callback = evaluation(**options)
    steps = Steps(callback)
    fit(tmp_path, callback, max_steps=-1, max_epochs=2, val_check_interval=1.0)
    assert steps.steps == expected


@pytest.mark.parametrize(("options", "expected"), [({"every_n_steps": 4}, [4, 8]), ({"every_n_epochs": 1}, [5, 10])])
def test_without_validation_it_evaluates_by_steps_and_epochs(tmp_path, options, expected):
    callback = evaluation(**options)
    steps = Steps(callback)
    fit(tmp_path, callback, max_steps=-1, max_epochs=2, val_check_interval=1.0, limit_val_batches=0)
    assert steps.steps == expected


def test_accumulated_batches_are_evaluated_once_an_update(tmp_path):
    callback = evaluation(every_n_steps=1)
    steps = Steps(callback)
    fit(tmp_path, callback, accumulate_grad_batches=2, max_steps=3, limit_val_batches=0, val_check_interval=1.0)
    assert steps.steps == [1, 2, 3]


@pytest.mark.parametrize("family", families.FAMILIES)
@pytest.mark.parametrize("options", [{}, {"every_n_steps": 2}])
def test_training_with_it_ends_in_the_same_bits_as_without(tmp_path, family, options):
    weights = []
    for callbacks in ([EMA(half_life=1000, ramp_up=10)], [EMA(half_life=1000, ramp_up=10), evaluation(**options)]):
        module = families.build(family)
        fit(tmp_path, *callbacks, module=module)
        weights.append(module.state_dict())
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


def test_the_batch_size_does_not_change_a_score(tmp_path):
    scores = []
    for batch_size in (7, 40):
        callback = evaluation(batch_size=batch_size)
        fit(tmp_path, callback)
        scores.append(callback.scores)
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)


def test_the_seed_is_the_seed_of_the_samples(tmp_path):
    scores = []
    for seed in (0, 0, 1):
        callback = evaluation(seed=seed)
        fit(tmp_path, callback)
        scores.append(callback.scores["val/fd_tiny"])
    assert scores[0] == scores[1] != scores[2]


@pytest.mark.parametrize("ema_first", [True, False])
def test_the_average_is_scored_whatever_the_order_of_callbacks(tmp_path, ema_first):
    callback, ema = evaluation(), EMA(half_life=1000, ramp_up=10)
    module = families.build("vae")
    fit(tmp_path, *([ema, callback] if ema_first else [callback, ema]), module=module, max_steps=3)
    assert callback.record["subject"]["weights"] == "ema"
    assert callback.record["subject"]["half_life"] == 1000
    scored = callback.scores
    trainer = families.trainer(tmp_path, callbacks=[])
    trainer.datamodule = families.digits()
    trainer.datamodule.setup()
    raw = evaluation().evaluate(trainer, module, "val")
    module.load_state_dict({**module.state_dict(), **ema.state_dict()["weights"]["ema"]})
    averaged = evaluation().evaluate(trainer, module, "val")
    assert scored["val/fd_tiny"] == pytest.approx(averaged["val/fd_tiny"], rel=1e-9)
    assert scored["val/fd_tiny"] != pytest.approx(raw["val/fd_tiny"], rel=1e-3)


def test_the_record_says_all_that_a_score_depends_on(tmp_path):
    callback = evaluation(measures=[Frechet(), Kernel(max_samples=30)], seed=5)
    fit(tmp_path, callback, family="ddpm", max_steps=3)
    record = json.loads(json.dumps(callback.record))  # plain data
    assert record["name"] == "Frechet distance (tiny features)"
    assert record["extractor"] == "tiny"
    assert len(record["extractor_sha256"]) == 64
    assert record["measures"] == {"Frechet": {}, "Kernel": {"max_samples": 30}}
    assert record["reference"]["split"] == "train"
    assert record["reference"]["count"] == 1455
    assert record["num_samples"] == 40
    assert record["seed"] == 5
    subject = record["subject"]
    assert subject["weights"] == "raw"
    assert subject["step"] == 3
    assert subject["sampler"]["class_path"].endswith("DDPMSampler")
    assert subject["sampler"]["init_args"]["num_steps"] == 4


def test_scores_and_record_are_logged(tmp_path):
    logger = CSVLogger(tmp_path, name="run")
    fit(tmp_path, evaluation(every_n_steps=2), logger=logger, log_every_n_steps=100, limit_val_batches=0)
    rows = list(csv.DictReader((tmp_path / "run/version_0/metrics.csv").open()))
    assert [int(row["step"]) for row in rows if row["val/fd_tiny"]] == [1, 3, 5]
    lines = [json.loads(line) for line in (tmp_path / "run/version_0/records.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    assert "extractor_sha256" in json.dumps(lines[0])


def test_a_checkpoint_callback_keeps_the_best_score(tmp_path):
    callback = evaluation()
    best = ModelCheckpoint(tmp_path / "best", monitor="val/fd_tiny", save_top_k=1, filename="{step}")
    steps = Steps(callback)
    fit(tmp_path, callback, best, max_steps=9)
    lowest = min(steps.values, key=lambda scores: scores["val/fd_tiny"])["val/fd_tiny"]
    assert float(best.best_model_score) == pytest.approx(lowest, rel=1e-6)


def test_weights_are_never_filed_under_an_earlier_epochs_score(tmp_path):
    callback = evaluation(every_n_epochs=2)
    best = ModelCheckpoint(tmp_path / "best", monitor="val/fd_tiny", save_top_k=-1, filename="{epoch}")
    fit(tmp_path, callback, best, max_steps=-1, max_epochs=4, val_check_interval=1.0)
    values = {path.rpartition("/")[2]: float(value) for path, value in best.best_k_models.items()}
    assert {name for name, value in values.items() if math.isfinite(value)} == {"epoch=1.ckpt", "epoch=3.ckpt"}


@pytest.mark.parametrize("options", [{}, {"every_n_steps": 3}])
def test_a_plateau_schedule_follows_the_score(tmp_path, options):
    # No score is 99 % better than the best, so each evaluation but the first halves the rate.
    schedule = functools.partial(ReduceLROnPlateau, monitor="val/fd_tiny", factor=0.5, patience=0, threshold=0.99)
    module = families.build("gan", generator_scheduler=schedule, discriminator_scheduler=None)
    trainer = fit(tmp_path, evaluation(**options), module=module, max_steps=9)
    rates = {group["name"]: group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups}
    assert rates == {"generator": 1e-3 / 4, "discriminator": 1e-3}


class Monitored(L.Callback):
    """Notes what a checkpoint or a schedule would find at each validation."""

    def __init__(self) -> None:
        self.found = []

    def on_validation_end(self, trainer, pl_module) -> None:
        if not trainer.sanity_checking:
            self.found.append(math.isfinite(trainer.callback_metrics["val/fd_tiny"]))


def test_a_score_is_found_at_the_validation_of_its_own_step_alone(tmp_path):
    noted = Monitored()
    fit(tmp_path, evaluation(every_n_steps=4), noted, max_steps=8, val_check_interval=2)
    assert noted.found == [False, True, False, True]


@pytest.mark.parametrize("family", ["gan", "vae"])
def test_a_plateau_counts_the_scores_and_not_the_validations(tmp_path, family):
    # Patience 1, evaluations at 4, 8, 12 and 16, none better: lowered at the third, and the fourth starts anew.
    schedule = functools.partial(ReduceLROnPlateau, monitor="val/fd_tiny", factor=0.5, patience=1, threshold=0.99)
    gan = {"generator_scheduler": schedule, "discriminator_scheduler": None}
    module = families.build(family, **(gan if family == "gan" else {"scheduler": schedule}))
    trainer = fit(tmp_path, evaluation(every_n_steps=4), module=module, max_steps=16, val_check_interval=2)
    assert min(group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups) == 1e-3 / 2


def test_validate_and_test_evaluate(tmp_path):
    callback = evaluation(every_n_steps=100, measures=[Frechet()])
    trainer = families.trainer(tmp_path, callbacks=[callback])
    module, data = families.build("vae"), families.digits()
    assert trainer.validate(module, data, verbose=False)[0]["val/fd_tiny"] == pytest.approx(
        callback.scores["val/fd_tiny"], rel=1e-6
    )
    assert "test/fd_tiny" in trainer.test(module, data, verbose=False)[0]


def test_the_record_of_a_checkpoint_says_how_old_it_is(tmp_path):
    fit(tmp_path, evaluation(), max_steps=6).save_checkpoint(tmp_path / "a.ckpt")
    callback = evaluation()
    trainer = families.trainer(tmp_path, callbacks=[callback])
    trainer.validate(families.build("vae"), families.digits(), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert callback.record["subject"]["step"] == 6


def super_resolution():
    network = DiffusersUNet(8, 1, widths=(8,), layers_per_block=1, extra_channels=1)
    return families.build("ddpm", network=network, condition=SuperResolution(2))


def test_a_model_that_draws_from_images_is_shown_those_of_the_stage(tmp_path):
    callback, data, module = evaluation(), families.digits(), super_resolution()
    fit(tmp_path, callback, module=module, data=data, max_steps=3).save_checkpoint(tmp_path / "saved.ckpt")
    assert callback.scores["val/fd_tiny"] > 0
    record = callback.record
    assert (record["shown"]["split"], record["reference"]["split"]) == ("val", "train")
    callback = evaluation()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not comparable")
        trainer = families.trainer(tmp_path, callbacks=[callback])
        trainer.test(module, data, ckpt_path=str(tmp_path / "saved.ckpt"), verbose=False)
    assert callback.record["shown"]["split"] == "test"
    with pytest.raises(ValueError, match="they differ in shown: "):
        check_comparable(record, callback.record)


def test_a_model_that_draws_from_images_needs_validation_data_before_training(tmp_path):
    with pytest.raises(ValueError, match="split 'val' is empty"):
        fit(
            tmp_path,
            evaluation(every_n_steps=3),
            module=super_resolution(),
            data=families.digits(val_fraction=0.0),
            val_check_interval=None,
            max_steps=2,
        )


def test_the_split_is_the_one_compared_with(tmp_path):
    references = {}
    for split in ("train", "val", "test"):
        callback = evaluation(split=split)
        fit(tmp_path, callback, max_steps=3)
        references[split] = (callback.record["reference"]["count"], callback.scores["val/fd_tiny"])
    assert [count for count, _ in references.values()] == [1455, 162, 180]
    assert len({score for _, score in references.values()}) == 3


def test_real_features_are_computed_once_and_then_read(tmp_path, monkeypatch):
    counts = []
    forward = TinyFeatures.forward

    def counting(self, images):
        counts.append(len(images))
        return forward(self, images)

    monkeypatch.setattr(TinyFeatures, "forward", counting)
    scores = []
    for _ in range(2):
        callback = evaluation()
        fit(tmp_path, callback)
        scores.append(callback.scores)
        counts.append("run")
    first, second = counts[: counts.index("run")], counts[counts.index("run") + 1 : -1]
    assert sum(first) == 1455 + 40 + 40
    assert sum(second) == 40 + 40
    assert scores[0] == scores[1]


def test_the_extractor_is_not_in_the_checkpoint_nor_on_the_device_afterwards(tmp_path):
    trainer = fit(tmp_path, evaluation())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert not [name for name in checkpoint["state_dict"] if "extractor" in name or name == "weight"]
    assert set(checkpoint["callbacks"]["FIDEvaluation"]) == {"scores", "record"}


def test_a_resume_that_measures_otherwise_says_so(tmp_path):
    trainer = fit(tmp_path, evaluation(), max_steps=3)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    changed = families.trainer(tmp_path, callbacks=[evaluation(num_samples=50)], max_steps=6, **EVERY_3)
    with pytest.warns(UserWarning, match=r"not comparable .* num_samples: 40 and 50"):
        changed.fit(families.build("vae"), families.digits(), ckpt_path=tmp_path / "a.ckpt")
    same = families.trainer(tmp_path, callbacks=[evaluation()], max_steps=6, **EVERY_3)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not comparable.*")
        same.fit(families.build("vae"), families.digits(), ckpt_path=tmp_path / "a.ckpt")


def test_records_of_unlike_scores_are_refused(tmp_path):
    records = []
    for callback in (evaluation(), evaluation(), evaluation(extractor=TinyFeatures(seed=1))):
        fit(tmp_path, callback, max_steps=3)
        records.append(callback.record)
    check_comparable(records[0], records[1])
    with pytest.raises(ValueError, match="extractor_sha256"):
        check_comparable(records[0], records[2])


def test_too_few_samples_are_said_with_the_bias(tmp_path):
    with pytest.warns(UserWarning, match=r"40 images are not more than the 64 dimensions .* would score about \d"):
        fit(tmp_path, evaluation(extractor=TinyFeatures(dim=64)), max_steps=3)


def test_a_sample_that_is_not_finite_is_named(tmp_path):
    module = families.build("vae")
    original = module.sample

    def broken(num, label=None, generator=None):
        x = original(num, label, generator)
        x[2] = float("nan")
        return x

    module.sample = broken
    with pytest.raises(ValueError, match="VAE, process 0, image 2: NaN or infinite"):
        fit(tmp_path, evaluation(), module=module)


def test_a_sample_out_of_range_is_said(tmp_path):
    module = families.build("vae")
    original = module.sample
    module.sample = lambda num, label=None, generator=None: original(num, label, generator) + 3
    with pytest.warns(UserWarning, match=r"VAE, process 0, image 0: values from .* are clamped to \[-1, 1\]"):
        fit(tmp_path, evaluation(), module=module, max_steps=3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_samples": 1}, "num_samples must be at least 2, got 1"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"every_n_steps": 0}, "every_n_steps must be at least 1, got 0"),
        ({"every_n_epochs": 0}, "every_n_epochs must be at least 1, got 0"),
        ({"every_n_steps": 1, "every_n_epochs": 1}, "both set"),
        ({"measures": []}, "needs at least one"),
        ({"measures": [Kernel(), Kernel(50)]}, "two of them give 'kid'"),
    ],
)
def test_a_wrong_number_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        evaluation(**changes)


def test_a_run_without_validation_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"this run has none. Set every_n_steps"):
        fit(tmp_path, evaluation(), limit_val_batches=0)


def test_an_empty_split_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="split 'test' is empty"):
        fit(tmp_path, evaluation(split="test"), data=families.digits(test_fraction=0.0))


def test_points_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"need images \(N, C, H, W\) to score"):
        fit(tmp_path, evaluation(), module=tiny.gan(), data=RingMixture(num_samples=500), val_check_interval=1)


def test_data_that_gives_no_examples_is_refused(tmp_path):
    trainer = families.trainer(tmp_path, callbacks=[evaluation()], **EVERY_3)
    example = {"image": torch.zeros(1, 8, 8), "label": torch.tensor(0)}
    loader = torch.utils.data.DataLoader([example] * 12, batch_size=4)
    with pytest.raises(TypeError, match="gives no images to compare with"):
        trainer.fit(families.build("vae"), loader, loader)


def test_an_extractor_without_classes_is_not_asked_for_them():
    extractor = TinyFeatures()
    assert any(isinstance(measure, ModeCoverage) for measure in default_measures(extractor))
    extractor.num_classes = None
    assert [type(measure).__name__ for measure in default_measures(extractor)] == [
        "Frechet",
        "Kernel",
        "PrecisionRecall",
    ]
