import copy
import functools
import os
import socket
import warnings
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import yaml
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision as Plugin
from torch import nn

from lit_generative.__main__ import main
from lit_generative.callbacks.checkpoint import Checkpoint
from lit_generative.callbacks.ema import EMA
from lit_generative.callbacks.gradient_clipping import GradientClipping
from lit_generative.callbacks.mode_coverage import ModeCoverage
from lit_generative.callbacks.training_health import TrainingHealth, mean_distance
from lit_generative.gan.losses import Minimax
from lit_generative.gan.penalties import Penalty
from lit_generative.tensor_ops import sample_generators
from tests import tiny

CONFIGS = Path(__file__).parents[2] / "configs"
SGD = functools.partial(torch.optim.SGD, lr=1e-3)


class Told(L.Callback):
    """What is logged after each batch; sits behind the callback."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        keys = ("train/unhealthy", "train/sample_distance")
        self.logged.append({k: float(v) for k, v in trainer.callback_metrics.items() if k in keys})


class At(L.Callback):
    """Does something to the module just before a batch of the run, counted from 1."""

    def __init__(self, step: int, act) -> None:
        self.step, self.act = step, act

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step + 1 == self.step:
            with torch.no_grad():
                self.act(pl_module)


def run(tmp_path, health, module, *others, data=None, **options) -> tuple[Told, list[str]]:
    """Train; gives what was logged and what was warned of."""
    told = Told()
    data = data or (tiny.digits() if module.__class__.__name__ in ("VAE",) else tiny.ring(batch_size=16))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tiny.train(tmp_path, module, data, **{"max_steps": 6, "callbacks": [*others, health, told]} | options)
    return told, [str(w.message) for w in caught if "TrainingHealth" in str(w.message)]


def set_to(network: str, value: float):
    def act(module) -> None:
        for p in getattr(module, network).parameters():
            p.fill_(value)

    return act


# ---- healthy runs


@pytest.mark.parametrize(
    ("build", "data"),
    [
        (tiny.gan, tiny.ring),
        (tiny.image_gan, tiny.digits),
        (tiny.vae, tiny.digits),
        (tiny.point_ddpm, tiny.ring),
    ],
    ids=["points", "images", "vae", "ddpm"],
)
def test_a_healthy_run_hears_nothing(tmp_path, build, data):
    health = TrainingHealth(stop=True, window=4, every_n_steps=4)
    told, heard = run(tmp_path, health, build(), data=data(), max_steps=12)
    assert heard == []
    assert [row["train/unhealthy"] for row in told.logged] == [0.0] * 12
    assert ["train/sample_distance" in row for row in told.logged] == [False] * 3 + [True] * 9


@pytest.mark.parametrize("build", [tiny.gan, tiny.image_gan, tiny.vae], ids=["points", "images", "vae"])
def test_it_does_not_change_training_by_one_bit(tmp_path, build):
    trained = []
    for callbacks in ([], [TrainingHealth(every_n_steps=1)]):
        module = build()
        data = tiny.ring() if build is tiny.gan else tiny.digits()
        tiny.train(tmp_path, module, data, max_steps=4, callbacks=callbacks)
        trained.append((tiny.weights(module), torch.get_rng_state()))
    tiny.assert_same(trained[1], trained[0])


# ---- what is not a number


class Broken(Penalty):
    """NaN from the discriminator's update ``since`` on."""

    def __init__(self, since: int) -> None:
        self.since, self.calls = since, 0

    def compute(self, discriminator, x, x_hat):
        self.calls += 1
        return discriminator(x) * (float("nan") if self.calls >= self.since else 0.0)


def test_the_penalty_that_fails_is_named_with_its_update(tmp_path):
    with pytest.raises(RuntimeError, match=r"at update 4, train/broken is nan; .*gradient of discriminator") as error:
        run(tmp_path, TrainingHealth(stop=True), tiny.gan(penalties=[Broken(4)]))
    assert "train/discriminator_loss is" not in str(error.value)


def test_between_two_logged_updates_the_update_is_remembered(tmp_path):
    health, module = TrainingHealth(stop=True), tiny.gan(penalties=[Broken(5)])
    with pytest.raises(RuntimeError, match=r"at update 8, .*gradient of discriminator is not finite since update 5"):
        run(tmp_path, health, module, max_steps=12, log_every_n_steps=4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("build", "part"), [(tiny.vae, "decoder"), (tiny.point_ddpm, "network")])
