import functools

import lightning as L
import pytest
import torch
from torch import nn

from lit_generative.callbacks.checkpoint import Checkpoint
from lit_generative.callbacks.ema import EMA, averaged_weights
from lit_generative.training.averages import ema_state
from lit_generative.training.checkpoint_io import load_checkpoint
from tests import tiny


class History(L.Callback):
    """The weights after each batch, and whether the batch was an update."""

    def __init__(self) -> None:
        self.before: dict[str, torch.Tensor] = {}
        self.after: list[tuple[int, dict[str, torch.Tensor]]] = []

    def on_train_start(self, trainer, pl_module) -> None:
        self.before = tiny.weights(pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.after.append((trainer.global_step, tiny.weights(pl_module)))


class Evaluated(L.Callback):
    """The weights that validation, test and prediction see in their steps."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0) -> None:
        self.seen.append(tiny.weights(pl_module))

    on_test_batch_start = on_validation_batch_start
    on_predict_batch_start = on_validation_batch_start


def _by_hand(history: History, names: list[str], images: list[int], half_life: float, ramp_up: float):
    """``average = w * live + (1 - w) * average`` with ``w = 1 - 2**(-images / half-life)``."""
    keys = [key for key in history.before if key.partition(".")[0] in names]
    average = {key: history.before[key].double() for key in keys}
    seen = 0
    for (_, live), num in zip(history.after, images, strict=True):
        seen += num
        share = 1 - 2 ** (-num / min(half_life, ramp_up * seen))
        average = {key: share * live[key].double() + (1 - share) * average[key] for key in keys}
    return {key: value.float() for key, value in average.items()}


ADAM = functools.partial(torch.optim.Adam, lr=0.05)  # so that weights and average are far apart


def _gan(**kwargs):
    return tiny.gan(generator_optimizer=ADAM, discriminator_optimizer=ADAM, **kwargs)


def _vae(**kwargs):
    return tiny.vae(optimizer=ADAM, **kwargs)


MODULES = pytest.mark.parametrize(
    ("build", "data", "names"),
    [(_gan, tiny.ring, ["generator"]), (_vae, tiny.digits, ["encoder", "decoder"])],
    ids=["gan", "vae"],
)


@MODULES
def test_the_average_is_the_one_computed_by_hand(tmp_path, build, data, names):
    ema, history = EMA(half_life=10, ramp_up=1e9), History()
    tiny.train(tmp_path, build(), data(), max_steps=4, callbacks=[ema, history])
    average = ema.state_dict()["weights"]["ema"]
    assert ema.images == 24
    torch.testing.assert_close(average, _by_hand(history, names, [6] * 4, 10, 1e9))
    assert not any(torch.allclose(average[key], history.after[-1][1][key]) for key in average)


@MODULES
def test_the_ramp_up_shortens_the_half_life_early(tmp_path, build, data, names):
    ema, history = EMA(half_life=8, ramp_up=0.5), History()
    tiny.train(tmp_path, build(), data(), max_steps=4, callbacks=[ema, history])
    # half-lives 3, 6, 8, 8
    torch.testing.assert_close(ema.state_dict()["weights"]["ema"], _by_hand(history, names, [6] * 4, 8, 0.5))


def test_accumulated_batches_count_as_one_update_of_all_their_images(tmp_path):
    ema, history = EMA(half_life=10, ramp_up=1e9), History()
    kwargs = {"max_steps": 3, "accumulate_grad_batches": 2, "callbacks": [ema, history]}
    tiny.train(tmp_path, _vae(), tiny.digits(), **kwargs)
    history.after = history.after[1::2]
    assert [step for step, _ in history.after] == [1, 2, 3]
    expected = _by_hand(history, ["encoder", "decoder"], [12] * 3, 10, 1e9)
    torch.testing.assert_close(ema.state_dict()["weights"]["ema"], expected)


def test_the_average_depends_on_the_images_not_on_the_batch_size():
    """Two half batches of constant weights move the average as far as a whole one."""
    averages = []
    for sizes in ((12,), (6, 6), (4, 4, 4)):
        ema, module = EMA(half_life=10, ramp_up=1e9), _gan()
        trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
        ema.setup(trainer, module, "fit")
        ema.on_train_start(trainer, module)
        with torch.no_grad():
            for p in module.parameters():
                p.add_(1)
        for size in sizes:
            ema.on_before_optimizer_step(trainer, module, module.configure_optimizers()[0]["optimizer"])
            ema.on_train_batch_end(trainer, module, None, {"image": torch.zeros(size, 2)}, 0)
        averages.append(ema.state_dict()["weights"]["ema"])
    torch.testing.assert_close(averages[0], averages[1])
    torch.testing.assert_close(averages[0], averages[2])


@pytest.mark.parametrize("batch", [torch.zeros(5, 2), [torch.zeros(5, 2)], ({"a": torch.zeros(5)},)])
def test_the_images_of_a_batch_are_counted_whatever_its_form(batch):
    ema, module = EMA(), _gan()
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    ema.setup(trainer, module, "fit")
    ema.on_train_start(trainer, module)
    ema.on_before_optimizer_step(trainer, module, module.configure_optimizers()[0]["optimizer"])
    ema.on_train_batch_end(trainer, module, None, batch, 0)
    assert ema.images == 5


def test_an_update_of_the_discriminator_alone_does_not_move_the_average():
    ema, module = EMA(half_life=1), _gan()
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    ema.setup(trainer, module, "fit")
    ema.on_train_start(trainer, module)
    ema.on_before_optimizer_step(trainer, module, module.configure_optimizers()[1]["optimizer"])
    ema.on_train_batch_end(trainer, module, None, torch.zeros(5, 2), 0)
    assert ema.images == 0


@MODULES
def test_only_what_samples_come_from_is_averaged(tmp_path, build, data, names):
    ema, module = EMA(), build()
    tiny.train(tmp_path, module, data(), callbacks=[ema])
    expected = {f"{n}.{key}" for n in names for key, _ in getattr(module, n).named_parameters()}
    assert set(ema.state_dict()["weights"]["ema"]) == expected


def test_buffers_are_those_of_the_live_network(tmp_path):
    ema, seen, module = EMA(), Evaluated(), tiny.image_gan()
    options = {"limit_val_batches": 1, "val_check_interval": 3, "limit_train_batches": 3}
    tiny.train(tmp_path, module, tiny.digits(), callbacks=[ema, seen], **options)
    buffers = {key: value for key, value in module.state_dict().items() if "running" in key}
    assert buffers
    tiny.assert_same({key: seen.seen[0][key] for key in buffers}, buffers)


def test_the_modules_to_average_may_be_named(tmp_path):
    ema = EMA(modules=["discriminator.layers"])
    tiny.train(tmp_path, _gan(), tiny.ring(), callbacks=[ema])
    assert {key.rpartition(".")[0].rpartition(".")[0] for key in ema.state_dict()["weights"]["ema"]} == {
        "discriminator.layers"
    }


def test_a_wrong_name_is_refused_with_the_names_there_are(tmp_path):
    match = r"EMA: GAN has no sub-module \['generater'\]. It has: \['generator', 'discriminator'"
    with pytest.raises(ValueError, match=match):
        tiny.train(tmp_path, _gan(), tiny.ring(), callbacks=[EMA(modules=["generater"])])


class Silent(L.LightningModule):
    """Does not say what to average."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch["image"]).mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_module_that_does_not_say_what_to_average_must_be_told(tmp_path):
    with pytest.raises(
        ValueError, match=r"EMA: Silent does not say what to average. Name its sub-modules in `modules`"
    ):
        tiny.train(tmp_path, Silent(), tiny.ring(), callbacks=[EMA()])
    ema = EMA(modules=["layer"])
    tiny.train(tmp_path, Silent(), tiny.ring(), callbacks=[ema])
    assert set(ema.state_dict()["weights"]["ema"]) == {"layer.weight", "layer.bias"}


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"half_life": 0}, r"half_life must be positive, got \{'ema': 0\}"),
        ({"half_life": {"a": 5.0, "b": -1.0}}, "half_life must be positive"),
        ({"ramp_up": 0}, "ramp_up must be positive, got 0"),
        ({"decay": 1.0}, r"decay must lie between 0 and 1, got \{'ema': 1.0\}"),
        ({"decay": {"a": 0.9, "b": 0.0}}, "decay must lie between 0 and 1"),
        ({"half_life": 5, "decay": 0.9}, "got half_life=5 and decay=0.9. Give one"),
        ({"half_life": {}}, "needs a profile"),
        ({"half_life": {"raw": 5}}, "not named first or raw"),
        ({"buffers": "copied"}, r"buffers must be one of \('copy', 'average'\), got 'copied'"),
        ({"device": "cuda"}, r"device must be one of \('same', 'cpu'\), got 'cuda'"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, match):
    with pytest.raises(ValueError, match=f"EMA: .*{match}"):
        EMA(**arguments)


