import functools
import io
import os

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from lit_generative.callbacks.checkpoint import Checkpoint
from lit_generative.callbacks.ema import EMA
from lit_generative.callbacks.sample_grid import SampleGrid
from lit_generative.diffusion.conditions import SuperResolution
from lit_generative.networks.diffusers_unet import DiffusersUNet
from lit_generative.pictures import grid
from lit_generative.tensor_ops import from_uint8, sample_generators
from tests import tiny


def _pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path))


def _drawn(module, num: int = 4, seed: int = 0, label=None) -> np.ndarray:
    return grid(module.sample(num, label, sample_generators(seed, num))).numpy()


def test_a_grid_is_drawn_every_n_updates_and_at_the_end(tmp_path):
    tiny.train(tmp_path, tiny.vae(), tiny.digits(), max_steps=7, callbacks=[SampleGrid(3, num_samples=4)])
    names = [f"step_{step:07d}.png" for step in (3, 6, 7)]
    assert sorted(os.listdir(tmp_path / "samples")) == names


def test_a_grid_that_falls_on_the_end_is_drawn_once(tmp_path):
    drawn = []

    class Counts(SampleGrid):
        def _show(self, trainer, picture) -> None:
            drawn.append(trainer.global_step)

    tiny.train(tmp_path, tiny.vae(), tiny.digits(), max_steps=6, callbacks=[Counts(3, num_samples=4)])
    assert drawn == [3, 6]


def test_with_accumulated_gradients_a_grid_is_drawn_once_an_update(tmp_path):
    drawn = []

    class Counts(SampleGrid):
        def _show(self, trainer, picture) -> None:
            drawn.append(trainer.global_step)

    options = {"accumulate_grad_batches": 3, "max_steps": 3, "callbacks": [Counts(1, num_samples=4)]}
    tiny.train(tmp_path, tiny.vae(), tiny.digits(), **options)
    assert drawn == [1, 2, 3]


def test_the_last_grid_shows_the_samples_of_the_trained_module(tmp_path):
    module = tiny.vae()
    tiny.train(tmp_path, module, tiny.digits(), callbacks=[SampleGrid(num_samples=5, columns=4, seed=3)])
    expected = grid(module.sample(5, None, sample_generators(3, 5)), columns=4).numpy()
    np.testing.assert_array_equal(_pixels(tmp_path / "samples" / "step_0000003.png"), expected)


def test_noise_is_the_same_each_time_and_another_with_another_seed(tmp_path):
    still = tiny.vae(optimizer=torch.optim.SGD)
    for p in still.parameters():
        p.requires_grad_(False)
    still.encoder.layers[0].bias.requires_grad_(True)  # something to train that no sample depends on
    options = {"max_steps": 3}
    tiny.train(tmp_path / "a", still, tiny.digits(), callbacks=[SampleGrid(1, num_samples=4)], **options)
    pictures = [_pixels(tmp_path / "a" / "samples" / f"step_000000{i}.png") for i in (1, 2, 3)]
    np.testing.assert_array_equal(pictures[0], pictures[1])
    np.testing.assert_array_equal(pictures[0], pictures[2])
    tiny.train(tmp_path / "b", still, tiny.digits(), callbacks=[SampleGrid(1, num_samples=4, seed=1)], **options)
    assert not np.array_equal(pictures[0], _pixels(tmp_path / "b" / "samples" / "step_0000001.png"))


@pytest.mark.parametrize(
    ("build", "data"),
    [
        (tiny.image_gan, tiny.digits),
        (tiny.vae, tiny.digits),
        (tiny.point_ddpm, tiny.ring),
    ],
    ids=["gan", "vae", "ddpm"],
)
def test_drawing_does_not_change_training_by_one_bit(tmp_path, build, data):
    trained = []
    for callbacks in ([], [SampleGrid(1, num_samples=4)]):
        module = build()
        tiny.train(tmp_path, module, data(), max_steps=4, callbacks=callbacks)
        assert module.training
        trained.append((tiny.weights(module), torch.get_rng_state()))
    tiny.assert_same(trained[1], trained[0])