def test_automatic_modules_are_watched_too(tmp_path, build, part, value):
    poison = At(3, set_to(part, value))
    with pytest.raises(RuntimeError, match="at update 3, train/loss is nan"):
        run(tmp_path, TrainingHealth(stop=True), build(), poison)
    with pytest.raises(RuntimeError, match=r"at update 5, .*is not finite since update 3"):
        run(tmp_path, TrainingHealth(stop=True), build(), poison, log_every_n_steps=5)


class Hidden(nn.Module):
    """Has a gradient that is NaN in a middle layer alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = (nn.Parameter(torch.ones(())) for _ in range(3))

    def forward(self) -> torch.Tensor:
        rooted = (self.middle - self.middle.detach()).sqrt() * 0  # infinite slope times zero
        return self.first + rooted + self.last


class Middle(L.LightningModule):
    num_classes = None

    def __init__(self) -> None:
        super().__init__()
        self.network = Hidden()

    def training_step(self, batch, batch_idx):
        return self.network()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_the_whole_gradient_is_looked_at_when_an_update_is_logged(tmp_path):
    with pytest.raises(RuntimeError, match="at update 3, the gradient of optimizer is not finite since update 3"):
        run(tmp_path, TrainingHealth(stop=True, every_n_steps=None), Middle(), log_every_n_steps=3)


def test_a_warning_is_given_when_a_failure_begins_and_training_goes_on(tmp_path):
    told, heard = run(tmp_path, TrainingHealth(), tiny.vae(), At(3, set_to("decoder", float("nan"))))
    assert heard[0].startswith("TrainingHealth: at update 3, train/loss is nan; ")
    assert sum("train/loss" in text for text in heard) == 1
    assert heard[0].count("Lower the learning rate") == 1
    counts = [row["train/unhealthy"] for row in told.logged]
    assert counts[:2] == [0.0, 0.0]
    assert min(counts[2:]) >= 2.0  # the loss, and its gradient


def test_an_overflow_that_the_loss_scaler_skips_is_no_failure(tmp_path):
    plugin = Plugin("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    for options in ({}, {"log_every_n_steps": 3}):
        health = TrainingHealth(every_n_steps=None)
        _, heard = run(tmp_path, health, Middle(), plugins=[plugin], **options)
        assert heard == []


def test_norms_are_those_without_the_loss_scale(tmp_path):
    found = []
    for plugins in ([], [Plugin("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10))]):
        health = TrainingHealth(every_n_steps=None)
        module = tiny.vae(optimizer=functools.partial(torch.optim.Adam, lr=1e-3, fused=True))
        run(tmp_path, health, module, plugins=plugins, max_steps=3)
        found.append(health.state_dict()["first"]["vae"])
    assert found[1] == pytest.approx(found[0], rel=0.05)


# ---- several processes


def _tell_one(rank: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    trainer = SimpleNamespace(global_step=7)
    health, error = TrainingHealth(stop=True, every_n_steps=None), ""
    health._tell(trainer, "update", {})
    try:
        health._tell(trainer, "update", {"train/r1": ("train/r1 is nan", "Do.")} if rank == 1 else {})
    except RuntimeError as raised:
        error = str(raised)
    Path(folder, str(rank)).write_text(error)
    dist.destroy_process_group()


def test_a_failure_in_one_process_stops_all(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(_tell_one, args=(port, str(tmp_path)), nprocs=2, start_method="fork")
    for rank in "01":
        assert (tmp_path / rank).read_text() == "TrainingHealth: at update 7, train/r1 is nan. Do."


# ---- gradients


def steady():
    return tiny.point_ddpm(optimizer=functools.partial(torch.optim.SGD, lr=0.0))


def blown() -> At:
    return At(5, lambda m: [p.mul_(30) for p in m.network.parameters()])


def test_an_exploding_gradient_is_caught(tmp_path):
    health = TrainingHealth(stop=True, window=3, explosion=50.0, every_n_steps=None)
    with pytest.raises(RuntimeError, match=r"at update 5, the gradient norm of network is .*, and was .* at first"):
        run(tmp_path, health, steady(), blown())
    health = TrainingHealth(window=3, explosion=None, every_n_steps=None)
    _, heard = run(tmp_path, health, steady(), blown())
    assert heard == []


def test_an_explosion_that_clipping_would_hide_is_seen_before_it(tmp_path):
    for first, hidden in ((True, False), (False, True)):
        health = TrainingHealth(window=3, explosion=50.0, every_n_steps=None)
        clip = GradientClipping(max_norm=0.5)
        callbacks = [health, clip] if first else [clip, health]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            options = {"max_steps": 6, "callbacks": [blown(), *callbacks]}
            tiny.train(tmp_path, steady(), tiny.ring(), **options)
        heard = any("gradient norm of network" in str(w.message) for w in caught)
        assert heard is not hidden


# ---- a discriminator that is sure


def sure(module) -> None:
    """Perfect verdicts, far from data and samples, as trained for too long."""
    module.generator.layers[-1].bias.fill_(-3.0)
    module.generator.layers[-1].weight.mul_(1e-3)
    first, last = module.discriminator.layers[0], module.discriminator.layers[-1]
    first.weight.fill_(20.0)
    first.bias.fill_(60.0)
    last.weight.fill_(1.0)
    last.bias.fill_(-100.0)


def saturating(**options):
    """Minimax: its generator's gradient vanishes with a sure discriminator."""
    return tiny.gan(loss=Minimax(), generator_optimizer=SGD, discriminator_optimizer=SGD, **options)


