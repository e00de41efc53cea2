import os

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from PIL import Image
from torch.utils.data import DataLoader

from lit_generative.data.batches import BatchKey, InMemoryExamples, RandomFlip, ResumableBatches
from lit_generative.data.binarization import DynamicBinarization, StaticBinarization, binarize_splits
from lit_generative.data.cifar10 import CIFAR10
from lit_generative.data.digits import Digits
from lit_generative.data.image_data import ImageDataModule
from lit_generative.data.image_folder import ImageFiles, ImageFolder
from lit_generative.data.mnist import MNIST, FashionMNIST
from lit_generative.data.splits import Splits
from lit_generative.data.stacked_digits import StackedDigits
from tests.generated import write_cifar10, write_mnist

SPLITS = ("train", "val", "test")


def same_image(num: int) -> InMemoryExamples:
    """The same grey image ``num`` times; the label is the index."""
    image = torch.tensor([[[0, 1, 64], [127, 254, 255]]], dtype=torch.uint8)
    return InMemoryExamples(image.expand(num, 1, 2, 3), torch.arange(num))


def key(indices: torch.Tensor, epoch: int = 0, batch: int = 0, rank: int = 0) -> BatchKey:
    return BatchKey(epoch, batch, rank, indices)


def made(data: ImageDataModule) -> ImageDataModule:
    data.prepare_data()
    data.setup("fit")
    return data


def examples(data: ImageDataModule) -> list[torch.Tensor]:
    return [data.examples(split, torch.arange(data.num_examples(split))) for split in SPLITS]


def shown(data: ImageDataModule, epoch: int = 0) -> torch.Tensor:
    """The training images of an epoch, in the order of the data."""
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    indices = torch.cat([key.indices for key in loader.sampler])
    images = torch.cat([batch["image"] for batch in loader])
    return images[indices.argsort()]


# ---- the draws


@pytest.mark.parametrize(
    "dataset", [StaticBinarization(same_image(40_000), 0, "train"), DynamicBinarization(same_image(40_000), 0)]
)
def test_values_are_black_or_white_and_grey_on_average(dataset):
    batch = dataset[key(torch.arange(40_000))]
    assert batch["image"].dtype == torch.uint8
    assert batch["image"].unique().tolist() == [0, 255]
    assert batch["label"].tolist() == list(range(40_000))
    grey = dataset.dataset.image[0].double()
    average = batch["image"].double().mean(dim=0)
    torch.testing.assert_close(average, grey, rtol=0, atol=4 * 127.5 / 200)  # four standard errors
    certain = (grey == 0) | (grey == 255)
    torch.testing.assert_close(average[certain], grey[certain], rtol=0, atol=0)


def test_a_static_draw_is_a_function_of_seed_part_and_index_and_of_nothing_else():
    dataset = same_image(300)

    def drawn(seed: int, part: str, indices: torch.Tensor, *when: int) -> torch.Tensor:
        torch.rand(1)  # whatever the global state is
        return StaticBinarization(dataset, seed, part)[key(indices, *when)]["image"]

    reference = drawn(0, "train", torch.arange(300))
    some = torch.tensor([7, 7, 2]).repeat(30) + torch.arange(90)
    torch.testing.assert_close(drawn(0, "train", some, 3, 2, 1), reference[some], rtol=0, atol=0)
    assert not torch.equal(drawn(1, "train", torch.arange(300)), reference)
    assert not torch.equal(drawn(0, "val", torch.arange(300)), reference)
    assert len(reference.flatten(1).unique(dim=0)) >= 4  # two levels of the image are far from sure


def test_a_dynamic_draw_is_a_function_of_seed_epoch_batch_and_rank_and_of_nothing_else():
    dataset, everything = same_image(300), torch.arange(300)

    def drawn(seed: int, *when: int) -> torch.Tensor:
        torch.rand(1)
        return DynamicBinarization(dataset, seed)[key(everything, *when)]["image"]

    reference = drawn(0, 1, 2, 3)
    torch.testing.assert_close(drawn(0, 1, 2, 3), reference, rtol=0, atol=0)
    for other in ((1, 1, 2, 3), (0, 0, 2, 3), (0, 1, 0, 3), (0, 1, 2, 0)):
        assert not torch.equal(drawn(*other), reference)