class Labels(L.LightningModule):
    """Its samples are as bright as their label."""

    num_classes = 3

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def sample(self, num, label=None, generator=None):
        return (label.float() - 1).reshape(num, 1, 1, 1).expand(num, 1, 4, 4)

    def training_step(self, batch, batch_idx):
        return self.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Careless(Labels):
    """Draws from the global random numbers, in training and in sampling."""

    def __init__(self) -> None:
        super().__init__()
        self.rolls: list[float] = []

    def sample(self, num, label=None, generator=None):
        return torch.rand(num, 1, 4, 4)

    def training_step(self, batch, batch_idx):
        self.rolls.append(float(torch.rand(())))
        return self.weight.sum()


def test_a_model_that_samples_from_the_global_random_numbers_does_not_shift_those_of_training(tmp_path):
    rolls = []
    for callbacks in ([], [SampleGrid(1, num_samples=4)]):
        module = Careless()
        torch.manual_seed(0)
        tiny.train(tmp_path, module, tiny.ring(), callbacks=callbacks)
        rolls.append(module.rolls)
    assert rolls[0] == rolls[1]


def test_samples_come_from_the_averaged_weights(tmp_path):
    ema, module = EMA(half_life=1e6, ramp_up=1e9), tiny.vae(optimizer=functools.partial(torch.optim.Adam, lr=0.05))
    fitted = tiny.train(tmp_path, module, tiny.digits(), callbacks=[ema, SampleGrid(num_samples=4)])
    shown = _pixels(tmp_path / "samples" / "step_0000003.png")
    assert not np.array_equal(shown, _drawn(module))
    with ema.averaged():
        np.testing.assert_array_equal(shown, _drawn(module))
    assert fitted.global_step == 3


def test_points_make_a_scatter_plot(tmp_path):
    module = tiny.gan()
    tiny.train(tmp_path, module, tiny.ring(), callbacks=[SampleGrid(num_samples=4)])
    shown = _pixels(tmp_path / "samples" / "step_0000003.png")
    np.testing.assert_array_equal(shown, _drawn(module))
    assert {tuple(pixel) for pixel in shown.reshape(-1, 3)} == {(255, 255, 255), (31, 78, 121)}


def test_a_model_with_classes_gets_its_labels_in_turn(tmp_path):
    tiny.train(tmp_path, Labels(), tiny.ring(), callbacks=[SampleGrid(num_samples=7, columns=3)])
    shown = _pixels(tmp_path / "samples" / "step_0000003.png")[..., 0]
    # three rows and columns of 4 pixels with borders of 1, enlarged
    factor = shown.shape[1] // 16
    levels = shown[::factor, ::factor][2::5, 2::5].tolist()
    assert levels == [[0, 128, 255], [0, 128, 255], [0, 64, 64]]


def test_a_conditional_model_of_ours_is_drawn_with_all_its_classes(tmp_path):
    module = tiny.image_gan(num_classes=10)
    tiny.train(tmp_path, module, tiny.digits(), callbacks=[SampleGrid(num_samples=12)])
    expected = _drawn(module, 12, label=torch.arange(12) % 10)
    np.testing.assert_array_equal(_pixels(tmp_path / "samples" / "step_0000003.png"), expected)


def test_a_resumed_run_does_not_draw_the_grid_of_its_checkpoint_again(tmp_path):
    callbacks = [SampleGrid(1, num_samples=4), Checkpoint(dirpath=str(tmp_path))]
    tiny.train(tmp_path, tiny.vae(), tiny.digits(), callbacks=callbacks)
    resumed = SampleGrid(1, num_samples=4)
    last = tmp_path / "last.ckpt"
    options = {"accumulate_grad_batches": 3, "max_steps": 5}
    tiny.train(tmp_path / "b", tiny.vae(), tiny.digits(), callbacks=[resumed], ckpt_path=last, **options)
    assert sorted(os.listdir(tmp_path / "b" / "samples")) == ["step_0000004.png", "step_0000005.png"]