def test_a_sure_discriminator_with_a_vanished_gradient_is_caught_when_it_lasts(tmp_path):
    health = TrainingHealth(stop=True, window=3, saturation=4.0, every_n_steps=None)
    message = "at update 6, the discriminator is sure .* and the generator's gradient has vanished"
    with pytest.raises(RuntimeError, match=message):
        run(tmp_path, health, saturating(), At(4, sure), max_steps=10)


def test_without_saturation_to_look_for_or_time_enough_nothing_is_said(tmp_path):
    for health in (
        TrainingHealth(window=3, saturation=None, every_n_steps=None),
        TrainingHealth(window=8, saturation=4.0, every_n_steps=None),
        TrainingHealth(window=3, saturation=1e6, every_n_steps=None),
    ):
        _, heard = run(tmp_path, health, saturating(), At(4, sure), max_steps=10)
        assert heard == []


def test_a_sure_discriminator_whose_generator_still_learns_is_no_failure(tmp_path):
    health = TrainingHealth(window=2, saturation=4.0, every_n_steps=None)
    # The same weights; the non-saturating loss keeps its gradient.
    learning = tiny.gan(generator_optimizer=SGD, discriminator_optimizer=SGD)
    _, heard = run(tmp_path, health, learning, At(4, sure), max_steps=10)
    assert not any("sure" in text for text in heard)


def test_a_discriminator_that_calls_all_real_is_not_sure(tmp_path):
    def flattered(module) -> None:
        sure(module)
        module.discriminator.layers[-1].weight.zero_()
        module.discriminator.layers[-1].bias.fill_(50.0)

    health = TrainingHealth(window=2, saturation=4.0, every_n_steps=None)
    still = functools.partial(torch.optim.SGD, lr=0.0)
    module = tiny.gan(loss=Minimax(), generator_optimizer=still, discriminator_optimizer=still)
    _, heard = run(tmp_path, health, module, At(4, flattered), max_steps=10)
    assert heard == []


def test_what_does_not_last_counts_anew():
    health = TrainingHealth(window=3)
    seen = [health._confirmed("saturation", holds) for holds in (True, True, False, True, True, True, True)]
    assert seen == [False] * 5 + [True] * 2


# ---- variety


def collapsed(module) -> None:
    module.generator.layers[-1].weight.zero_()


def scattered(module) -> None:
    module.generator.layers[-1].weight.fill_(0.5).mul_(torch.tensor([[1.0], [-1.0]]))


def test_the_mean_distance_is_that_of_all_pairs():
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0]])
    expected = (5.0 + 1.0 + 18**0.5) / 3
    assert mean_distance(x.view(3, 1, 1, 2)) == pytest.approx(expected)


def test_samples_that_fall_together_are_caught(tmp_path):
    health = TrainingHealth(stop=True, every_n_steps=2)
    with pytest.raises(RuntimeError, match="at update 6, samples have collapsed: their mean distance is"):
        run(tmp_path, health, tiny.gan(), At(1, scattered), At(5, collapsed), max_steps=10)


def test_samples_that_never_spread_are_caught_after_a_while(tmp_path):
    health = TrainingHealth(stop=True, window=3, every_n_steps=2)
    module = tiny.gan(generator_optimizer=functools.partial(torch.optim.SGD, lr=0.0))
    with pytest.raises(RuntimeError, match="at update 6, samples have collapsed"):
        run(tmp_path, health, module, At(1, collapsed), max_steps=10)


