import os
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from lit_generative.data.batches import InMemoryExamples
from lit_generative.data.image_folder import ImageFiles, ImageFolder


def fill(folder, *names: str) -> None:
    """Grey images whose level is their number, counted over all calls for a folder."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        level = sum(len(files) for _, _, files in os.walk(folder))
        Image.new("RGB", (6, 4), (level, level, level)).save(path)


def numbers(prefix: str, num: int) -> list[str]:
    return [f"{prefix}{i}.png" for i in range(num)]


def contents(data: ImageFolder) -> list[dict[int, int]]:
    """Level of each image and its label, per split."""
    data.setup("test")
    loaders = [data.train_dataloader(), data.val_dataloader(), data.test_dataloader()]
    data.drop_last = False
    loaders[0] = data.train_dataloader()
    return [
        {int(image[0, 0, 0]): int(label) for batch in loader for image, label in zip(*batch.values(), strict=True)}
        for loader in loaders
    ]


def test_class_folders_give_labels_in_the_order_of_their_names(tmp_path):
    fill(tmp_path, *numbers("dog/", 3), *numbers("cat/deep/", 2), *numbers("ape/", 1))
    (tmp_path / "empty").mkdir()
    data = ImageFolder(str(tmp_path), 4, val_fraction=0.0, test_fraction=0.0)
    assert (data.num_classes, data.files.classes) == (3, ["ape", "cat", "dog"])
    assert contents(data)[0] == {0: 2, 1: 2, 2: 2, 3: 1, 4: 1, 5: 0}


def test_a_flat_folder_has_no_classes(tmp_path):
    fill(tmp_path, *numbers("", 3))
    data = ImageFolder(str(tmp_path), 4, val_fraction=0.0, test_fraction=0.0)
    assert data.num_classes is None
    assert contents(data)[0] == {0: 0, 1: 0, 2: 0}


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_splits_share_no_image_and_are_stable(tmp_path, in_memory, num_workers):
    fill(tmp_path, *numbers("a/", 12), *numbers("b/", 8))
    options = {"in_memory": in_memory, "num_workers": num_workers, "batch_size": 3}
    splits = contents(ImageFolder(str(tmp_path), 4, test_fraction=0.2, val_fraction=0.25, **options))
    assert [len(split) for split in splits] == [12, 4, 4]
    assert splits[0] | splits[1] | splits[2] == {level: int(level >= 12) for level in range(20)}
    assert splits == contents(ImageFolder(str(tmp_path), 4, test_fraction=0.2, val_fraction=0.25))


def test_split_folders_are_used_where_there_are_some(tmp_path):
    fill(tmp_path, *numbers("train/a/", 5), *numbers("train/b/", 5), *numbers("val/b/", 2), *numbers("test/a/", 3))
    data = ImageFolder(str(tmp_path), 4, val_fraction=0.5)
    assert contents(data) == [{i: int(i >= 5) for i in range(10)}, {10: 1, 11: 1}, {12: 0, 13: 0, 14: 0}]
    assert data.num_classes == 2


def test_a_missing_val_folder_is_taken_from_train_and_a_missing_test_folder_stays_empty(tmp_path):
    fill(tmp_path / "a", *numbers("train/", 10), *numbers("test/", 3))
    assert [len(split) for split in contents(ImageFolder(str(tmp_path / "a"), 4, val_fraction=0.2))] == [8, 2, 3]
    fill(tmp_path / "b", *numbers("train/", 10), *numbers("val/", 3))
    assert [len(split) for split in contents(ImageFolder(str(tmp_path / "b"), 4, val_fraction=0.2))] == [10, 3, 0]


def test_classes_that_train_does_not_know_are_refused(tmp_path):
    fill(tmp_path, "train/a/0.png", "train/b/0.png", "val/c/0.png")
    with pytest.raises(
        ValueError, match=r"ImageFolder: the class folders of .*val must be among .*\['a', 'b'\].*\['c'\]"
    ):
        ImageFolder(str(tmp_path), 4).setup()
    fill(tmp_path / "flat", "train/a/0.png", "val/0.png")
    with pytest.raises(ValueError, match="must be among"):
        ImageFolder(str(tmp_path / "flat"), 4).setup()


def test_images_beside_class_folders_are_refused(tmp_path):
    fill(tmp_path, "stray.png", "a/0.png")
    with pytest.raises(ValueError, match=r"got both: stray.png and the folder a. Move one"):
        ImageFolder(str(tmp_path), 4).setup()


def test_a_folder_without_images_is_named_with_the_extensions_looked_for(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match=r"holds no images. Looked for files ending in .*\.jpg.*\.png") as caught:
        ImageFolder(str(tmp_path), 4).setup()
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(ValueError, match="nowhere is no folder"):
        ImageFolder(str(tmp_path / "nowhere"), 4).setup()


def test_images_have_the_shape_that_is_described(tmp_path):
    fill(tmp_path, *numbers("", 4))
    for channels in (1, 3):
        data = ImageFolder(str(tmp_path), 5, channels=channels, batch_size=2, val_fraction=0.0, test_fraction=0.0)
        data.setup()
        batch = next(iter(data.train_dataloader()))
        assert batch["image"].shape[1:] == data.sample_shape == (channels, 5, 5)
        assert (batch["image"].dtype, batch["label"].dtype) == (torch.uint8, torch.int64)


def test_images_are_held_in_memory_where_they_fit_or_as_asked(tmp_path, monkeypatch):
    fill(tmp_path, *numbers("", 4))

    def kind(in_memory: bool | None) -> type:
        data = ImageFolder(str(tmp_path), 5, in_memory=in_memory)
        data.setup("test")
        return type(data.splits.train)

    assert [kind(True), kind(False), kind(None)] == [InMemoryExamples, ImageFiles, InMemoryExamples]
    monkeypatch.setattr("lit_generative.data.image_folder.MAX_IN_MEMORY_BYTES", 4 * 3 * 5 * 5 - 1)
    assert [kind(True), kind(False), kind(None)] == [InMemoryExamples, ImageFiles, ImageFiles]


def test_flips_work_on_files(tmp_path):
    ramp = np.tile(np.arange(0, 256, 32, dtype=np.uint8), (8, 1))
    for i in range(30):
        Image.fromarray(ramp).save(tmp_path / f"{i}.png")
    options = {"in_memory": False, "channels": 1, "batch_size": 30, "val_fraction": 0.0, "test_fraction": 0.0}
    data = ImageFolder(str(tmp_path), 8, horizontal_flip=True, **options)
    data.setup()
    left = next(iter(data.train_dataloader()))["image"][:, 0, 0, 0]
    assert left.unique().tolist() == [0, 224]


def test_the_background_reaches_the_decoder(tmp_path):
    Image.new("RGBA", (4, 4), (9, 9, 9, 0)).save(tmp_path / "a.png")
    for background, level in (("white", 255), ("black", 0)):
        data = ImageFolder(str(tmp_path), 4, background=background, val_fraction=0.0, test_fraction=0.0)
        assert contents(data)[0] == {level: 0}


# Not by a worker: the error keeps the loader alive, and torch waits 5 s for its worker when that is collected.
@pytest.mark.parametrize(("in_memory", "num_workers"), [(True, 0), (True, 1), (False, 0)])
def test_an_unreadable_image_is_named(tmp_path, in_memory, num_workers):
    fill(tmp_path, *numbers("", 3))
    (tmp_path / "bad.jpg").write_text("not an image")
    options = {"val_fraction": 0.0, "test_fraction": 0.0, "in_memory": in_memory, "num_workers": num_workers}
    with pytest.raises(ValueError, match=r"cannot read .*bad\.jpg"):
        contents(ImageFolder(str(tmp_path), 4, **options))


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_unreadable_images_are_left_out_on_request_with_one_warning(tmp_path, in_memory, num_workers):
    fill(tmp_path, *numbers("a/", 6), *numbers("b/", 6))
    good = contents(ImageFolder(str(tmp_path), 4, test_fraction=0.25))
    bad = [f"a/{i}.png" for i in (0, 2)] + [f"b/{i}.png" for i in (1, 3)]
    for name in bad:
        (tmp_path / name).write_text("not an image")
    options = {"unreadable": "skip", "in_memory": in_memory, "num_workers": num_workers}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kept = contents(ImageFolder(str(tmp_path), 4, test_fraction=0.25, **options))
    expected = [{level: label for level, label in split.items() if level not in (0, 2, 7, 9)} for split in good]
    assert kept == expected  # those that remain stay in their split, with their label
    (message,) = [str(w.message) for w in caught if "left out" in str(w.message)]
    assert "ImageFolder: left out 4 unreadable images" in message
    assert sum(os.path.join(str(tmp_path), name) in message for name in bad) == 3


def test_readable_images_give_no_warning(tmp_path):
    fill(tmp_path, *numbers("", 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ImageFolder(str(tmp_path), 4, unreadable="skip").setup("test")


def test_a_folder_of_unreadable_images_only_is_refused(tmp_path):
    (tmp_path / "bad.jpg").write_text("not an image")
    with (
        pytest.warns(UserWarning, match="left out 1"),
        pytest.raises(ValueError, match=r"none of the images in .*bad\.jpg"),
    ):
        ImageFolder(str(tmp_path), 4, unreadable="skip").setup("test")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"channels": 4}, r"channels must be one of \(1, 3\), got 4"),
        ({"unreadable": "ignore"}, r"unreadable must be one of \('raise', 'skip'\), got 'ignore'"),
        ({"background": "pink"}, r"background must be one of \('white', 'black'\), got 'pink'"),
        ({"test_fraction": 1.0}, "test_fraction must be at least 0 and below 1"),
        ({"image_size": 0}, "image_size must be at least 1, got 0"),
    ],
)
def test_an_argument_out_of_range_is_refused(argument, message):
    with pytest.raises(ValueError, match=f"ImageFolder: {message}"):
        ImageFolder("nowhere", **{"image_size": 4} | argument)