def test_half_precision_can_be_drawn(tmp_path):
    options = {"precision": "bf16-mixed", "callbacks": [SampleGrid(num_samples=4)]}
    tiny.train(tmp_path, tiny.vae(), tiny.digits(), **options)
    assert _pixels(tmp_path / "samples" / "step_0000003.png").std() > 0


def test_a_fast_dev_run_writes_no_file(tmp_path):
    tiny.train(tmp_path, tiny.vae(), tiny.digits(), fast_dev_run=2, callbacks=[SampleGrid(1, num_samples=4)])
    assert not list(tmp_path.rglob("*.png"))


# models that draw from images


def enlarging(**options):
    network = DiffusersUNet(8, 1, widths=(8,), layers_per_block=1, attention_levels=(), extra_channels=1, **options)
    return tiny.ddpm(network=network, condition=SuperResolution(2))


VALIDATING = {"max_steps": 2, "limit_val_batches": 2, "num_sanity_val_steps": 2}


@pytest.mark.parametrize("num_classes", [None, 10])
def test_a_model_of_small_images_is_drawn_between_them_and_the_first_of_the_validation(tmp_path, num_classes):
    module, data = enlarging(num_classes=num_classes), tiny.digits(eval_batch_size=6)
    tiny.train(tmp_path, module, data, callbacks=[SampleGrid(1, num_samples=5, columns=3, seed=3)], **VALIDATING)
    assert sorted(os.listdir(tmp_path / "samples")) == ["step_0000001.png", "step_0000002.png"]
    batch = next(iter(data.val_dataloader()))
    x, y = from_uint8(batch["image"][:5]), None if num_classes is None else batch["label"][:5]
    shown, samples = module.samples_of(x, y, sample_generators(3, 5))
    line = torch.full((5, 1, 1, 8), 64 / 127.5 - 1)  # of the colour between the samples of a grid
    expected = grid(torch.cat([shown, line, samples, line, x], dim=2), columns=3).numpy()
    np.testing.assert_array_equal(_pixels(tmp_path / "samples" / "step_0000002.png"), expected)


def test_a_grid_holds_no_more_samples_than_a_batch_of_validation_has_images(tmp_path):
    callback = SampleGrid(num_samples=50, columns=4)
    tiny.train(tmp_path, enlarging(), tiny.digits(eval_batch_size=4), callbacks=[callback], **VALIDATING)
    width, height = Image.open(tmp_path / "samples" / "step_0000002.png").size
    assert (width, height) == (37 * 14, 28 * 14)  # one row: four images of 8 x 26 pixels, enlarged


def test_drawing_from_images_does_not_change_training_by_one_bit(tmp_path):
    trained = []
    for callbacks in ([], [SampleGrid(1, num_samples=4)]):
        module = enlarging()
        tiny.train(tmp_path, module, tiny.digits(), callbacks=callbacks, **VALIDATING)
        trained.append((tiny.weights(module), torch.get_rng_state()))
    tiny.assert_same(trained[1], trained[0])


def test_a_model_of_the_same_family_that_is_shown_nothing_is_drawn_from_noise(tmp_path):
    module = tiny.ddpm()
    tiny.train(tmp_path, module, tiny.digits(), callbacks=[SampleGrid(num_samples=4)], **VALIDATING)
    np.testing.assert_array_equal(_pixels(tmp_path / "samples" / "step_0000002.png"), _drawn(module))


class Colouring(Labels):
    """Draws colours for a grey image, which it is shown."""

    num_classes = None
    condition = "the first channel"

    def samples_of(self, x, label=None, generator=None):
        return x[:, :1], x.flip(1)

    def validation_step(self, batch, batch_idx):
        pass


