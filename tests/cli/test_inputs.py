"""``litgen sample`` from images: holes are filled, small images enlarged."""

from __future__ import annotations

from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image

from lit_generative.__main__ import main
from lit_generative.cli.inputs import drawing, image_files, matching_masks, read_images, read_masks
from lit_generative.diffusion.conditions import SuperResolution
from lit_generative.diffusion.latents import Latents
from lit_generative.networks.diffusers_unet import DiffusersUNet
from lit_generative.tensor_ops import from_uint8, sample_generators, to_uint8
from lit_generative.training.module import GenerativeModule
from tests import tiny

MODELS = {
    "plain": lambda: tiny.ddpm(num_classes=3),
    "large": lambda: tiny.ddpm(network=network(), condition=SuperResolution(2)),
    "points": tiny.point_ddpm,
    "pairs": lambda: tiny.ddpm(network=DiffusersUNet(8, 2, widths=(8,), layers_per_block=1, attention_levels=())),
    "vae": tiny.vae,
}


def network() -> DiffusersUNet:
    """Of a model with classes that is shown images."""
    return DiffusersUNet(8, 1, 3, widths=(8,), layers_per_block=1, attention_levels=(), extra_channels=1)


def built(name: str) -> GenerativeModule:
    """A model that minds its labels and what it is shown: the last layer of a new one is zero."""
    module = MODELS[name]()
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.4, generator=torch.Generator().manual_seed(p.numel()))
    return module


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    for name in MODELS:
        trainer = tiny.trainer(folder)
        trainer.strategy.connect(built(name))
        trainer.save_checkpoint(folder / f"{name}.ckpt")
    return folder