# evaluation with the average


def _check_evaluated(seen: Evaluated, ema: EMA, module, live: dict[str, torch.Tensor]) -> None:
    average = ema.state_dict()["weights"]["ema"]
    tiny.assert_same(seen.seen[-1], live | average)
    tiny.assert_same(tiny.weights(module), live)
    assert not torch.equal(*(next(iter(weights.values())) for weights in (average, live)))


@MODULES
def test_validation_test_and_prediction_see_the_average_and_leave_the_weights(tmp_path, build, data, names):
    ema, seen, module = EMA(half_life=20), Evaluated(), build()
    fitted = tiny.train(tmp_path, module, data(), callbacks=[ema, seen], limit_val_batches=1)
    live = tiny.weights(module)
    for run in (fitted.validate, fitted.test):
        run(module, data(), verbose=False)
        _check_evaluated(seen, ema, module, live)
    fitted.predict(module, data(num_predict_samples=2))
    _check_evaluated(seen, ema, module, live)
    assert len(seen.seen) >= 3


@MODULES
def test_validation_with_the_average_does_not_change_training_by_one_bit(tmp_path, build, data, names):
    trained = []
    for options in ({}, {"limit_val_batches": 1, "val_check_interval": 2, "num_sanity_val_steps": 1}):
        module, ema = build(), EMA(half_life=20)
        tiny.train(tmp_path, module, data(), max_steps=5, callbacks=[ema], **options)
        trained.append((tiny.weights(module), ema.state_dict()["weights"]["ema"]))
    tiny.assert_same(trained[1], trained[0])


