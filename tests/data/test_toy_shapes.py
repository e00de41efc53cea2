import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from lit_generative.data.toy_shapes import COLOURS, GROUNDS, ToyShapes, ToySubject, draw_shape


def everything(data, batch_size: int = 1000) -> tuple[torch.Tensor, list[str]]:
    """All training pictures and captions, in their order."""
    data.setup("test")
    examples = data.splits.train
    return torch.stack(examples.pictures), examples.captions


def test_captions_say_what_is_drawn():
    pictures, captions = everything(ToyShapes(200, val_fraction=0.0))
    for picture, caption in zip(pictures, captions, strict=True):
        *_, colour, shape, _, _, ground, _ = caption.split()
        assert caption == f"a photo of a {colour} {shape} on a {ground} background"
        found = Counter(map(tuple, picture.flatten(1).T.tolist()))
        assert set(found) == {COLOURS[colour], GROUNDS[ground]}
    assert len(set(captions)) == 4 * 3 * 2


@pytest.mark.parametrize(("shape", "share"), [("circle", np.pi / 4), ("square", 1.0), ("triangle", 0.5)])
def test_a_shape_fills_its_share_of_the_square_around_it(shape, share):
    picture = draw_shape("red", shape, "black", 200, np.random.default_rng(0))
    inside = picture[0] == COLOURS["red"][0]
    rows, columns = (inside.any(dim=dim).nonzero().flatten() for dim in (1, 0))
    height, width = (int(n.max() - n.min()) + 1 for n in (rows, columns))
    assert height == pytest.approx(width, abs=1)
    assert 2 * 200 // 5 <= height <= 2 * 200 // 3
    assert float(inside.sum()) / (height * width) == pytest.approx(share, abs=0.02)
    top = inside[rows.min()].sum()  # the point of a triangle is above
    assert float(top) < 20 if shape != "square" else float(top) == width


@pytest.mark.parametrize("size", [8, 33])
def test_a_shape_lies_wholly_within_the_picture(size):
    for seed, shape in itertools.product(range(30), ("circle", "square", "triangle")):
        picture = draw_shape("blue", shape, "white", size, np.random.default_rng(seed))
        inside = picture[2] == COLOURS["blue"][2]
        assert inside.any(dim=1).sum() == inside.any(dim=0).sum()  # nothing is cut off
        assert 0 < inside.float().mean() < 0.6


def test_pictures_are_a_function_of_the_split_seed():
    first, again, other = (everything(ToyShapes(20, split_seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(first[0], again[0])
    assert first[1] == again[1] != other[1]


def test_a_picture_does_not_depend_on_how_many_there_are():
    few, many = (everything(ToyShapes(num, val_fraction=0.0))[0] for num in (3, 20))
    assert torch.equal(few, many[:3])


def test_colours_shapes_grounds_and_captions_can_be_chosen():
    options = {"colours": ["red"], "shapes": ["square"], "grounds": ["black"], "caption": "a {shape}, {ground}"}
    pictures, captions = everything(ToyShapes(10, image_size=16, **options))
    assert set(captions) == {"a square, black"}
    assert pictures.shape == (9, 3, 16, 16)


def test_the_splits_and_batches_are_those_of_captioned_images():
    data = ToyShapes(40, val_fraction=0.25, test_fraction=0.25, batch_size=3)
    data.setup()
    assert [data.num_examples(split) for split in ("train", "val", "test")] == [22, 8, 10]
    assert (data.sample_shape, data.num_classes) == ((3, 32, 32), None)
    batch = next(iter(data.train_dataloader()))
    assert (batch["image"].shape, batch["label"].tolist(), len(batch["caption"])) == ((3, 3, 32, 32), [0, 0, 0], 3)
    floats = data.on_after_batch_transfer(batch, 0)
    assert (floats["image"].dtype, floats["caption"]) == (torch.float32, batch["caption"])


def test_training_pictures_are_mirrored_if_asked():
    def batch(flip: bool) -> torch.Tensor:
        data = ToyShapes(20, batch_size=16, horizontal_flip=flip)
        data.setup()
        return next(iter(data.train_dataloader()))["image"]

    plain, flipped = batch(False), batch(True)
    mirrored = [not torch.equal(x, y) and torch.equal(x, y.flip(-1)) for x, y in zip(plain, flipped, strict=True)]
    same = [torch.equal(x, y) for x, y in zip(plain, flipped, strict=True)]
    assert any(mirrored)
    assert any(same)
    assert all(a or b for a, b in zip(mirrored, same, strict=True))


def test_a_subject_is_one_shape_of_one_colour_under_one_name():
    data = ToySubject(5, colour="yellow", shape="triangle", ground="black", prompt="a sks", batch_size=5, repeats=2)
    data.prepare_data()
    data.setup()
    assert [data.num_examples(split) for split in ("train", "val", "test")] == [5, 5, 0]
    pictures = data.examples("train", torch.arange(5))
    assert {tuple(p) for p in pictures.permute(0, 2, 3, 1).reshape(-1, 3).tolist()} == {(235, 205, 50), (15, 15, 15)}
    assert len({picture.numpy().tobytes() for picture in pictures}) == 5
    batches = list(data.train_dataloader())
    assert [batch["caption"] for batch in batches] == [["a sks"] * 5] * 2


def test_a_subject_is_a_function_of_the_split_seed():
    pictures = [torch.stack(ToySubject(split_seed=seed).subject_pictures()) for seed in (0, 0, 1)]
    assert torch.equal(pictures[0], pictures[1])
    assert not torch.equal(pictures[0], pictures[2])


@pytest.mark.parametrize(
    ("cls", "argument", "message"),
    [
        (ToyShapes, {"num_images": 0}, "num_images must be at least 1, got 0"),
        (ToyShapes, {"image_size": 7}, "image_size must be at least 8 to draw a shape, got 7"),
        (ToyShapes, {"test_fraction": 1.0}, "test_fraction must be at least 0 and below 1"),
        (ToyShapes, {"colours": ["pink"]}, r"colours must be of red, green, blue, yellow, got \['pink'\]"),
        (ToyShapes, {"shapes": []}, r"shapes must be of circle, square, triangle, got \[\]"),
        (ToyShapes, {"grounds": ["grey"]}, "grounds must be of white, black"),
        (
            ToyShapes,
            {"caption": "a {color}"},
            r"caption may name {colour}, {shape} and {ground} alone, got 'a {color}'",
        ),
        (ToyShapes, {"caption": "a {}"}, "caption may name"),
        (ToyShapes, {"caption": "a {"}, "caption may name"),
        (ToySubject, {"colour": "pink"}, "colour must be of red"),
        (ToySubject, {"shape": "cube"}, "shape must be of circle"),
        (ToySubject, {"ground": "grey"}, "ground must be of white"),
        (ToySubject, {"num_images": 0}, "num_images must be at least 1, got 0"),
    ],
)
def test_an_argument_out_of_range_is_refused(cls, argument, message):
    with pytest.raises(ValueError, match=f"{cls.__name__}: {message}"):
        cls(**argument)