@pytest.fixture
def sample(checkpoints, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(name: str, *options: str, out: str = "out") -> int:
        path = str(checkpoints / f"{name}.ckpt")
        return main(["sample", "--ckpt_path", path, "--out", out, "--device", "cpu", "--format", "npz", *options])

    return run


def drawn(out: str = "out") -> np.ndarray:
    return np.load(f"{out}/samples.npz")["images"][..., 0]


def write(folder, count: int = 3, size: int = 8, ending: str = "png") -> np.ndarray:
    pixels = np.random.default_rng(0).integers(0, 256, (count, size, size), dtype=np.uint8)
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{index}.{ending}")
    return pixels


def write_mask(path, seed: int = 1) -> np.ndarray:
    """About half of it is white; True there."""
    known = np.random.default_rng(seed).integers(0, 2, (8, 8)).astype(bool)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(known).save(path)
    return known


# ---- holes


def test_white_pixels_of_the_mask_are_kept_and_black_ones_are_new_in_each_sample(sample, tmp_path):
    (image,) = write(tmp_path / "in", count=1)
    known = write_mask(tmp_path / "mask.png")
    assert sample("plain", "--inpaint", "in/0.png", "--mask", "mask.png", "--num", "3") == 0
    filled = drawn()
    assert filled.shape == (3, 8, 8)
    np.testing.assert_array_equal(filled[:, known], np.broadcast_to(image[known], (3, known.sum())))
    for one, other in ((0, 1), (1, 2)):
        assert (filled[one, ~known] != filled[other, ~known]).mean() > 0.5


def test_images_of_a_folder_are_taken_in_turn_whatever_the_batch_size(sample, tmp_path):
    pixels, known = write(tmp_path / "in"), write_mask(tmp_path / "mask.png")
    options = ("--inpaint", "in", "--mask", "mask.png", "--num", "5", "--num_resamples", "2")
    for size in ("5", "2"):
        assert sample("plain", *options, "--batch_size", size, out=size) == 0
        np.testing.assert_array_equal(drawn(size)[:, known], pixels[[0, 1, 2, 0, 1]][:, known])
    assert np.abs(drawn("2").astype(int) - drawn("5")).max() <= 1
    sample("plain", *options, "--seed", "1", out="other")
    assert (drawn("other")[:, ~known] != drawn("5")[:, ~known]).any()


def test_each_image_has_the_mask_of_its_name_whatever_the_ending(sample, tmp_path):
    pixels = write(tmp_path / "in", ending="bmp")
    known = np.stack([write_mask(tmp_path / "masks" / f"{i}.png", seed=i) for i in range(3)])
    assert sample("plain", "--inpaint", "in", "--mask", "masks", "--num", "4") == 0
    turn = [0, 1, 2, 0]
    np.testing.assert_array_equal(drawn()[known[turn]], pixels[turn][known[turn]])
    assert (drawn()[~known[turn]] != pixels[turn][~known[turn]]).mean() > 0.5
    assert sample("plain", "--inpaint", "in/2.bmp", "--mask", "masks", "--num", "1", out="one") == 0
    np.testing.assert_array_equal(drawn("one")[0, known[2]], pixels[2, known[2]])


def test_holes_are_filled_as_the_module_does_with_the_resampling_asked_for(sample, tmp_path):
    (image,) = write(tmp_path / "in", count=1)
    known = write_mask(tmp_path / "mask.png")
    module = built("plain")
    x = from_uint8(torch.from_numpy(image)).expand(2, 1, 8, 8)
    mask = torch.from_numpy(known).expand(2, 1, 8, 8)
    for resampling in ((10, 1), (3, 2)):
        expected = module.inpaint(x, mask, torch.tensor([2, 0]), sample_generators(4, 2), *resampling)
        options = ["--num_resamples", str(resampling[0]), "--jump_length", str(resampling[1])]
        options = [] if resampling == (10, 1) else options
        options += ["--label", "2", "0", "--num", "2", "--seed", "4"]
        assert sample("plain", "--inpaint", "in", "--mask", "mask.png", *options) == 0
        np.testing.assert_array_equal(drawn(), to_uint8(expected)[:, 0].numpy())


# ---- small images


def test_small_images_are_enlarged_in_turn_as_the_module_does_whatever_the_batch_size(sample, tmp_path):
    low = from_uint8(torch.from_numpy(write(tmp_path / "low", count=2, size=4))).unsqueeze(1)
    expected = built("large").super_resolve(low[[0, 1, 0]], torch.tensor([2, 0, 2]), sample_generators(2, 3))
    for size in ("3", "2"):
        options = ("--num", "3", "--seed", "2", "--label", "2", "0", "--batch_size", size)
        assert sample("large", "--low_res", "low", *options) == 0
        assert np.abs(drawn().astype(int) - to_uint8(expected)[:, 0].numpy()).max() <= 1
    assert (drawn()[0] != drawn()[2]).any()  # of the same small image


def test_all_pictures_can_be_written(sample, tmp_path):
    write(tmp_path / "low", count=1, size=4)
    assert sample("large", "--low_res", "low/0.png", "--num", "4", "--format", "grid", "png") == 0
    assert (tmp_path / "out/grid.png").exists()
    assert len(list((tmp_path / "out").glob("00000*.png"))) == 4


# ---- reading


def test_files_are_found_in_the_order_of_their_names_and_one_may_be_named(tmp_path):
    write(tmp_path / "b", count=2)
    write(tmp_path / "a", count=1)
    names = [str(file.relative_to(tmp_path)) for file in image_files("--low_res", str(tmp_path))]
    assert names == ["a/0.png", "b/0.png", "b/1.png"]
    assert image_files("--low_res", str(tmp_path / "b/1.png")) == [tmp_path / "b/1.png"]


def test_images_are_read_in_the_models_channels_and_range(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "colour.png")
    Image.fromarray(pixels[..., 0]).save(tmp_path / "grey.png")
    files = [tmp_path / "colour.png", tmp_path / "grey.png"]
    colour, grey = read_images("--inpaint", files, (3, 4, 6))
    torch.testing.assert_close(colour, from_uint8(torch.from_numpy(pixels).permute(2, 0, 1)), rtol=0, atol=0)
    torch.testing.assert_close(grey, colour[:1].expand(3, 4, 6), rtol=0, atol=0)
    assert read_images("--inpaint", files, (1, 4, 6)).shape == (2, 1, 4, 6)


def test_a_masks_black_and_transparent_pixels_are_unknown(tmp_path):
    white, black, erased = (255, 255, 255, 255), (0, 0, 0, 255), (255, 255, 255, 0)
    Image.fromarray(np.array([[white, black, erased], [black, white, white]], dtype=np.uint8)).save(tmp_path / "m.png")
    mask = read_masks([tmp_path / "m.png"], (3, 2, 3))
    assert mask.shape == (1, 1, 2, 3)
    assert mask[0, 0].tolist() == [[True, False, False], [False, True, True]]


def test_masks_are_matched_by_folder_and_name(tmp_path):
    for name in ("images/a/0", "images/b/0", "masks/a/0", "masks/b/0", "masks/b/1"):
        write_mask(tmp_path / f"{name}.png")
    files = image_files("--inpaint", str(tmp_path / "images"))
    found = matching_masks(files, str(tmp_path / "images"), str(tmp_path / "masks"))
    assert found == [tmp_path / "masks/a/0.png", tmp_path / "masks/b/0.png"]


# ---- refusals


@pytest.fixture
def inputs(tmp_path):
    write(tmp_path / "in")
    write(tmp_path / "low", size=4)
    write_mask(tmp_path / "mask.png")
    (tmp_path / "empty").mkdir()
    Image.new("1", (8, 4)).save(tmp_path / "flat.png")
    Image.fromarray(np.array([[1, 254], [0, 255]], dtype=np.uint8).repeat(4, 0).repeat(4, 1)).save(
        tmp_path / "grey.png"
    )
    (tmp_path / "text.png").write_text("no image")
    for name in ("few/0.png", "few/1.png", "twice/0.png", "twice/0.bmp"):
        write_mask(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("plain", ("--inpaint", "in"), "--mask is missing: name an image that is white where --inpaint keeps pixels"),
        ("plain", ("--mask", "mask.png"), "--mask: there is nothing to fill"),
        (
            "plain",
            ("--inpaint", "in", "--mask", "mask.png", "--format", "gif"),
            "--format gif: shows the way of samples",
        ),
        ("large", ("--low_res", "low", "--format", "gif"), "--format gif: shows the way of samples from noise alone"),
        ("vae", ("--inpaint", "in", "--mask", "mask.png"), "--inpaint: the VAE in"),
        ("vae", ("--low_res", "low"), "draws from noise alone. Give the checkpoint of a DDPM"),
        ("plain", ("--low_res", "low"), "super_resolve needs a model that was trained with the condition SuperResol"),
        ("large", ("--inpaint", "in", "--mask", "mask.png"), "inpaint needs a model without condition"),
        ("large", (), "--low_res is missing: the DDPM in"),
        (
            "points",
            ("--inpaint", "in", "--mask", "mask.png"),
            "the model draws examples of shape (2,), and image files",
        ),
        ("pairs", ("--inpaint", "in", "--mask", "mask.png"), "shape (2, 8, 8), and image files hold 1 or 3 channels"),
        ("plain", ("--inpaint", "low", "--mask", "mask.png"), "must have 8 x 8 pixels (height x width), as the model"),
        ("large", ("--low_res", "in"), "--low_res: in/0.png must have 4 x 4 pixels (height x width), as the model"),
        (
            "plain",
            ("--inpaint", "in", "--mask", "flat.png"),
            "--mask: flat.png must have 8 x 8 pixels (height x width)",
        ),
        ("plain", ("--inpaint", "in", "--mask", "grey.png"), "must be black and white, got 32 pixels of other colours"),
        ("plain", ("--inpaint", "nowhere", "--mask", "mask.png"), "--inpaint: there is no nowhere"),
        ("plain", ("--inpaint", "in", "--mask", "nowhere"), "--mask: there is no nowhere"),
        ("large", ("--low_res", "empty"), "--low_res: empty holds no image files"),
        ("plain", ("--inpaint", "in", "--mask", "few"), "--mask: few holds no mask of the name 2"),
        ("plain", ("--inpaint", "in", "--mask", "twice"), "--mask: twice holds 2 masks of the name 0"),
        ("plain", ("--inpaint", "text.png", "--mask", "mask.png"), "cannot read text.png"),
        (
            "plain",
            ("--inpaint", "in", "--mask", "mask.png", "--jump_length", "3"),
            "jump_length must be below the sampl",
        ),
    ],
)
def test_what_does_not_fit_is_one_readable_error(sample, inputs, capsys, name, options, message):
    assert sample(name, *options) == 1
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert message in error


def test_images_beyond_those_asked_for_are_not_read(sample, inputs, tmp_path):
    assert sample("plain", "--inpaint", "in", "--mask", "few", "--num", "2") == 0
    (tmp_path / "low/2.png").write_text("no image")
    assert sample("large", "--low_res", "low", "--num", "2") == 0


def test_a_model_of_latents_is_refused_before_an_image_is_read():
    module = tiny.ddpm()
    module.latents = Latents(tiny.vae())
    with pytest.raises(ValueError, match="inpaint needs a model of pixels"):
        drawing(Namespace(inpaint="nowhere", mask="nowhere", ckpt_path="model.ckpt"), module)


def test_holes_and_small_images_at_once_are_refused(sample, inputs, capsys):
    with pytest.raises(SystemExit) as ended:
        sample("plain", "--inpaint", "in", "--mask", "mask.png", "--low_res", "low")
    assert ended.value.code == 2
    assert "--low_res: not allowed with argument --inpaint" in capsys.readouterr().err
