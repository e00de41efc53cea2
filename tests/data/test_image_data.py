import lightning as L
import pytest
import torch
from torch.nn import functional as F
from typing_extensions import override

from lit_generative.data.image_data import ImageDataModule, LabelledImages, fit_images


def pictures(num: int = 1, height: int = 4, width: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, 256, (num, 3, height, width), dtype=torch.uint8, generator=generator)


class Pictures(ImageDataModule):
    """40 training and 5 test pictures; a picture's label is its index."""

    @property
    @override
    def num_classes(self):
        return 45

    @property
    @override
    def native_shape(self):
        return (3, 4, 6)

    @override
    def load_splits(self):
        everything = LabelledImages(pictures(45), torch.arange(45))
        return self.split_images(everything.take(torch.arange(40)), everything.take(torch.arange(40, 45)))


class Fetch(L.LightningModule):
    """Hands back what a loader gives, after the transfer hooks."""

    def __init__(self):
        super().__init__()
        self.batches = []

    def training_step(self, batch, batch_idx):
        self.batches.append(batch)

    def configure_optimizers(self):
        return None

    def predict_step(self, batch, batch_idx):
        return batch


def trained_on(data: ImageDataModule) -> list[dict[str, torch.Tensor]]:
    model = Fetch()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    L.Trainer(max_epochs=1, accelerator="cpu", enable_checkpointing=False, **quiet).fit(model, datamodule=data)
    return model.batches


def test_images_reach_the_model_as_floats_between_minus_one_and_one():
    class BlackAndWhite(Pictures):
        def load_splits(self):
            images = torch.tensor([0, 255], dtype=torch.uint8).repeat(20).reshape(40, 1, 1, 1).expand(40, 3, 4, 6)
            return self.split_images(
                LabelledImages(images, torch.arange(40)), LabelledImages(images[:0], torch.arange(0))
            )

    for batch in trained_on(BlackAndWhite(batch_size=9)):
        assert batch["image"].dtype == torch.float32
        expected = (batch["label"] % 2 * 2 - 1).float().reshape(9, 1, 1, 1).expand(9, 3, 4, 6)
        torch.testing.assert_close(batch["image"], expected, rtol=0, atol=0)


def test_loaders_yield_bytes_so_that_little_is_copied_to_the_device():
    data = Pictures(batch_size=9)
    data.setup("test")
    batch = next(iter(data.train_dataloader()))
    assert (batch["image"].dtype, batch["image"].shape) == (torch.uint8, (9, 3, 4, 6))
    assert (batch["label"].dtype, batch["label"].shape) == (torch.int64, (9,))


def test_indices_of_samples_to_predict_are_left_alone():
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(accelerator="cpu", enable_checkpointing=False, **quiet)
    assert [batch.tolist() for batch in trainer.predict(Fetch(), datamodule=Pictures(num_predict_samples=3))] == [
        [0, 1, 2]
    ]


def test_the_splits_are_disjoint_and_do_not_depend_on_the_global_seed():
    runs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        data = Pictures(val_fraction=0.25)
        data.setup("test")
        runs.append([split.label.tolist() for split in data.splits])
    assert runs[0] == runs[1]
    train, val, test = runs[0]
    assert (len(train), len(val), len(test)) == (30, 10, 5)
    assert sorted(train + val + test) == list(range(45))


def test_another_split_seed_validates_on_other_images():
    labels = []
    for seed in (0, 1):
        data = Pictures(val_fraction=0.25, split_seed=seed)
        data.setup("test")
        labels.append(data.splits.val.label.tolist())
    assert labels[0] != labels[1]


def test_images_keep_their_labels():
    data = Pictures(batch_size=9, horizontal_flip=False)
    data.setup("test")
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        for batch in loader:
            torch.testing.assert_close(batch["image"], pictures(45)[batch["label"]])


def test_flips_are_made_in_training_only_and_are_the_same_in_each_run():
    runs = []
    for _ in range(2):
        data = Pictures(batch_size=36, horizontal_flip=True)
        data.setup("test")
        for loader in (data.val_dataloader(), data.test_dataloader()):
            for batch in loader:
                torch.testing.assert_close(batch["image"], pictures(45)[batch["label"]])
        (batch,) = data.train_dataloader()
        runs.append(batch["image"])
    torch.testing.assert_close(runs[0], runs[1])
    same = (runs[0] == pictures(45)[batch["label"]]).flatten(1).all(dim=1)
    assert 8 < same.sum() < 28


def test_padding_puts_the_image_in_the_centre_of_a_black_square():
    images = pictures()
    padded = fit_images(images, 9, "pad")
    assert padded.shape == (1, 3, 9, 9)
    torch.testing.assert_close(padded[..., 2:6, 1:7], images)
    assert padded.long().sum() == images.long().sum()


def test_padding_refuses_to_make_images_smaller():
    with pytest.raises(ValueError, match=r"at least 6 for images of 4 x 6, got 5. Use resize='stretch'"):
        fit_images(pictures(), 5, "pad")


def test_stretching_agrees_with_torch_whatever_the_number_of_images():
    images = pictures(1025, 8, 6)
    expected = F.interpolate(images.float(), size=(5, 5), mode="bilinear", antialias=True).round().to(torch.uint8)
    torch.testing.assert_close(fit_images(images, 5, "stretch"), expected)


def test_stretching_takes_the_mean_of_what_it_joins():
    checkerboard = torch.tensor([[0, 200], [200, 0]], dtype=torch.uint8).repeat(8, 8)[None, None]
    assert fit_images(checkerboard, 2, "stretch").unique().tolist() == [100]


def test_cropping_scales_the_shorter_side_and_keeps_the_centre():
    images = pictures(height=4, width=6)
    torch.testing.assert_close(fit_images(images, 4, "crop"), images[..., 1:5])
    assert fit_images(pictures(height=9, width=4), 8, "crop").shape == (1, 3, 8, 8)


@pytest.mark.parametrize("resize", ["pad", "stretch", "crop"])
def test_no_images_remain_no_images(resize):
    assert fit_images(pictures(0), 8, resize).shape == (0, 3, 8, 8)


@pytest.mark.parametrize("resize", ["pad", "stretch", "crop"])
def test_the_described_shape_is_that_of_the_images(resize):
    data = Pictures(image_size=7, resize=resize)
    data.setup("test")
    assert all(split.image.shape[1:] == data.sample_shape == (3, 7, 7) for split in data.splits)
    assert Pictures().sample_shape == (3, 4, 6)


def test_an_image_size_of_zero_and_an_unknown_way_to_resize_are_refused():
    with pytest.raises(ValueError, match="Pictures: image_size must be at least 1, got 0"):
        Pictures(image_size=0)
    with pytest.raises(ValueError, match="Pictures: resize must be 'pad', 'stretch' or 'crop', got 'bend'"):
        Pictures(resize="bend")
