import os
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from lit_generative.data.batches import BatchKey
from lit_generative.data.subject_images import SubjectImages
from tests import tiny
from tests.data.test_captioned_images import Sees
from tests.data.test_resumable import SaveOn


def fill(folder, num: int, first: int = 0, width: int = 6) -> None:
    """Wide pictures whose grey level is their number."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(first, first + num):
        Image.new("RGB", (width, 4), (i, i, i)).save(folder / f"{i:03d}.png")


def data(folder, **changes) -> SubjectImages:
    return SubjectImages(str(folder / "subject"), **{"prompt": "a sks dog", "image_size": 4, "batch_size": 3} | changes)


def with_class(folder, **changes) -> SubjectImages:
    return data(folder, **{"class_prompt": "a dog", "class_dir": str(folder / "class")} | changes)


def epoch(module, number: int = 0) -> list[dict]:
    module.prepare_data()
    module.setup()
    loader = module.train_dataloader()
    loader.sampler.set_epoch(number)
    return list(loader)


def levels(batches, key: str = "image") -> list[int]:
    return [int(x[0, 0, 0]) for batch in batches for x in batch[key]]


def test_each_picture_comes_as_often_as_it_is_repeated(tmp_path):
    fill(tmp_path / "subject", 4)
    batches = epoch(data(tmp_path, repeats=6))
    assert Counter(levels(batches)) == {0: 6, 1: 6, 2: 6, 3: 6}
    assert len(batches) == 8
    assert levels(batches) != sorted(levels(batches))
    assert all(batch["caption"] == ["a sks dog"] * 3 for batch in batches)
    assert all(set(batch) == {"image", "label", "caption"} for batch in batches)


def test_validation_is_on_each_picture_once(tmp_path):
    fill(tmp_path / "subject", 4, width=12)
    module = data(tmp_path, horizontal_flip=True, random_crop=True)
    epoch(module)
    assert levels(module.val_dataloader()) == [0, 1, 2, 3]
    assert module.test_dataloader() == []


def test_a_few_pictures_make_batches_of_many(tmp_path):
    fill(tmp_path / "subject", 2)
    (batch,) = epoch(data(tmp_path, repeats=4, batch_size=8))
    assert len(batch["image"]) == 8


def test_examples_are_the_pictures_once(tmp_path):
    fill(tmp_path / "subject", 4)
    module = data(tmp_path)
    module.setup()
    assert [module.num_examples(split) for split in ("train", "val", "test")] == [4, 4, 0]
    images = module.examples("train", torch.arange(4))
    assert (images[:, 0, 0, 0].tolist(), images.dtype) == ([0, 1, 2, 3], torch.uint8)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_training_batch_has_as_many_pictures_of_the_class(tmp_path, num_workers):
    fill(tmp_path / "subject", 4)
    fill(tmp_path / "class", 7, first=100)
    batches = epoch(with_class(tmp_path, num_workers=num_workers, repeats=30))
    for batch in batches:
        assert batch["class_image"].shape == batch["image"].shape == (3, 3, 4, 4)
        assert batch["class_caption"] == ["a dog"] * 3
        assert len(set(levels([batch], "class_image"))) == 3  # none twice
    counts = Counter(levels(batches, "class_image"))
    assert set(counts) == set(range(100, 107))
    assert max(counts.values()) < 2 * min(counts.values())
    module = with_class(tmp_path)
    module.setup()
    assert "class_image" not in next(iter(module.val_dataloader()))


def test_a_class_smaller_than_a_batch_comes_as_evenly_as_it_can(tmp_path):
    fill(tmp_path / "subject", 4)
    fill(tmp_path / "class", 2, first=100)
    for batch in epoch(with_class(tmp_path, batch_size=5, repeats=5)):
        assert sorted(Counter(levels([batch], "class_image")).values()) == [2, 3]


def test_no_more_of_the_class_are_used_than_asked_for(tmp_path):
    fill(tmp_path / "subject", 4)
    fill(tmp_path / "class", 7, first=100)
    assert set(levels(epoch(with_class(tmp_path, num_class_images=3)), "class_image")) == {100, 101, 102}


@pytest.mark.parametrize("change", [{"epoch": 1}, {"batch": 1}, {"rank": 1}, {"seed": 1}])
def test_the_pictures_of_the_class_are_a_function_of_the_seed_and_the_key(tmp_path, change):
    fill(tmp_path / "subject", 4)
    fill(tmp_path / "class", 50, first=100)
    module = with_class(tmp_path)
    module.setup()

    def drawn(seed: int = 0, epoch: int = 0, batch: int = 0, rank: int = 0) -> list[int]:
        key = BatchKey(epoch, batch, rank, torch.arange(3))
        return levels([module.augment(module.splits.train, seed)[key]], "class_image")

    assert drawn() == drawn()
    assert drawn() != drawn(**change)


def test_the_subject_alone_is_cropped_at_random_and_mirrored(tmp_path):
    ramp = np.tile(np.arange(0, 240, 20, dtype=np.uint8), (4, 1))
    for name in ("subject", "class"):
        (tmp_path / name).mkdir()
        Image.fromarray(ramp).save(tmp_path / name / "a.png")
    corners = {}
    for name, options in (("crop", {"random_crop": True}), ("flip", {"horizontal_flip": True}), ("none", {})):
        batches = epoch(with_class(tmp_path, **options))
        corners[name] = set(levels(batches))
        assert set(levels(batches, "class_image")) == {80}
    assert corners == {"crop": set(range(0, 180, 20)), "flip": {80, 140}, "none": {80}}


def test_views_are_a_function_of_the_runs_seed(tmp_path):
    ramp = np.tile(np.arange(0, 240, 6, dtype=np.uint8), (4, 1))
    (tmp_path / "subject").mkdir()
    Image.fromarray(ramp).save(tmp_path / "subject" / "a.png")
    module = data(tmp_path, random_crop=True)
    module.setup()
    key = BatchKey(0, 0, 0, torch.arange(6))
    first, again, other = (module.augment(module.splits.train, seed)[key]["image"] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_run_sees_floats_and_resumes_in_the_middle_of_an_epoch(tmp_path):
    fill(tmp_path / "subject", 4, width=12)
    fill(tmp_path / "class", 9, first=100)
    options = {"repeats": 8, "random_crop": True, "horizontal_flip": True}
    whole, first, second = Sees(), Sees(), Sees()
    tiny.train(tmp_path, whole, with_class(tmp_path, **options), max_steps=14)
    saves = SaveOn("on_train_batch_end", 4, tmp_path / "a.ckpt")
    tiny.train(tmp_path, first, with_class(tmp_path, **options), max_steps=4, callbacks=[saves])
    tiny.train(tmp_path, second, with_class(tmp_path, **options), max_steps=14, ckpt_path=tmp_path / "a.ckpt")
    for key in ("image", "class_image"):
        tiny.assert_same([b[key] for b in first.batches + second.batches], [b[key] for b in whole.batches])
        assert whole.batches[0][key].dtype == torch.float32
        assert float(whole.batches[0][key].max()) < 109 / 127.5 - 1


def test_the_pictures_are_decoded_once(tmp_path):
    fill(tmp_path / "subject", 3)
    module = data(tmp_path)
    module.setup()
    for name in os.listdir(tmp_path / "subject"):
        (tmp_path / "subject" / name).unlink()
    assert set(levels(module.train_dataloader())) == {0, 1, 2}


def test_data_describes_itself(tmp_path):
    module = data(tmp_path, image_size=6)
    assert (module.sample_shape, module.num_classes) == ((3, 6, 6), None)


def test_folders_without_pictures_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"SubjectImages: .*subject is no folder"):
        epoch(data(tmp_path))
    fill(tmp_path / "subject", 1)
    with pytest.raises(ValueError, match=r"SubjectImages: .*class is no folder"):
        epoch(with_class(tmp_path))
    with pytest.raises(ValueError, match=r"class must hold 3 pictures of the class, and 3 are missing"):
        epoch(with_class(tmp_path, num_class_images=3))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"prompt": " "}, "prompt must say what the pictures show, got ' '"),
        ({"repeats": 0}, "repeats must be at least 1, got 0"),
        ({"image_size": 0}, "image_size must be at least 1, got 0"),
        ({"background": "pink"}, "background must be"),
        ({"class_prompt": "a dog"}, "pictures of the class need class_prompt and class_dir, got 'a dog' and None"),
        ({"class_dir": "x"}, "pictures of the class need class_prompt and class_dir, got None and 'x'"),
        ({"num_class_images": 3}, "pictures of the class need class_prompt and class_dir, got None and None"),
        ({"class_dir": "x", "class_prompt": "a", "num_class_images": -1}, "num_class_images must be at least 0"),
        ({"class_dir": "x", "class_prompt": "a", "class_batch_size": 0}, "class_batch_size must be at least 1"),
    ],
)
def test_an_argument_out_of_range_is_refused(tmp_path, argument, message):
    with pytest.raises(ValueError, match=f"SubjectImages: {message}"):
        data(tmp_path, **argument)