@pytest.mark.parametrize(
    "wrapper", [StaticBinarization(same_image(20), 0, "val"), DynamicBinarization(same_image(20), 0)]
)
def test_workers_do_not_change_the_draws(wrapper):
    runs = []
    for num_workers in (0, 2):
        sampler = ResumableBatches(wrapper, 6, shuffle_seed=5)
        runs.append(list(DataLoader(wrapper, sampler=sampler, batch_size=None, num_workers=num_workers)))
    for without, with_workers in zip(*runs, strict=True):
        torch.testing.assert_close(without, with_workers)
    assert len(wrapper) == 20


def test_images_in_memory_are_drawn_once_and_stay_there():
    held = binarize_splits(Splits(same_image(2000), same_image(0), same_image(30)), 4, hold_train=True)
    for name, split, num in zip(SPLITS, held, (2000, 0, 30), strict=True):
        assert isinstance(split, InMemoryExamples)
        again = StaticBinarization(same_image(num), 4, name)[key(torch.arange(num))]
        torch.testing.assert_close(split[key(torch.arange(num))], again)


# ---- in a data module


@pytest.mark.parametrize("binarize", ["static", "dynamic"])
@pytest.mark.parametrize("kind", [Digits, StackedDigits, MNIST, FashionMNIST, CIFAR10])
def test_every_split_of_every_data_set_is_black_and_white(tmp_path, monkeypatch, kind, binarize):
    if kind is CIFAR10:
        write_cifar10(tmp_path, monkeypatch)
    if issubclass(kind, MNIST):
        write_mnist(tmp_path)
    options = {StackedDigits: {"num_samples": 100}, Digits: {}}.get(
        kind, {"data_dir": str(tmp_path), "download": False}
    )
    data = made(kind(binarize=binarize, batch_size=4, val_fraction=0.2, image_size=32, **options))
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        assert next(iter(loader))["image"].unique().tolist() == [0, 255]
    for images, split in zip(examples(data), SPLITS, strict=True):
        assert images.unique().tolist() == [0, 255], split
        assert images.shape[1:] == data.sample_shape


def test_without_the_option_images_stay_grey():
    assert len(examples(made(Digits()))[0].unique()) == 17


def test_static_images_are_the_same_at_each_epoch_and_do_not_depend_on_the_global_seed(monkeypatch):
    options = {"binarize": "static", "batch_size": 100, "drop_last": False}
    data = made(Digits(**options))
    expected = examples(data)
    torch.testing.assert_close(shown(data, epoch=3), expected[0], rtol=0, atol=0)
    batches = [loader() for loader in (data.val_dataloader, data.test_dataloader)]
    for loader, images in zip(batches, expected[1:], strict=True):
        torch.testing.assert_close(torch.cat([batch["image"] for batch in loader]), images, rtol=0, atol=0)
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    torch.manual_seed(5)
    other = made(Digits(**options))
    torch.testing.assert_close(examples(other), expected, rtol=0, atol=0)
    torch.testing.assert_close(shown(other), expected[0], rtol=0, atol=0)
    assert not torch.equal(examples(made(Digits(split_seed=1, test_fraction=0.1, **options)))[2], expected[2])


def test_dynamic_training_images_are_drawn_anew_at_each_epoch_and_all_else_is_static(monkeypatch):
    data = made(Digits(binarize="dynamic", batch_size=100, drop_last=False))
    static = examples(made(Digits(binarize="static")))
    torch.testing.assert_close(examples(data), static, rtol=0, atol=0)
    torch.testing.assert_close(
        torch.cat([batch["image"] for batch in data.val_dataloader()]), static[1], rtol=0, atol=0
    )
    grey = examples(made(Digits()))[0].double()
    epochs = torch.stack([shown(data, epoch) for epoch in range(40)])
    torch.testing.assert_close(shown(data, epoch=3), epochs[3], rtol=0, atol=0)
    assert not torch.equal(epochs[0], epochs[1])
    average = epochs.double().mean(dim=0)
    spread = ((grey / 255) * (1 - grey / 255) / 40).sqrt() * 255
    uncertain = spread > 0
    z = (average - grey)[uncertain] / spread[uncertain]
    torch.testing.assert_close(z.square().mean().item(), 1.0, rtol=0, atol=0.02)
    torch.testing.assert_close(average[~uncertain], grey[~uncertain], rtol=0, atol=0)
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    assert not torch.equal(shown(data), epochs[0])


