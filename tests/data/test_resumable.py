import contextlib
import warnings
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel

from lit_generative.data.digits import Digits
from lit_generative.data.mixtures import RingMixture
from lit_generative.types import DescribesData

NUM_BATCHES = 6  # 30 training points, batches of 5


def points(**kwargs) -> RingMixture:
    return RingMixture(num_samples=40, batch_size=5, val_fraction=0.2, test_fraction=0.05, **kwargs)


class Recorder(L.LightningModule):
    """Trains one weight and keeps every batch it sees."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[torch.Tensor] = []
        self.fail_at = fail_at

    def training_step(self, batch, batch_idx):
        if self.global_step == self.fail_at:
            raise KeyboardInterrupt
        self.seen.append(batch["image"])
        return self.weight.square() + 0 * batch["image"].sum()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(**kwargs) -> L.Trainer:
    defaults = {"max_epochs": 3, "barebones": False, "accelerator": "cpu", "logger": False, "num_sanity_val_steps": 0}
    return L.Trainer(**defaults | {"enable_progress_bar": False, "enable_model_summary": False} | kwargs)


def seen_in_a_fit(data: RingMixture, ckpt_path=None, fail_at=None, **kwargs) -> list[torch.Tensor]:
    model = Recorder(fail_at)
    with contextlib.suppress(SystemExit):  # how Lightning ends after a KeyboardInterrupt
        trainer(**kwargs).fit(model, datamodule=data, ckpt_path=ckpt_path)
    return model.seen


def assert_same_batches(got: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(got) == len(expected)
    for left, right in zip(got, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0)


class SaveOn(Callback):
    """Saves once, in the given hook, at the given number of steps."""

    def __init__(self, hook: str, step: int, path) -> None:
        self.step, self.path = step, str(path)
        setattr(self, hook, self.save)

    def save(self, trainer, *args, **kwargs) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize(
    ("hook", "step"),
    [
        ("on_train_batch_end", 1),
        ("on_train_batch_end", 4),
        ("on_train_batch_end", NUM_BATCHES),
        ("on_train_batch_end", NUM_BATCHES + 2),
        ("on_validation_end", 3),
        ("on_validation_end", NUM_BATCHES),
        ("on_train_epoch_end", NUM_BATCHES),
        ("on_train_epoch_end", 2 * NUM_BATCHES),
    ],
)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_run_sees_exactly_the_remaining_batches(tmp_path, hook, step, num_workers):
    save = SaveOn(hook, step, tmp_path / "a.ckpt")
    whole = seen_in_a_fit(points(), callbacks=[save], val_check_interval=3, enable_checkpointing=False)
    assert len(whole) == 3 * NUM_BATCHES
    data = points(num_workers=num_workers, persistent_workers=num_workers > 0)
    rest = seen_in_a_fit(data, tmp_path / "a.ckpt", val_check_interval=3, enable_checkpointing=False)
    assert_same_batches(rest, whole[step:])


def test_a_run_that_was_interrupted_in_the_middle_of_a_step_repeats_that_step(tmp_path):
    whole = seen_in_a_fit(points(), enable_checkpointing=False)
    callback = ModelCheckpoint(tmp_path, save_last=True, save_on_exception=True)
    begun = seen_in_a_fit(points(), fail_at=8, callbacks=[callback])
    (saved,) = tmp_path.glob("*step=8*.ckpt")
    rest = seen_in_a_fit(points(), saved, enable_checkpointing=False)
    assert_same_batches(begun + rest, whole)


def test_a_second_fit_goes_on_with_the_next_epoch():
    whole = seen_in_a_fit(points(), enable_checkpointing=False)
    model, data, again = Recorder(), points(num_workers=1), trainer(max_epochs=2, enable_checkpointing=False)
    again.fit(model, datamodule=data)
    again.fit_loop.max_epochs = 3
    again.fit(model, datamodule=data)
    assert_same_batches(model.seen, whole)


def test_lightning_does_not_advise_against_what_was_done(tmp_path):
    save = SaveOn("on_train_batch_end", 4, tmp_path / "a.ckpt")
    seen_in_a_fit(points(), callbacks=[save], enable_checkpointing=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        seen_in_a_fit(points(), tmp_path / "a.ckpt", enable_checkpointing=False)
    assert not [w for w in caught if "not resumable" in str(w.message) or "not bit-exact" in str(w.message)]


def test_without_its_position_a_resumed_run_starts_the_epoch_anew_and_not_that_of_epoch_zero(tmp_path):
    path = tmp_path / "a.ckpt"
    save = SaveOn("on_train_batch_end", NUM_BATCHES + 2, path)
    whole = seen_in_a_fit(points(), callbacks=[save], enable_checkpointing=False)
    checkpoint = torch.load(path)
    del checkpoint["RingMixture"]
    torch.save(checkpoint, path)
    rest = seen_in_a_fit(points(num_workers=1), path, max_epochs=2, enable_checkpointing=False)
    assert_same_batches(rest, whole[NUM_BATCHES : NUM_BATCHES + len(rest)])


def test_another_batch_size_goes_on_at_the_same_example_with_a_warning(tmp_path):
    save = SaveOn("on_train_batch_end", 4, tmp_path / "a.ckpt")
    seen_in_a_fit(points(), callbacks=[save], enable_checkpointing=False)
    data = points()
    data.load_state_dict(torch.load(tmp_path / "a.ckpt")["RingMixture"])
    data.batch_size = 2
    data.setup()
    with pytest.warns(UserWarning, match=r"RingMixture: this resume is not bit-exact.*batch_size 5 to 2"):
        loader = data.train_dataloader()
    assert len(list(loader)) == 15 - 10


def test_validating_a_checkpoint_does_not_move_a_later_fit(tmp_path):
    save = SaveOn("on_train_batch_end", 4, tmp_path / "a.ckpt")
    whole = seen_in_a_fit(points(), callbacks=[save], enable_checkpointing=False)
    data, model = points(), Recorder()
    trainer(enable_checkpointing=False).validate(model, datamodule=data, ckpt_path=tmp_path / "a.ckpt", verbose=False)
    trainer(enable_checkpointing=False, max_epochs=1).fit(model, datamodule=data)
    assert_same_batches(model.seen, whole[:NUM_BATCHES])


def test_the_order_follows_the_global_seed(monkeypatch):
    data = points()
    data.setup()
    orders = []
    for seed in ("1", "1", "2"):
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        orders.append(torch.cat([batch["image"] for batch in data.train_dataloader()]))
    torch.testing.assert_close(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])


def test_two_processes_see_the_batches_of_one_of_twice_the_size():
    def batches(batch_size: int, world_size: int, rank: int) -> list[torch.Tensor]:
        data = points()
        data.batch_size = data.eval_batch_size = batch_size
        data.trainer = SimpleNamespace(world_size=world_size, global_rank=rank, current_epoch=1, overfit_batches=0)
        data.setup("fit")
        return [batch["image"] for loader in (data.train_dataloader(), data.val_dataloader()) for batch in loader]

    joined = [torch.cat(pair) for pair in zip(batches(3, 2, 0), batches(3, 2, 1), strict=True)]
    assert_same_batches(joined, batches(6, 1, 0))


def test_evaluation_covers_all_examples_in_the_order_of_the_data():
    data = points(eval_batch_size=3)
    data.setup()
    batches = [batch["image"] for batch in data.val_dataloader()]
    assert [len(batch) for batch in batches] == [3, 3, 2]
    torch.testing.assert_close(torch.cat(batches), data.splits.val.image)
    torch.testing.assert_close(next(iter(data.test_dataloader()))["image"], data.splits.test.image)


def test_an_empty_split_has_no_loader():
    data = Digits(val_fraction=0.0, test_fraction=0.0)
    data.setup()
    assert data.val_dataloader() == []
    assert data.test_dataloader() == []


def test_predict_draws_each_sample_once():
    class Sampler(Recorder):
        def predict_step(self, batch, batch_idx):
            return batch

    data = points(num_predict_samples=7, eval_batch_size=3)
    drawn = trainer(enable_checkpointing=False).predict(Sampler(), datamodule=data)
    assert [batch.tolist() for batch in drawn] == [[0, 1, 2], [3, 4, 5], [6]]


def test_drop_last_decides_about_the_incomplete_batch():
    sizes = {}
    for drop_last in (True, False):
        data = RingMixture(num_samples=40, batch_size=7, val_fraction=0.2, test_fraction=0.05, drop_last=drop_last)
        data.setup()
        sizes[drop_last] = [len(batch["label"]) for batch in data.train_dataloader()]
    assert sizes == {True: [7, 7, 7, 7], False: [7, 7, 7, 7, 2]}


def test_loader_options_reach_the_loader():
    data = points(num_workers=1, pin_memory=True, persistent_workers=True)
    data.setup()
    for loader in (data.train_dataloader(), data.val_dataloader()):
        assert (loader.num_workers, loader.pin_memory, loader.persistent_workers) == (1, True, True)


def test_a_data_module_describes_its_data():
    assert isinstance(Digits(), DescribesData)
    assert isinstance(RingMixture(), DescribesData)


def test_a_batch_larger_than_the_training_set_is_refused_unless_it_may_be_incomplete():
    data = RingMixture(num_samples=40, batch_size=31, val_fraction=0.2, test_fraction=0.05)
    with pytest.raises(ValueError, match=r"RingMixture: .* 31 \* 1 processes = 31 for 30 examples.*Lower batch_size"):
        data.setup("fit")
    data.setup("test")
    data.drop_last = False
    data.setup("fit")
    assert len(data.train_dataloader()) == 1


def test_the_batches_of_all_processes_together_must_fit_into_the_training_set():
    data = RingMixture(num_samples=40, batch_size=16, val_fraction=0.2, test_fraction=0.05)
    data.setup("fit")
    data.trainer = SimpleNamespace(world_size=2, global_rank=0, current_epoch=0, overfit_batches=0)
    with pytest.raises(ValueError, match=r"16 \* 2 processes = 32 for 30 examples"):
        data.setup("fit")


def test_splits_that_leave_nothing_to_train_on_are_refused():
    with pytest.raises(ValueError, match="no training examples left"):
        RingMixture(num_samples=1, val_fraction=0.9, test_fraction=0.0).setup("fit")


def test_overfit_batches_is_refused_since_it_replaces_the_sampler():
    with pytest.raises(ValueError, match=r"overfit_batches\) must be 0, got 2.*limit_train_batches"):
        trainer(overfit_batches=2, enable_checkpointing=False).fit(Recorder(), datamodule=points())


def test_data_is_asked_for_after_setup_only():
    with pytest.raises(ValueError, match="RingMixture: there is no data before setup"):
        points().train_dataloader()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"eval_batch_size": 0}, "eval_batch_size must be at least 1, got 0"),
        ({"num_predict_samples": 0}, "num_predict_samples must be at least 1, got 0"),
        ({"num_workers": -1}, "num_workers must be at least 0, got -1"),
        ({"persistent_workers": True}, "persistent_workers needs num_workers of at least 1, got 0"),
        ({"val_fraction": 1.0}, "val_fraction must be at least 0 and below 1, got 1.0"),
    ],
)
def test_an_argument_out_of_range_is_refused(argument, message):
    with pytest.raises(ValueError, match=f"RingMixture: {message}"):
        RingMixture(**argument)


def from_command_line(*options: str) -> L.LightningDataModule:
    args = ["--data=lit_generative.data.digits.Digits", "--trainer.logger=false", *options]
    cli = {"save_config_callback": None, "seed_everything_default": False, "run": False, "subclass_mode_data": True}
    return LightningCLI(BoringModel, L.LightningDataModule, args=args, **cli).datamodule


def test_the_command_line_knows_the_arguments_of_all_bases():
    data = from_command_line("--data.batch_size=32", "--data.image_size=16", "--data.test_fraction=0.5")
    assert (data.batch_size, data.sample_shape, data.test_fraction) == (32, (1, 16, 16), 0.5)


def test_the_command_line_refuses_an_unknown_argument(capsys):
    with pytest.raises(SystemExit):
        from_command_line("--data.imagesize=16")
    assert "imagesize" in capsys.readouterr().err
