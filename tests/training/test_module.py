import csv
import functools

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import ReduceLROnPlateau
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lit_generative.callbacks.checkpoint import Checkpoint
from lit_generative.data.mixtures import RingMixture
from lit_generative.networks.conv_vae import ConvEncoder
from lit_generative.networks.mlp import MLPDiscriminator
from lit_generative.tensor_ops import sample_generators
from lit_generative.training.checkpoint_io import load_checkpoint
from lit_generative.training.csv_logger import CSVLogger
from lit_generative.training.lr_schedules import WarmupLinear, WarmupPlateau
from lit_generative.training.module import GenerativeModule
from lit_generative.training.run import global_seed
from lit_generative.types import (
    DescribesData,
    SupportsAveraging,
    SupportsReconstruction,
    SupportsSampling,
    SupportsTrajectory,
)
from lit_generative.vae.module import VAE
from tests import tiny
from tests.families import build

FAMILIES = {
    "gan": (tiny.gan, tiny.ring),
    "conditional gan": (lambda **kwargs: tiny.image_gan(num_classes=10, **kwargs), tiny.digits),
    "vae": (tiny.vae, tiny.digits),
    "vqvae": (functools.partial(build, "vqvae"), tiny.digits),
    "ddpm": (tiny.ddpm, tiny.digits),
    "conditional ddpm": (lambda **kwargs: tiny.point_ddpm(num_classes=4, **kwargs), tiny.ring),
}
families = pytest.mark.parametrize(("build", "data"), FAMILIES.values(), ids=FAMILIES.keys())


def _checkpoint(tmp_path, module, data, **kwargs):
    tiny.train(tmp_path, module, data, callbacks=[Checkpoint(dirpath=str(tmp_path))], **kwargs)
    return tmp_path / "last.ckpt"


def _is_plain(value) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def _includes(value, part) -> bool:
    """Whether ``value`` is ``part``, where its dictionaries may hold more: the parser writes out all defaults."""
    if isinstance(part, dict):
        return isinstance(value, dict) and all(key in value and _includes(value[key], part[key]) for key in part)
    return value == part


# hyperparameters


@families
def test_hyperparameters_are_plain_data_and_name_every_argument(build, data):
    module = build()
    hparams = dict(module.hparams)
    assert _is_plain(hparams)
    assert hparams["_class_path"] == f"{type(module).__module__}.{type(module).__name__}"
    arguments = [name for name in hparams if not name.startswith("_")]
    assert all(hasattr(module, name) for name in arguments)
    assert len(arguments) >= 6


@families
def test_a_module_made_in_python_is_rebuilt_from_its_checkpoint_alone(tmp_path, build, data):
    module = build(seed=1)
    path = _checkpoint(tmp_path, module, data(), max_steps=1)
    again = type(module).load_from_checkpoint(path, weights_only=True)
    tiny.assert_same(tiny.weights(again), tiny.weights(module))
    assert _includes(dict(again.hparams), dict(module.hparams))
    draws = [m.eval().sample(2, generator=sample_generators(0, 2)) for m in (again, module)]
    tiny.assert_same(*draws)


def test_a_rebuilt_module_optimizes_as_the_first_one_did(tmp_path):
    optimizer = functools.partial(torch.optim.Adam, lr=3e-3, betas=(0.5, 0.9))
    scheduler = functools.partial(WarmupLinear, warmup_steps=1, total_steps=9)
    path = _checkpoint(tmp_path, tiny.vae(optimizer=optimizer, scheduler=scheduler), tiny.digits(), max_steps=1)
    entry = VAE.load_from_checkpoint(path).configure_optimizers()
    group, schedule = entry["optimizer"].param_groups[0], entry["lr_scheduler"]["scheduler"]
    assert (group["initial_lr"], tuple(group["betas"])) == (3e-3, (0.5, 0.9))
    assert (type(schedule), schedule.warmup_steps, schedule.total_steps) == (WarmupLinear, 1, 9)