def test_validation_during_training_sees_the_average(tmp_path):
    ema, seen, history, module = EMA(half_life=20), Evaluated(), History(), _vae()
    options = {"limit_val_batches": 1, "val_check_interval": 2, "max_steps": 4}
    tiny.train(tmp_path, module, tiny.digits(), callbacks=[ema, seen, history], **options)
    history.after = history.after[:2]
    expected = _by_hand(history, ["encoder", "decoder"], [6, 6], 20, 0.05)
    torch.testing.assert_close(seen.seen[0], history.after[-1][1] | expected)


def test_the_sanity_check_sees_the_initial_weights(tmp_path):
    ema, seen, module = EMA(), Evaluated(), _vae()
    initial = tiny.weights(module)
    tiny.train(tmp_path, module, tiny.digits(), limit_val_batches=1, num_sanity_val_steps=1, callbacks=[ema, seen])
    tiny.assert_same(seen.seen[0], initial)


def test_evaluation_without_an_average_uses_the_weights_there_are(tmp_path):
    module, seen = _vae(), Evaluated()
    live = tiny.weights(module)
    tiny.trainer(tmp_path, callbacks=[EMA(), seen]).test(module, tiny.digits(), verbose=False)
    tiny.assert_same(seen.seen[0], live)
    tiny.assert_same(tiny.weights(module), live)


class Fails(L.Callback):
    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0) -> None:
        if not trainer.sanity_checking:
            raise KeyError("in validation")


