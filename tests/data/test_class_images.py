import json
import os

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from lit_generative.data.class_images import RECORD, ClassImages
from tests.finetune import tiny_stable_diffusion


class Painter:
    """A pipeline whose pictures are as grey as their generator says; it keeps what it was asked."""

    def __init__(self) -> None:
        self.calls, self.loads = [], []
        self.safety_checker = object()
        self.fails_after = 99

    def load(self, name, **options):
        self.loads.append((name, options))
        return self

    def set_progress_bar_config(self, disable):
        assert disable

    def to(self, device):
        return self

    def __call__(self, prompt, generator, **options):
        if len(self.calls) == self.fails_after:
            raise KeyboardInterrupt
        assert self.safety_checker is None
        self.calls.append((prompt, options))
        torch.rand(())  # a pipeline may be careless with the global random numbers
        levels = [int(torch.randint(256, (), generator=g)) for g in generator]
        return type("Output", (), {"images": [Image.new("RGB", (4, 6), (n, n, n)) for n in levels]})


@pytest.fixture
def painter(monkeypatch) -> Painter:
    painter = Painter()
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", painter.load)
    return painter


def images(folder, **changes) -> ClassImages:
    return ClassImages("Data", str(folder), **{"prompt": "a dog", "num": 5, "pretrained": "base"} | changes)


def levels(folder) -> list[int]:
    names = sorted(name for name in os.listdir(folder) if name[0] != ".")
    return [int(np.asarray(Image.open(folder / name))[0, 0, 0]) for name in names]


def test_missing_pictures_are_drawn_in_batches(tmp_path, painter):
    images(tmp_path / "dogs", batch_size=2).prepare()
    assert [prompt for prompt, _ in painter.calls] == [["a dog"] * 2, ["a dog"] * 2, ["a dog"]]
    assert [options for _, options in painter.calls] == [{}] * 3  # steps and guidance are the pipeline's own
    assert painter.loads[0][0] == "base"
    names = [os.path.basename(path) for path in images(tmp_path / "dogs").paths()]
    assert names == [f"class_0000{i}.png" for i in range(5)]


def test_steps_guidance_and_revision_reach_the_pipeline(tmp_path, painter):
    images(tmp_path, num=1, steps=7, guidance=2.5, revision="abc").prepare()
    assert painter.calls == [(["a dog"], {"num_inference_steps": 7, "guidance_scale": 2.5})]
    assert painter.loads[0][1]["revision"] == "abc"
    assert painter.loads[0][1]["use_safetensors"]


def test_nothing_is_drawn_where_there_is_enough(tmp_path, painter):
    images(tmp_path).prepare()
    before = {name: os.stat(tmp_path / name).st_mtime_ns for name in os.listdir(tmp_path)}
    for num in (0, 3, 5):
        images(tmp_path, num=num).prepare()
    assert len(painter.loads) == 1
    assert {name: os.stat(tmp_path / name).st_mtime_ns for name in os.listdir(tmp_path)} == before


def test_a_broken_off_drawing_goes_on_with_the_same_pictures(tmp_path, painter):
    images(tmp_path / "whole", batch_size=2).prepare()
    expected = levels(tmp_path / "whole")
    painter.calls, painter.fails_after = [], 1
    with pytest.raises(KeyboardInterrupt):
        images(tmp_path / "broken", batch_size=2).prepare()
    assert len(levels(tmp_path / "broken")) == 2
    painter.fails_after = 99
    images(tmp_path / "broken", batch_size=3).prepare()
    assert levels(tmp_path / "broken") == expected
    assert len(set(expected)) > 3


@pytest.mark.parametrize("change", [{"seed": 1}, {"prompt": "a cat"}])
def test_a_picture_is_a_function_of_the_seed_and_the_prompt(tmp_path, painter, change):
    images(tmp_path / "a").prepare()
    images(tmp_path / "b", **change).prepare()
    assert levels(tmp_path / "a") != levels(tmp_path / "b")


def test_pictures_of_the_users_own_count_and_stay(tmp_path, painter):
    for i in range(3):
        Image.new("RGB", (4, 4), (i, i, i)).save(tmp_path / f"mine_{i}.png")
    images(tmp_path, pretrained=None, num=3).prepare()
    assert not (tmp_path / RECORD).exists()
    images(tmp_path).prepare()
    assert levels(tmp_path)[2:] == [0, 1, 2]
    assert len(levels(tmp_path)) == 5


def test_a_half_written_picture_is_not_counted(tmp_path, painter, monkeypatch):
    def breaks(self, path, **options):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", breaks)
    with pytest.raises(OSError, match="disk full"):
        images(tmp_path).prepare()
    monkeypatch.undo()
    with pytest.raises(ValueError, match="holds no images"):
        images(tmp_path).paths()


def test_drawing_leaves_the_random_numbers_alone(tmp_path, painter):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    images(tmp_path).prepare()
    assert torch.equal(torch.get_rng_state(), before)


def test_pictures_of_another_prompt_or_pipeline_are_refused(tmp_path, painter):
    images(tmp_path).prepare()
    assert json.loads((tmp_path / RECORD).read_text()) == {"prompt": "a dog", "pretrained": "base"}
    images(tmp_path, pretrained=None).prepare()
    with pytest.raises(ValueError, match=r"were drawn with prompt 'a dog' and not 'a cat'. Give another class_dir"):
        images(tmp_path, prompt="a cat").prepare()
    with pytest.raises(ValueError, match="were drawn with pretrained 'base' and not 'other'"):
        images(tmp_path, pretrained="other").prepare()


def test_too_few_pictures_and_no_pipeline_are_refused(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "mine.png")
    expected = r"Data: .* must hold 5 pictures of the class, and 4 are missing. Add some, lower num_class_images"
    with pytest.raises(ValueError, match=expected):
        images(tmp_path, pretrained=None).prepare()
    with pytest.raises(ValueError, match=r"must hold 5 pictures of the class, got 1. Call prepare_data\(\) first"):
        images(tmp_path).paths()


def test_no_more_pictures_are_used_than_are_asked_for(tmp_path, painter):
    images(tmp_path).prepare()
    assert [len(images(tmp_path, num=num).paths()) for num in (2, 5, 0)] == [2, 5, 5]


def test_a_folder_that_is_no_pipeline_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"Data: .* could not be loaded: .*Give the name of a pipeline on the hub"):
        images(tmp_path / "dogs", pretrained=str(tmp_path)).prepare()


@pytest.mark.slow  # loads a pipeline twice
def test_a_pipeline_of_diffusers_draws_the_same_again(tmp_path):
    tiny_stable_diffusion.make(tmp_path / "base")
    drawn = []
    for name, batch_size in (("a", 2), ("b", 3)):
        options = {"num": 3, "pretrained": str(tmp_path / "base"), "steps": 2, "batch_size": batch_size}
        images(tmp_path / name, **options).prepare()
        drawn.append([np.asarray(Image.open(path)).astype(int) for path in images(tmp_path / name, num=3).paths()])
    for first, second in zip(*drawn, strict=True):
        assert first.shape == (32, 32, 3)
        assert np.abs(first - second).max() <= 1  # another batch may round another way
    assert np.abs(drawn[0][0] - drawn[0][1]).max() > 10


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"num": -1}, "num_class_images must be at least 0, got -1"),
        ({"batch_size": 0}, "class_batch_size must be at least 1, got 0"),
        ({"steps": 0}, "class_steps must be at least 1, got 0"),
    ],
)
def test_an_argument_out_of_range_is_refused(argument, message):
    with pytest.raises(ValueError, match=f"Data: {message}"):
        images("nowhere", **argument)
