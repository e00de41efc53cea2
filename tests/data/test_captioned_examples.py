import numpy as np
import pytest
import torch
from PIL import Image

from lit_generative.data.batches import BatchKey
from lit_generative.data.captioned_examples import CaptionedExamples, DatasetRow, View, scaled_to_floats


def key(*indices: int, epoch: int = 0, batch: int = 0, rank: int = 0) -> BatchKey:
    return BatchKey(epoch, batch, rank, torch.tensor(indices))


def ramps(num: int = 3, height: int = 4, width: int = 12) -> list[torch.Tensor]:
    """Pictures whose red is the column, green the row and blue their number."""
    red = torch.arange(width, dtype=torch.uint8).expand(height, width)
    green = torch.arange(height, dtype=torch.uint8).unsqueeze(1).expand(height, width)
    return [torch.stack([red, green, torch.full_like(red, i)]) for i in range(num)]


def examples(num: int = 3, view: View | None = None, **options) -> CaptionedExamples:
    return CaptionedExamples(ramps(num, **options), [f"number {i}" for i in range(num)], 4, view=view)


def test_a_batch_holds_pictures_and_captions_in_the_order_of_its_key():
    batch = examples()[key(2, 0, 2)]
    assert batch["caption"] == ["number 2", "number 0", "number 2"]
    assert batch["image"][:, 2, 0, 0].tolist() == [2, 0, 2]
    assert (batch["image"].dtype, batch["label"].dtype) == (torch.uint8, torch.int64)
    assert batch["label"].tolist() == [0, 0, 0]


@pytest.mark.parametrize(("height", "width", "corner"), [(4, 12, (4, 0)), (11, 4, (0, 3))])
def test_without_a_view_the_square_is_the_middle(height, width, corner):
    image = examples(height=height, width=width)[key(0)]["image"][0]
    assert image.shape == (3, 4, 4)
    assert (int(image[0, 0, 0]), int(image[1, 0, 0])) == corner


def test_a_random_square_lies_anywhere_along_the_longer_side():
    dataset = examples(view=View(0, random_crop=True))
    lefts = [int(x[0, 0, 0]) for batch in range(100) for x in dataset[key(0, 1, 2, batch=batch)]["image"]]
    counts = np.bincount(lefts, minlength=9)
    assert len(counts) == 9  # 0 to 12 - 4
    assert counts.min() > 300 / 9 / 2
    assert counts.max() < 300 / 9 * 2


def test_half_of_the_pictures_are_mirrored():
    dataset = examples(view=View(0, horizontal_flip=True))
    lefts = [int(x[0, 0, 0]) for batch in range(100) for x in dataset[key(0, 1, 2, batch=batch)]["image"]]
    assert set(lefts) == {4, 7}
    assert 120 < lefts.count(7) < 180


def test_crop_and_mirroring_are_independent():
    both = examples(view=View(0, random_crop=True, horizontal_flip=True))
    cropped = examples(view=View(0, random_crop=True))
    for batch in range(20):
        left, right = (dataset[key(0, batch=batch)]["image"][0] for dataset in (both, cropped))
        assert torch.equal(left, right) or torch.equal(left, right.flip(-1))


@pytest.mark.parametrize("change", [{"epoch": 1}, {"batch": 1}, {"rank": 1}, {"seed": 1}])
def test_a_view_is_a_function_of_the_seed_and_the_key(change):
    def seen(seed: int = 0, **place) -> torch.Tensor:
        return examples(view=View(seed, True, True))[key(*[0, 1, 2] * 4, **place)]["image"]

    assert torch.equal(seen(), seen())
    assert not torch.equal(seen(), seen(**change))


@pytest.mark.parametrize(("height", "width"), [(20, 31), (31, 20), (2, 3)])
def test_the_shorter_side_is_scaled_as_pillow_scales(tmp_path, height, width):
    levels = np.random.default_rng(0).integers(256, size=(height, width, 3), dtype=np.uint8)
    Image.fromarray(levels).save(tmp_path / "a.png")
    image = CaptionedExamples([str(tmp_path / "a.png")], ["a"], 10)[key(0)]["image"][0]
    size = (10, round(10 * height / width)) if width < height else (round(10 * width / height), 10)
    scaled = np.array(Image.fromarray(levels).resize(size, Image.Resampling.BILINEAR))
    top, left = ((n - 10) // 2 for n in scaled.shape[:2])
    np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), scaled[top : top + 10, left : left + 10])


def test_held_pictures_are_the_same_as_those_decoded_each_time(tmp_path):
    levels = np.random.default_rng(0).integers(256, size=(9, 14, 3), dtype=np.uint8)
    Image.fromarray(levels).save(tmp_path / "a.png")
    dataset = CaptionedExamples([str(tmp_path / "a.png")], ["a"], 6).seen(View(0, True, True))
    held = dataset.held()
    (tmp_path / "a.png").unlink()
    assert held.pictures[0].shape == (3, 6, 9)
    Image.fromarray(levels).save(tmp_path / "a.png")
    for batch in range(5):
        assert torch.equal(held[key(0, batch=batch)]["image"], dataset[key(0, batch=batch)]["image"])


def test_some_of_them_keep_their_captions_and_their_view():
    part = examples(view=View(0, horizontal_flip=True)).take(torch.tensor([2, 1]))
    batch = part[key(0, 1)]
    assert (len(part), batch["caption"]) == (2, ["number 2", "number 1"])
    assert batch["image"][:, 2, 0, 0].tolist() == [2, 1]
    assert part.view == View(0, horizontal_flip=True)


@pytest.mark.parametrize(("background", "level"), [("white", 255), ("black", 0)])
def test_the_background_shows_through_files_and_rows(tmp_path, background, level):
    clear = Image.new("RGBA", (5, 4), (9, 9, 9, 0))
    clear.save(tmp_path / "a.png")
    pictures = [str(tmp_path / "a.png"), DatasetRow([{"image": clear}], 0, "image")]
    image = CaptionedExamples(pictures, ["a", "b"], 4, background)[key(0, 1)]["image"]
    assert image.unique().tolist() == [level]


def test_grey_pictures_become_coloured():
    row = DatasetRow([{"x": None}, {"x": Image.new("L", (4, 4), 7)}], 1, "x")
    assert CaptionedExamples([row], ["a"], 4)[key(0)]["image"].unique().tolist() == [7]


def test_rows_are_turned_as_their_orientation_says(tmp_path):
    picture = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise
    picture.save(tmp_path / "a.png", exif=exif)
    pictures = [str(tmp_path / "a.png"), DatasetRow([{"image": Image.open(tmp_path / "a.png")}], 0, "image")]
    for image in CaptionedExamples(pictures, ["a", "b"], 4)[key(0, 1)]["image"]:
        np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), np.rot90(np.asarray(picture), k=-1))


def test_a_column_without_images_is_refused():
    dataset = CaptionedExamples([DatasetRow([{"url": "a.png"}], 0, "url")], ["a"], 4)
    with pytest.raises(TypeError, match=r"column 'url' must hold images, got str in row 0. Cast it"):
        dataset[key(0)]


def test_pixels_become_floats_and_texts_and_indices_stay():
    batch = {"image": torch.tensor([0, 255], dtype=torch.uint8), "label": torch.tensor([3]), "caption": ["a"]}
    scaled = scaled_to_floats(batch)
    torch.testing.assert_close(scaled["image"], torch.tensor([-1.0, 1.0]))
    assert (scaled["label"].tolist(), scaled["caption"]) == ([3], ["a"])
    assert scaled_to_floats(batch["label"]) is batch["label"]