def test_an_exception_in_validation_restores_the_weights(tmp_path):
    ema, history, module = EMA(half_life=20), History(), _vae()
    options = {"limit_val_batches": 1, "val_check_interval": 2, "max_steps": 4}
    with pytest.raises(KeyError, match="in validation"):
        tiny.train(tmp_path, module, tiny.digits(), callbacks=[ema, history, Fails()], **options)
    tiny.assert_same(tiny.weights(module), history.after[-1][1])
    torch.testing.assert_close(
        ema.state_dict()["weights"]["ema"], _by_hand(history, ["encoder", "decoder"], [6, 6], 20, 0.05)
    )


def test_the_average_can_be_borrowed_and_is_given_back_after_an_exception(tmp_path):
    ema, module = EMA(half_life=20), _gan()
    fitted = tiny.train(tmp_path, module, tiny.ring(), callbacks=[ema])
    live, average = tiny.weights(module), ema.state_dict()["weights"]["ema"]
    average = {key: value.clone() for key, value in average.items()}
    with averaged_weights(fitted):
        tiny.assert_same(tiny.weights(module), live | average)
        with averaged_weights(fitted):
            tiny.assert_same(tiny.weights(module), live | average)
        tiny.assert_same(tiny.weights(module), live | average)
    tiny.assert_same(tiny.weights(module), live)
    with pytest.raises(KeyError), averaged_weights(fitted):
        raise KeyError
    tiny.assert_same(tiny.weights(module), live)
    tiny.assert_same(ema.state_dict()["weights"]["ema"], average)


def test_without_an_ema_the_weights_to_sample_with_are_the_live_ones(tmp_path):
    module = _gan()
    fitted = tiny.train(tmp_path, module, tiny.ring())
    live = tiny.weights(module)
    with averaged_weights(fitted):
        tiny.assert_same(tiny.weights(module), live)


def _half_precision(tmp_path) -> tuple[EMA, Evaluated, L.Trainer, Silent]:
    ema, seen, module = EMA(half_life=20, modules=["layer"]), Evaluated(), Silent()
    options = {"precision": "bf16-true", "max_steps": 4, "limit_val_batches": 1}
    return ema, seen, tiny.train(tmp_path, module, tiny.ring(), callbacks=[ema, seen], **options), module


def test_weights_of_half_precision_have_an_average_of_single_precision(tmp_path):
    ema, seen, fitted, module = _half_precision(tmp_path)
    average = {key: value.clone() for key, value in ema.state_dict()["weights"]["ema"].items()}
    assert {value.dtype for value in average.values()} == {torch.float32}
    assert any(not torch.equal(value, value.bfloat16().float()) for value in average.values())
    live = tiny.weights(module)
    assert {value.dtype for value in live.values()} == {torch.bfloat16}
    fitted.validate(module, tiny.ring(), verbose=False)
    tiny.assert_same(seen.seen[-1], {key: value.bfloat16() for key, value in average.items()})
    tiny.assert_same(tiny.weights(module), live)


def test_evaluating_does_not_round_the_average_of_weights_of_half_precision(tmp_path):
    ema, _, fitted, module = _half_precision(tmp_path)
    average = {key: value.clone() for key, value in ema.state_dict()["weights"]["ema"].items()}
    fitted.validate(module, tiny.ring(), verbose=False)
    tiny.assert_same(ema.state_dict()["weights"]["ema"], average)


# checkpoints


@MODULES
def test_a_checkpoint_holds_the_weights_and_beside_them_the_average(tmp_path, build, data, names):
    ema, module = EMA(half_life=20), build()
    tiny.train(tmp_path, module, data(), callbacks=[ema, Checkpoint(dirpath=str(tmp_path))])
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    tiny.assert_same(dict(checkpoint["state_dict"]), tiny.weights(module))
    tiny.assert_same(ema_state(checkpoint), ema.state_dict()["weights"]["ema"])
    assert set(ema_state(checkpoint)) <= set(checkpoint["state_dict"])


def test_a_checkpoint_without_an_average_has_none(tmp_path):
    tiny.train(tmp_path, _gan(), tiny.ring(), callbacks=[Checkpoint(dirpath=str(tmp_path))])
    assert ema_state(load_checkpoint(tmp_path / "last.ckpt")) is None
    assert ema_state({}) is None
    assert ema_state({"callbacks": {"EMA": {"images": 0, "weights": {}}}}) is None