def test_a_grey_image_may_be_all_that_a_model_is_shown(tmp_path):
    x = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)) * 2 - 1
    data = DataLoader([{"image": x}], batch_size=None)
    options = {"max_steps": 1, "num_sanity_val_steps": 1, "callbacks": [SampleGrid(num_samples=2, columns=2)]}
    tiny.trainer(tmp_path, **options).fit(Colouring(), data, data)
    line = torch.full((2, 3, 1, 5), 64 / 127.5 - 1)
    expected = grid(torch.cat([x[:, :1].expand_as(x), line, x.flip(1), line, x], dim=2), columns=2).numpy()
    np.testing.assert_array_equal(_pixels(tmp_path / "samples" / "step_0000001.png"), expected)


def test_before_any_validation_there_is_no_grid_but_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="SampleGrid: DDPM draws from images, and there was no validation yet"):
        tiny.train(tmp_path, enlarging(), tiny.digits(), callbacks=[SampleGrid(1, num_samples=4)])
    assert not (tmp_path / "samples").exists()


# loggers


def test_a_csv_logger_gets_no_picture_but_its_folder_does(tmp_path):
    logger = CSVLogger(tmp_path, name="runs", version="one")
    tiny.train(tmp_path, tiny.vae(), tiny.digits(), logger=logger, callbacks=[SampleGrid(num_samples=4)])
    folder = tmp_path / "runs" / "one"
    assert os.listdir(folder / "samples") == ["step_0000003.png"]
    assert "samples" not in (folder / "metrics.csv").read_text()


def test_tensorboard_shows_the_grid_beside_the_losses_of_its_update(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="runs", version="one")
    tiny.train(tmp_path, tiny.vae(), tiny.digits(), logger=logger, callbacks=[SampleGrid(2, num_samples=4)])
    events = EventAccumulator(str(tmp_path / "runs" / "one"))
    events.Reload()
    images = events.Images("samples")
    assert [image.step for image in images] == [1, 2]
    assert [scalar.step for scalar in events.Scalars("train/loss")] == [0, 1, 2]
    shown = np.asarray(Image.open(io.BytesIO(images[-1].encoded_image_string)))
    on_disk = _pixels(tmp_path / "runs" / "one" / "samples" / "step_0000003.png")
    np.testing.assert_array_equal(shown, on_disk)


@pytest.mark.slow  # starts wandb's own process
def test_an_offline_wandb_run_holds_the_grid(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, project="tests", offline=True)
    tiny.train(tmp_path, tiny.vae(), tiny.digits(), logger=logger, callbacks=[SampleGrid(num_samples=4)])
    logger.experiment.finish()
    pictures = list(tmp_path.glob("wandb/offline-run-*/files/media/images/*.png"))
    assert len(pictures) == 1
    assert _pixels(pictures[0]).std() > 0
    np.testing.assert_array_equal(_pixels(pictures[0]), _pixels(tmp_path / "samples" / "step_0000003.png"))


@pytest.mark.parametrize(("steps", "expected"), [(None, [10, 20, 25]), (15, [10, 15, 20, 25])])
def test_grids_are_drawn_every_n_epochs_and_at_the_end(tmp_path, steps, expected):
    callbacks = [SampleGrid(steps, every_n_epochs=2, num_samples=2)]
    tiny.train(tmp_path, tiny.vae(), tiny.digits(batch_size=256), max_steps=25, callbacks=callbacks)  # five an epoch
    names = [f"step_{step:07d}.png" for step in expected]
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == names


def test_counting_neither_steps_nor_epochs_is_refused():
    with pytest.raises(ValueError, match="needs every_n_steps or every_n_epochs, got neither"):
        SampleGrid(every_n_steps=None)


# refusals


@pytest.mark.parametrize("arguments", [{"every_n_steps": 0}, {"num_samples": 0}, {"every_n_epochs": -1}])
def test_less_than_one_step_or_sample_is_refused(arguments):
    with pytest.raises(ValueError, match=f"SampleGrid: {next(iter(arguments))} must be at least 1, got"):
        SampleGrid(**arguments)


class Silent(L.LightningModule):
    pass


def test_a_module_that_cannot_sample_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"SampleGrid: Silent has no sample\(\) and num_classes to draw from"):
        SampleGrid().setup(tiny.trainer(tmp_path), Silent(), "fit")