def test_samples_that_come_nearer_to_data_from_afar_have_not_collapsed(tmp_path):
    far = At(1, lambda m: m.generator.layers[-1].weight.mul_(1000))
    near = At(3, scattered)
    _, heard = run(tmp_path, TrainingHealth(every_n_steps=1, explosion=None), tiny.gan(), far, near)
    assert heard == []


def test_the_distance_is_a_share_of_that_of_the_batch(tmp_path):
    told, _ = run(tmp_path, TrainingHealth(every_n_steps=3, num_samples=5), tiny.gan(), max_steps=3)
    module, data = tiny.gan(), tiny.ring(batch_size=16)
    seen = []
    keep = At(3, lambda m: None)
    keep.on_train_batch_end = lambda trainer, module, outputs, batch, i: seen.append(batch["image"])
    tiny.train(tmp_path, module, data, callbacks=[keep])
    samples = module.sample(5, generator=sample_generators(0, 5))
    expected = mean_distance(samples) / mean_distance(seen[2][:5])
    assert told.logged[2]["train/sample_distance"] == pytest.approx(expected)


def test_samples_come_from_the_averaged_weights_and_all_classes(tmp_path):
    labels = []
    module = tiny.image_gan(num_classes=10)
    draw = module.sample
    module.sample = lambda num, label=None, generator=None: (labels.append(label), draw(num, label, generator))[1]
    frozen = EMA(half_life=1e9, ramp_up=None)  # stays the untrained network
    shifted = At(2, lambda m: m.generator.layers[-2].weight.zero_())
    health = TrainingHealth(every_n_steps=1, num_samples=12)
    told, heard = run(tmp_path, health, module, frozen, shifted, data=tiny.digits(), max_steps=3)
    assert heard == []
    assert all(torch.equal(label, torch.arange(12) % 10) for label in labels)
    distances = [row["train/sample_distance"] for row in told.logged]
    assert min(distances) > 0.3 * max(distances)


def test_lost_modes_are_caught_by_a_metric(tmp_path):
    class Modes(L.Callback):
        def on_validation_epoch_end(self, trainer, pl_module) -> None:
            pl_module.log("val/modes", float({2: 8, 4: 5, 6: 3}[trainer.global_step]))

    health = TrainingHealth(stop=True, coverage="val/modes", every_n_steps=None)
    options = {"limit_val_batches": 1, "val_check_interval": 2, "max_steps": 8}
    with pytest.raises(RuntimeError, match="at update 6, val/modes is 3, and was 8: modes were lost"):
        run(tmp_path, health, tiny.gan(), Modes(), data=tiny.ring(), **options)


def test_a_metric_of_ours_can_be_watched_and_one_that_is_not_there_is_refused(tmp_path):
    options = {"data": tiny.ring(), "limit_val_batches": 1, "val_check_interval": 2}
    health = TrainingHealth(coverage="val/modes", every_n_steps=None)
    _, heard = run(tmp_path, health, tiny.gan(), ModeCoverage(50), **options)
    assert heard == []
    health = TrainingHealth(coverage="val/fid", every_n_steps=None)
    with pytest.raises(ValueError, match=r"coverage must be one of \[.*'val/real_logits'.*\], got 'val/fid'"):
        run(tmp_path, health, tiny.gan(), **options)


def test_a_last_batch_of_one_image_says_nothing(tmp_path):
    told, heard = run(tmp_path, TrainingHealth(every_n_steps=1), tiny.gan(), data=tiny.ring(batch_size=1))
    assert heard == []
    assert all("train/sample_distance" not in row for row in told.logged)


# ---- state, logs, config


def test_a_resumed_run_knows_what_the_whole_one_knows(tmp_path):
    def train(steps, folder, ckpt_path=None):
        health = TrainingHealth(window=4, every_n_steps=2)
        others = [At(1, scattered), Checkpoint(100, dirpath=str(tmp_path / folder))]
        options = {"max_steps": steps, "ckpt_path": ckpt_path}
        run(tmp_path, health, tiny.gan(), *others, **options)
        return health

    whole = train(9, "whole")
    train(5, "stopped")
    resumed = train(9, "resumed", tmp_path / "stopped" / "last.ckpt")
    assert resumed.state_dict() == whole.state_dict()
    assert len(whole.state_dict()["first"]["generator"]) == 4
    assert whole.state_dict()["distance"] is not None