@MODULES
def test_a_resumed_average_is_that_of_an_uninterrupted_run_bit_for_bit(tmp_path, build, data, names):
    whole = EMA(half_life=20)
    tiny.train(tmp_path, build(), data(), max_steps=5, callbacks=[whole])
    tiny.train(tmp_path, build(), data(), callbacks=[EMA(half_life=20), Checkpoint(dirpath=str(tmp_path))])
    resumed = EMA(half_life=20)
    last = tmp_path / "last.ckpt"
    tiny.train(tmp_path, build(seed=9), data(), max_steps=5, callbacks=[resumed], ckpt_path=last)
    assert resumed.images == whole.images == 30
    tiny.assert_same(resumed.state_dict()["weights"]["ema"], whole.state_dict()["weights"]["ema"])


@MODULES
def test_several_resumed_averages_with_buffers_are_those_of_an_uninterrupted_run(tmp_path, build, data, names):
    def ema():
        return EMA(half_life={"short": 10, "long": 100}, ramp_up=None, buffers="average")

    whole, resumed = ema(), ema()
    tiny.train(tmp_path, build(), data(), max_steps=5, callbacks=[whole])
    tiny.train(tmp_path, build(), data(), callbacks=[ema(), Checkpoint(dirpath=str(tmp_path))])
    last = tmp_path / "last.ckpt"
    tiny.train(tmp_path, build(seed=9), data(), max_steps=5, callbacks=[resumed], ckpt_path=last)
    tiny.assert_same(resumed.state_dict(), whole.state_dict())


def test_resuming_with_other_modules_than_the_average_was_trained_with_is_refused(tmp_path):
    tiny.train(tmp_path, _gan(), tiny.ring(), callbacks=[EMA(), Checkpoint(dirpath=str(tmp_path))])
    other = [EMA(modules=["generator", "discriminator"])]
    with pytest.raises(ValueError, match=r"holds other weights than the model, for example discriminator\.\S+ Use the"):
        tiny.train(tmp_path, _gan(), tiny.ring(), max_steps=5, callbacks=other, ckpt_path=tmp_path / "last.ckpt")


@pytest.mark.parametrize("fresh", [False, True], ids=["after fit", "in a new process"])
@MODULES
def test_testing_a_checkpoint_uses_its_average(tmp_path, build, data, names, fresh):
    ema, seen, module = EMA(half_life=20), Evaluated(), build()
    callbacks = [ema, seen, Checkpoint(dirpath=str(tmp_path))]
    fitted = tiny.train(tmp_path, module, data(), callbacks=callbacks)
    if fresh:
        ema, seen, module = EMA(half_life=20), Evaluated(), build(seed=9)
        fitted = tiny.trainer(tmp_path, callbacks=[ema, seen])
    checkpoint = load_checkpoint(tmp_path / "last.ckpt")
    for run in (fitted.test, fitted.validate):
        run(module, data(), ckpt_path=tmp_path / "last.ckpt", verbose=False)
        tiny.assert_same(seen.seen[-1], dict(checkpoint["state_dict"]) | ema_state(checkpoint))
        tiny.assert_same(tiny.weights(module), dict(checkpoint["state_dict"]))


def test_training_goes_on_after_a_test_in_the_same_process(tmp_path):
    trained = []
    for tests in (False, True):
        ema, module = EMA(half_life=20), _vae()
        data = tiny.digits()
        fitted = tiny.train(tmp_path, module, data, callbacks=[ema, Checkpoint(dirpath=str(tmp_path))])
        if tests:
            fitted.test(module, data, ckpt_path=tmp_path / "last.ckpt", verbose=False)
        fitted.fit_loop.epoch_loop.max_steps = 5
        fitted.fit(module, data, ckpt_path=tmp_path / "last.ckpt")
        assert fitted.global_step == 5
        trained.append((tiny.weights(module), ema.state_dict()["weights"]["ema"]))
    tiny.assert_same(trained[1], trained[0])