def test_the_seed_of_training_decides_about_dynamic_draws():
    data, some = made(Digits(binarize="dynamic")), key(torch.arange(50))
    one, same, other = (data.augment(data.splits.train, seed)[some]["image"] for seed in (1, 1, 2))
    torch.testing.assert_close(one, same, rtol=0, atol=0)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("binarize", ["static", "dynamic"])
def test_flips_and_binarization_go_together(binarize):
    image = torch.tensor([0, 0, 0, 255], dtype=torch.uint8).expand(200, 1, 3, 4)
    data = Digits(binarize=binarize, horizontal_flip=True)
    everything = Splits(*(InMemoryExamples(image, torch.arange(200)) for _ in SPLITS))
    train = data.augment(binarize_splits(everything, 0, hold_train=binarize == "static").train, seed=0)
    assert isinstance(train, RandomFlip)
    drawn = train[key(torch.arange(200))]["image"]
    left, right = ((drawn[..., column] == 255).all(dim=-1).flatten() for column in (0, 3))
    assert torch.equal(left, ~right)
    assert 70 < left.sum() < 130


def test_flips_mirror_what_static_binarization_has_drawn():
    options = {"binarize": "static", "batch_size": 100, "drop_last": False}
    plain, flipped = (shown(made(Digits(horizontal_flip=flip, **options))) for flip in (False, True))
    mirrored = (flipped == plain.flip(-1)).flatten(1).all(dim=1)
    assert (mirrored | (flipped == plain).flatten(1).all(dim=1)).all()
    assert 0.4 < mirrored.double().mean() < 0.6


def test_an_unknown_way_to_binarize_is_refused():
    with pytest.raises(ValueError, match="Digits: binarize must be 'static', 'dynamic' or None, got 'threshold'"):
        Digits(binarize="threshold")


# ---- images in files


def test_images_that_are_decoded_one_by_one_are_those_that_lie_in_memory(tmp_path):
    grey = torch.randint(256, (12, 4, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy()
    for i, image in enumerate(grey):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    sets = []
    for in_memory in (True, False):
        options = {"channels": 1, "in_memory": in_memory, "batch_size": 4, "val_fraction": 0.25, "test_fraction": 0.3}
        data = made(ImageFolder(str(tmp_path), 4, binarize="static", **options))
        sets.append([*examples(data), shown(data)])
        dynamic = made(ImageFolder(str(tmp_path), 4, binarize="dynamic", **options))
        sets[-1] += [*examples(dynamic), *(shown(dynamic, epoch) for epoch in (0, 1))]
    assert isinstance(dynamic.splits.val.dataset, ImageFiles)
    torch.testing.assert_close(*sets, rtol=0, atol=0)
    assert sets[0][0].unique().tolist() == [0, 255]
    assert not torch.equal(sets[0][-1], sets[0][-2])


# ---- resuming


class Recorder(L.LightningModule):
    """Trains one weight and keeps every batch it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[torch.Tensor] = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch["image"])
        return self.weight.square()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveAfter(Callback):
    def __init__(self, step: int, path: os.PathLike) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def test_a_resumed_run_sees_the_draws_of_the_uninterrupted_one(tmp_path):
    def seen(ckpt_path=None, **options) -> list[torch.Tensor]:
        model = Recorder()
        silent = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        data = Digits(binarize="dynamic", horizontal_flip=True, batch_size=400, **options)
        trainer = L.Trainer(max_epochs=3, accelerator="cpu", callbacks=[SaveAfter(4, tmp_path / "a.ckpt")], **silent)
        trainer.fit(model, datamodule=data, ckpt_path=ckpt_path)
        return model.seen

    whole = seen()
    assert len(whole) == 9
    assert whole[0].unique().tolist() == [-1, 1]
    rest = seen(tmp_path / "a.ckpt", num_workers=1)
    torch.testing.assert_close(rest, whole[4:], rtol=0, atol=0)