def test_what_was_found_but_not_yet_told_survives_a_resume(tmp_path):
    poison = At(3, set_to("decoder", float("nan")))
    options = {"log_every_n_steps": 6, "max_steps": 4}
    run(tmp_path, TrainingHealth(), tiny.vae(), poison, Checkpoint(100, dirpath=str(tmp_path)), **options)
    health = TrainingHealth(stop=True)
    with pytest.raises(RuntimeError, match="not finite since update 3"):
        run(tmp_path, health, tiny.vae(), log_every_n_steps=6, max_steps=12, ckpt_path=tmp_path / "last.ckpt")


def test_a_state_is_not_changed_by_what_follows(tmp_path):
    health = TrainingHealth(every_n_steps=None)
    run(tmp_path, health, tiny.gan(), max_steps=2)
    saved = health.state_dict()
    kept = copy.deepcopy(saved)
    run(tmp_path, health, tiny.gan(), max_steps=4)
    assert saved == kept != health.state_dict()


def test_a_stopped_run_leaves_the_checkpoint_before_the_failure(tmp_path):
    checkpoint = Checkpoint(1, dirpath=str(tmp_path))
    with pytest.raises(RuntimeError, match="at update 3"):
        run(tmp_path, TrainingHealth(stop=True), tiny.vae(), At(3, set_to("decoder", float("nan"))), checkpoint)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert state["global_step"] == 2
    assert all(value.isfinite().all() for value in state["state_dict"].values())


def test_accumulated_gradients_are_judged_once_an_update(tmp_path):
    health, module, drawn = TrainingHealth(window=100, every_n_steps=2), tiny.vae(), []
    draw = module.sample
    module.sample = lambda *arguments: (drawn.append(1), draw(*arguments))[1]
    _, heard = run(tmp_path, health, module, accumulate_grad_batches=3, max_steps=5)
    assert heard == []
    assert len(drawn) == 2
    assert len(health.state_dict()["first"]["vae"]) == 5
    health = TrainingHealth(window=3, explosion=50.0, every_n_steps=None)
    _, heard = run(tmp_path, health, steady(), blown(), accumulate_grad_batches=2, max_steps=8)
    assert len(heard) == 1


def test_the_loggers_get_their_row(tmp_path):
    logger = CSVLogger(tmp_path, name="runs", version="one")
    health = TrainingHealth(every_n_steps=2)
    run(tmp_path, health, tiny.gan(), logger=logger, log_every_n_steps=3)
    lines = (tmp_path / "runs" / "one" / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("train/sample_distance")
    assert [float(line.split(",")[column]) > 0 for line in lines[1:]] == [True, True]


def test_a_config_can_set_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    health = {
        "class_path": "lit_generative.callbacks.training_health.TrainingHealth",
        "init_args": {"stop": True, "window": 2, "saturation": None, "every_n_steps": 2, "num_samples": 8},
    }
    trainer = {
        "accelerator": "cpu", "max_steps": 3, "log_every_n_steps": 1, "limit_val_batches": 0, "callbacks": [health],
    }  # fmt: skip
    path = tmp_path / "health.yaml"
    path.write_text(yaml.safe_dump({"trainer": trainer}))
    config = str(CONFIGS / "vae" / "vae_digits.yaml")
    main(["fit", "--config", config, "--config", str(path)])
    assert "train/unhealthy" in next(tmp_path.rglob("metrics.csv")).read_text()


# ---- refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"every_n_steps": 0}, "every_n_steps must be at least 1, got 0"),
        ({"num_samples": 1}, "num_samples must be at least 2, got 1"),
        ({"saturation": 0.0}, "saturation must be positive, got 0.0"),
        ({"explosion": -1.0}, "explosion must be positive, got -1.0"),
        ({"collapse": 1.0}, "collapse must lie between 0 and 1, got 1.0"),
    ],
)
def test_numbers_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=f"TrainingHealth: {message}"):
        TrainingHealth(**arguments)


def test_modules_without_samples_batches_without_images_and_runs_without_logs_are_refused(tmp_path):
    with pytest.raises(TypeError, match=r"Middle has no sample\(\) and num_classes"):
        TrainingHealth().setup(tiny.trainer(tmp_path), Middle(), "fit")
    with pytest.raises(ValueError, match="log_every_n_steps must be at least 1, got 0"):
        TrainingHealth().setup(tiny.trainer(tmp_path, log_every_n_steps=0), tiny.gan(), "fit")
    health = TrainingHealth()
    with pytest.raises(TypeError, match=r"a batch has no batch\['image'\] to compare"):
        health._check_samples(tiny.trainer(tmp_path), tiny.gan(), [torch.zeros(2, 2)])