def test_an_optimizer_may_be_a_class():
    assert tiny.vae(optimizer=torch.optim.SGD).hparams["optimizer"] == {"class_path": "torch.optim.sgd.SGD"}


@pytest.mark.parametrize("name", ["optimizer", "scheduler"])
def test_a_lambda_is_refused_since_no_checkpoint_could_hold_it(name):
    with pytest.raises(TypeError, match=r"does not say how it was built.*functools.partial of one"):
        tiny.vae(**{name: lambda params: torch.optim.Adam(params)})


def test_a_network_without_a_record_is_refused():
    class Unrecorded(nn.Linear):
        latent_dim = 3

    with pytest.raises(TypeError, match=r"Unrecorded does not say how it was built.*Recorded"):
        tiny.gan(generator=Unrecorded(3, 2))


# random numbers


class Dice(GenerativeModule):
    """Records one random number a step; trains nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.rolls: dict[str, list[float]] = {"train": [], "val": [], "test": []}

    def _roll(self, stage: str) -> None:
        self.rolls[stage].append(float(torch.rand(())))

    def training_step(self, batch, batch_idx) -> Tensor:
        self._roll("train")
        return self.weight.sum()

    def validation_step(self, batch, batch_idx) -> None:
        self._roll("val")

    def test_step(self, batch, batch_idx) -> None:
        self._roll("test")

    def configure_optimizers(self):
        return {"optimizer": torch.optim.SGD(self.parameters(), lr=0.1)}

    def sample(self, num, label=None, generator=None) -> Tensor:
        return torch.zeros(num, 2)


def _rolls(tmp_path, seed: int | None = 0, **kwargs) -> dict[str, list[float]]:
    if seed is not None:
        L.seed_everything(seed, verbose=False)
    dice = Dice()
    tiny.train(tmp_path, dice, tiny.ring(), **kwargs)
    return dice.rolls


def test_random_numbers_of_a_step_depend_on_the_seed_and_the_step(tmp_path):
    first = _rolls(tmp_path, 0, max_steps=6)["train"]
    assert first == _rolls(tmp_path, 0, max_steps=6)["train"]
    assert len({*first, *_rolls(tmp_path, 1, max_steps=6)["train"]}) == 12


def test_steps_of_different_epochs_have_different_random_numbers(tmp_path):
    assert len(set(_rolls(tmp_path, max_steps=6, limit_train_batches=2)["train"])) == 6


def test_random_numbers_of_a_step_do_not_depend_on_what_ran_before_it(tmp_path):
    whole = _rolls(tmp_path, max_steps=4)["train"]
    L.seed_everything(0, verbose=False)
    torch.rand(17)
    dice = Dice()
    torch.rand(5)
    tiny.train(tmp_path, dice, tiny.ring(), max_steps=4)
    assert dice.rolls["train"] == whole


def test_validation_does_not_shift_the_random_numbers_of_training(tmp_path):
    without = _rolls(tmp_path, max_steps=6)
    validated = _rolls(tmp_path, max_steps=6, limit_val_batches=2, val_check_interval=2, num_sanity_val_steps=2)
    assert without["train"] == validated["train"]
    assert len(validated["val"]) == 2 + 3 * 2
    assert without["val"] == []


def test_the_noise_is_the_same_at_each_validation_and_not_that_of_training_or_test(tmp_path):
    rolls = _rolls(tmp_path, max_steps=6, limit_val_batches=2, val_check_interval=2)
    first = rolls["val"][:2]
    assert rolls["val"] == first * 3
    assert len({*first, *rolls["train"]}) == 2 + 6
    dice = Dice()
    tiny.trainer(tmp_path).test(dice, tiny.ring(), verbose=False)
    assert len(dice.rolls["test"]) == 2
    assert not {*dice.rolls["test"]} & {*first, *rolls["train"]}


def test_each_rank_has_its_own_random_numbers(tmp_path, monkeypatch):
    first = _rolls(tmp_path, max_steps=3)["train"]
    monkeypatch.setattr(L.Trainer, "global_rank", property(lambda self: 1))
    monkeypatch.setattr(RingMixture, "_rank", property(lambda self: 0))
    assert not {*first} & {*_rolls(tmp_path, max_steps=3)["train"]}


def test_without_seed_everything_the_seed_is_zero(tmp_path):
    assert global_seed() == 0
    assert _rolls(tmp_path, None) == _rolls(tmp_path, 0)
    L.seed_everything(7, verbose=False)
    assert global_seed() == 7


# checks against the data


def _refused_at_setup(tmp_path, module, data, match: str) -> None:
    before = tiny.weights(module)
    with pytest.raises(ValueError, match=match):
        tiny.train(tmp_path, module, data)
    tiny.assert_same(tiny.weights(module), before)
    assert getattr(module, "_options", None) is None  # on_train_start was not reached


def test_networks_for_another_shape_than_the_data_are_refused_before_training(tmp_path):
    _refused_at_setup(
        tmp_path,
        tiny.vae(),
        tiny.digits(image_size=16),
        r"model.encoder \(MLPEncoder\) takes examples of shape \(1, 8, 8\), but Digits yields \(1, 16, 16\). Set the",
    )


def test_the_second_network_is_checked_too(tmp_path):
    encoder = ConvEncoder(image_size=16, channels=1, latent_dim=3, width=4)
    _refused_at_setup(tmp_path, tiny.vae(encoder=encoder), tiny.digits(image_size=16), "model.decoder .MLPDecoder")


def test_networks_for_another_number_of_classes_are_refused_before_training(tmp_path):
    _refused_at_setup(
        tmp_path,
        tiny.point_ddpm(num_classes=5),
        tiny.ring(num_modes=4),
        r"model.network \(MLPDenoiser\) takes labels of 5 classes, but RingMixture has 4 classes. Set the .* to 4.",
    )


class Unlabelled(RingMixture):
    num_classes = None


def test_a_conditional_network_on_data_without_classes_is_refused_before_training(tmp_path):
    data = Unlabelled(num_modes=4, num_samples=84, batch_size=6)
    match = "takes labels of 4 classes, but Unlabelled has no classes. Set the network's num_classes to null"
    _refused_at_setup(tmp_path, tiny.point_ddpm(num_classes=4), data, match)


def test_an_unconditional_network_takes_data_with_classes(tmp_path):
    assert tiny.train(tmp_path, tiny.point_ddpm(), tiny.ring()).global_step == 3


def test_plain_loaders_are_not_checked(tmp_path):
    module = tiny.gan()
    batches = [{"image": torch.zeros(4, 2), "label": torch.zeros(4, dtype=torch.int64)}] * 3
    fitted = tiny.trainer(tmp_path, max_steps=2)
    fitted.fit(module, DataLoader(batches, batch_size=None))
    assert fitted.global_step == 2


# checks against a checkpoint


def test_a_checkpoint_of_another_class_is_one_readable_error(tmp_path):
    path = _checkpoint(tmp_path, tiny.gan(), tiny.ring())
    with pytest.raises(ValueError, match=r"The checkpoint holds a GAN, but the model is a DDPM. Give the ch") as info:
        tiny.train(tmp_path, tiny.point_ddpm(), tiny.ring(), ckpt_path=path)
    assert "\n" not in str(info.value)


def test_a_checkpoint_of_other_widths_is_one_readable_error_that_names_the_settings(tmp_path):
    path = _checkpoint(tmp_path, tiny.vae(hidden_dim=6), tiny.digits())
    with pytest.raises(ValueError, match=r"weights do not fit this VAE: encoder.layers.0.weight has shape") as info:
        tiny.train(tmp_path, tiny.vae(hidden_dim=9), tiny.digits(), ckpt_path=path)
    message = str(info.value)
    assert "has shape (6, 64) there, (9, 64) here" in message
    assert "encoder: MLPEncoder(sample_shape=[1, 8, 8], latent_dim=3, hidden_dim=6, num_layers=1, activ" in message
    assert "hidden_dim=9, num_layers=1, activation=silu, num_classes=None) here" in message
    assert "likelihood" not in message
    assert "\n" not in message


def test_a_checkpoint_with_fewer_weights_names_the_first_that_is_missing(tmp_path):
    deeper = MLPDiscriminator(hidden_dim=4, num_layers=2)
    path = _checkpoint(tmp_path, tiny.gan(), tiny.ring())
    with pytest.raises(ValueError, match=r"layers.2.weight has shape \(1, 4\) there, \(4, 4\) here. Different sett"):
        tiny.train(tmp_path, tiny.gan(discriminator=deeper), tiny.ring(), ckpt_path=path)


def test_evaluating_such_a_checkpoint_is_refused_as_well(tmp_path):
    path = _checkpoint(tmp_path, tiny.vae(hidden_dim=6), tiny.digits())
    with pytest.raises(ValueError, match="The checkpoint's weights do not fit this VAE"):
        tiny.trainer(tmp_path).test(tiny.vae(hidden_dim=9), tiny.digits(), ckpt_path=path, verbose=False)


# optimization


@pytest.mark.parametrize(("build", "data"), [(tiny.gan, tiny.ring), (tiny.vae, tiny.digits)])
def test_global_step_counts_one_update_a_batch(tmp_path, build, data):
    assert tiny.train(tmp_path, build(), data(), max_epochs=1, limit_train_batches=7, max_steps=-1).global_step == 7


def test_an_uncounted_step_updates_the_weights_and_calls_the_hooks_of_a_step(tmp_path):
    class Seen(L.Callback):
        def __init__(self) -> None:
            self.optimizers: list = []

        def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
            self.optimizers.append(trainer.optimizers.index(optimizer))

    seen, module = Seen(), tiny.gan()
    before = tiny.weights(module.discriminator)
    fitted = tiny.train(tmp_path, module, tiny.ring(), max_steps=2, callbacks=[seen])
    assert seen.optimizers == [1, 0, 1, 0]
    assert fitted.global_step == 2
    assert not torch.equal(before["layers.0.weight"], module.discriminator.layers[0].weight)


def test_a_manual_module_steps_every_schedule_once_a_counted_update(tmp_path):
    schedules = {
        "generator_scheduler": functools.partial(WarmupLinear, warmup_steps=0, total_steps=10),
        "discriminator_scheduler": functools.partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5),
    }
    fitted = tiny.train(tmp_path, tiny.gan(discriminator_steps=3, **schedules), tiny.ring(), max_steps=4)
    rates = [optimizer.param_groups[0]["lr"] for optimizer in fitted.optimizers]
    assert rates == pytest.approx([6e-4, 1e-3 / 16])


def test_an_automatic_module_steps_its_schedule_once_an_update_also_when_gradients_are_accumulated(tmp_path):
    scheduler = functools.partial(WarmupLinear, warmup_steps=0, total_steps=10)
    module = tiny.vae(scheduler=scheduler)
    fitted = tiny.train(tmp_path, module, tiny.digits(), max_steps=4, accumulate_grad_batches=2)
    assert fitted.optimizers[0].param_groups[0]["lr"] == pytest.approx(6e-4)


def test_frozen_parameters_are_not_given_to_the_optimizer(tmp_path):
    module = tiny.vae()
    module.encoder.requires_grad_(False)
    fitted = tiny.trainer(tmp_path, max_steps=1, limit_val_batches=0)
    fitted.fit(module, tiny.digits())
    group = fitted.optimizers[0].param_groups[0]
    assert {id(p) for p in group["params"]} == {id(p) for p in module.decoder.parameters()}
    assert group["name"] == "vae"


class Scores(L.Callback):
    """Logs a given score at each validation as ``val/fid``, and notes the rate of each update."""

    def __init__(self, *scores: float) -> None:
        self.scores = list(scores)
        self.rates: list[float] = []

    def on_validation_epoch_end(self, trainer, pl_module) -> None:
        score = 0.0 if trainer.sanity_checking else self.scores.pop(0)
        pl_module.log("val/fid", score)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        if optimizer is trainer.optimizers[0]:
            self.rates.append(optimizer.param_groups[0]["lr"])


VALIDATING = {"limit_val_batches": 1, "val_check_interval": 2, "check_val_every_n_epoch": None}
MODES = {
    "manual": (lambda schedule: tiny.gan(generator_scheduler=schedule), tiny.ring),
    "automatic": (lambda schedule: tiny.vae(scheduler=schedule), tiny.digits),
}
modes = pytest.mark.parametrize(("build", "data"), MODES.values(), ids=MODES.keys())


def _rates(tmp_path, build, data, schedule, scores, **kwargs) -> list[float]:
    callback = Scores(*scores)
    # Epochs of five batches: validations fall in their middle, and their ends see no new score.
    options = VALIDATING | {"max_steps": 2 * len(scores) + 1, "limit_train_batches": 5, "num_sanity_val_steps": 1}
    tiny.train(tmp_path, build(schedule), data(), callbacks=[callback], **options | kwargs)
    return callback.rates


@modes
def test_reduce_on_plateau_counts_validations_in_both_modes(tmp_path, build, data):
    schedule = functools.partial(ReduceLROnPlateau, monitor="val/fid", factor=0.1, patience=1)
    rates = _rates(tmp_path, build, data, schedule, [50, 60, 40, 41, 42, 30])
    assert rates == pytest.approx([1e-3] * 10 + [1e-4] * 3)


@modes
def test_warmup_counts_updates_and_its_plateau_validations_in_both_modes(tmp_path, build, data):
    schedule = functools.partial(WarmupPlateau, monitor="val/fid", warmup_steps=3, factor=0.5, patience=0)
    # The first validation falls in the warm-up; of the others the second and the fourth are no better.
    rates = _rates(tmp_path, build, data, schedule, [1, 50, 60, 40, 40])
    assert rates == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3, 1e-3, 5e-4, 5e-4, 5e-4, 5e-4, 2.5e-4])


@modes
def test_the_warmup_of_a_plateau_counts_updates_also_with_fewer_than_one_a_batch(tmp_path, build, data):
    schedule = functools.partial(WarmupPlateau, monitor="val/fid", warmup_steps=3)
    accumulated = {} if build(schedule).automatic_optimization is False else {"accumulate_grad_batches": 2}
    rates = _rates(tmp_path, build, data, schedule, [9] * 8, max_steps=4, **accumulated)
    assert rates == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3])


@modes
@pytest.mark.parametrize("cls", [ReduceLROnPlateau, WarmupPlateau])
def test_a_monitored_score_that_is_not_logged_is_an_error_that_lists_what_is(tmp_path, build, data, cls):
    module = build(functools.partial(cls, monitor="val/kid"))
    match = rf"{cls.__name__} monitors 'val/kid', which was not logged. Logged: \[.*'val/\w+loss'.*\]. Set monitor to"
    with pytest.raises(ValueError, match=match.replace(r"\w+", r"\w*")):
        tiny.train(tmp_path, module, data(), **VALIDATING)


def test_a_plateau_of_torch_without_a_monitor_watches_val_loss(tmp_path):
    worse = functools.partial(
        torch.optim.lr_scheduler.ReduceLROnPlateau, patience=0, threshold=1e9, threshold_mode="abs"
    )
    fitted = tiny.train(tmp_path, tiny.vae(scheduler=worse), tiny.digits(), max_steps=4, **VALIDATING)
    assert fitted.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-4)


@modes
def test_the_learning_rate_monitor_logs_the_rate_of_each_update_at_its_step(tmp_path, build, data):
    schedule = functools.partial(WarmupPlateau, monitor="val/fid", warmup_steps=3, factor=0.5, patience=0)
    logger = CSVLogger(str(tmp_path), name="", version="run")
    scores, monitor = Scores(1, 50, 60), LearningRateMonitor()
    options = VALIDATING | {"max_steps": 7, "limit_train_batches": 5, "logger": logger, "callbacks": [scores, monitor]}
    tiny.train(tmp_path, build(schedule), data(), **options)
    name = "generator" if data is tiny.ring else "vae"
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))
    logged = {int(row["step"]): float(row[f"lr-{name}/{name}"]) for row in rows if row[f"lr-{name}/{name}"]}
    assert logged == pytest.approx(dict(enumerate(scores.rates)))


def test_validating_after_training_steps_no_schedule(tmp_path):
    worse = functools.partial(ReduceLROnPlateau, monitor="val/generator_loss", patience=0, threshold=1e9)
    module = tiny.gan(generator_scheduler=worse)
    fitted = tiny.train(tmp_path, module, tiny.ring(), limit_val_batches=1, limit_train_batches=4)
    for _ in range(3):
        fitted.validate(module, tiny.ring(), verbose=False)
    assert fitted.optimizers[0].param_groups[0]["lr"] == 1e-3


def test_backward_runs_outside_of_autocast():
    seen = []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.sum()

        @staticmethod
        def backward(ctx, grad):
            seen.append(torch.is_autocast_enabled("cpu"))
            return grad.expand(3)

    module, x = Dice(), torch.zeros(3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        module.backward(Probe.apply(x))
    assert seen == [False]


def test_ddp_with_a_static_graph_is_refused_for_optimizers_that_take_turns(tmp_path):
    module = tiny.gan()
    module.trainer = tiny.trainer(tmp_path, strategy=DDPStrategy(static_graph=True))
    with pytest.raises(ValueError, match=r"GAN: optimizers that take turns .* must not have static_graph=True. Leave"):
        module.setup("fit")
    module.setup("test")


# logging


class Grid(Dice):
    """Notes at which batches it would log."""

    def training_step(self, batch, batch_idx) -> Tensor:
        self.rolls["train"].append(self.log_now)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(("n", "expected"), [(1, [1, 2, 3, 4, 5, 6, 7]), (3, [3, 6]), (0, [])])
def test_losses_are_logged_at_every_nth_batch_counted_over_epochs(tmp_path, n, expected):
    module = Grid()
    tiny.train(tmp_path, module, tiny.ring(), max_steps=7, limit_train_batches=5, log_every_n_steps=n)
    assert [i for i, now in enumerate(module.rolls["train"][::2], start=1) if now] == expected


@pytest.mark.parametrize(("build", "data"), [(tiny.gan, tiny.ring), (tiny.vae, tiny.digits)])
def test_the_logger_gets_a_row_for_every_nth_batch(tmp_path, build, data):
    rows: list[int] = []

    class Rows(CSVLogger):
        def log_metrics(self, metrics, step=None) -> None:
            rows.extend([step] if any(key.startswith("train/") for key in metrics) else [])

    tiny.train(tmp_path, build(), data(), max_steps=7, log_every_n_steps=3, logger=Rows(str(tmp_path)))
    assert rows == [2, 5]


def test_evaluation_logs_the_mean_over_examples_though_batches_have_unequal_sizes(tmp_path):
    class Means(Dice):
        def test_step(self, batch, batch_idx) -> None:
            self.log_evaluation("test", {"x": batch["image"][:, 0]})

    data = tiny.ring(eval_batch_size=5)
    fitted = tiny.trainer(tmp_path)
    fitted.test(Means(), data, verbose=False)
    assert len(data.splits.test) % 5
    torch.testing.assert_close(fitted.callback_metrics["test/x"], data.splits.test.image[:, 0].mean())


# sampling


@families
def test_a_predicted_sample_does_not_depend_on_the_batch_size(tmp_path, build, data):
    module = build()
    predicted = []
    for size in (5, 3):
        loader = data(num_predict_samples=5, eval_batch_size=size)
        predicted.append(torch.cat(tiny.trainer(tmp_path).predict(module, loader)))
    assert len(predicted[0]) == 5
    torch.testing.assert_close(*predicted)


def test_predicted_samples_have_the_seeds_of_their_indices(tmp_path):
    L.seed_everything(3, verbose=False)
    module = tiny.gan()
    with torch.inference_mode():
        predicted = module.predict_step(torch.tensor([4, 2]), 0)
    expected = module.sample(6, generator=sample_generators(3, 6))[[4, 2]]
    torch.testing.assert_close(predicted, expected)


def test_labels_for_an_unconditional_model_are_none():
    assert tiny.gan().labels_for(3, None, None) is None


def test_labels_for_a_conditional_model_are_those_given_or_drawn():
    module = tiny.point_ddpm(num_classes=4)
    given = torch.tensor([3, 0, 1])
    torch.testing.assert_close(module.labels_for(3, given, None), given)
    drawn = module.labels_for(5, None, sample_generators(0, 5))
    assert (drawn.dtype, drawn.shape) == (torch.int64, (5,))
    tiny.assert_same(module.labels_for(2, None, sample_generators(0, 2)), drawn[:2])
    assert len(module.labels_for(200, None, torch.Generator()).unique()) == 4
    assert module.labels_for(0, torch.zeros(0, dtype=torch.int64), None).shape == (0,)


@pytest.mark.parametrize(
    ("classes", "label", "match"),
    [
        (None, [0, 1, 0], "DDPM: the model is unconditional, so it takes no label. Leave label out."),
        (4, [0, 1], r"DDPM: need one label for each of 3 samples, got shape \(2,\)"),
        (4, [[0], [1], [2]], r"DDPM: need one label for each of 3 samples, got shape \(3, 1\)"),
        (4, [0, 1, 4], r"DDPM: labels must lie in 0..3, got 0..4"),
        (4, [-1, 1, 2], r"DDPM: labels must lie in 0..3, got -1..2"),
    ],
)
def test_impossible_labels_are_refused(classes, label, match):
    with pytest.raises(ValueError, match=match):
        tiny.point_ddpm(num_classes=classes).sample(3, torch.tensor(label))


# protocols


def test_modules_and_data_speak_the_protocols_that_callbacks_know():
    for module in (tiny.gan(), tiny.vae(), tiny.point_ddpm()):
        assert isinstance(module, SupportsSampling)
        assert isinstance(module, SupportsAveraging)
        assert set(module.sampling_modules) <= {name for name, _ in module.named_children()}
    assert isinstance(tiny.vae(), SupportsReconstruction)
    assert not isinstance(tiny.gan(), SupportsReconstruction)
    assert isinstance(tiny.point_ddpm(), SupportsTrajectory)
    assert isinstance(tiny.ring(), DescribesData)
    assert not isinstance(L.LightningDataModule(), DescribesData)


def test_options_of_the_optimizers_are_kept_in_the_checkpoint_as_plain_data(tmp_path):
    options = load_checkpoint(_checkpoint(tmp_path, tiny.gan(), tiny.ring()))["optimization_options"]
    assert len(options) == 2
    assert _is_plain(options)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_a_precision_that_cannot_work_is_refused_with_those_that_can(tmp_path, precision):
    with pytest.raises(ValueError, match=rf"precision='{precision}' cannot work. Use 32-true, bf16-mixed"):
        tiny.train(tmp_path, tiny.vae(), tiny.digits(), precision=precision)
