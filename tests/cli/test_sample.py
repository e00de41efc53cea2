"""``litgen sample``: from a checkpoint alone."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from lit_generative.__main__ import main
from lit_generative.callbacks.checkpoint import Checkpoint
from lit_generative.callbacks.ema import EMA
from lit_generative.data.mixtures import RingMixture
from lit_generative.networks.mlp import MLPDiscriminator, MLPGenerator
from tests.families import FAMILIES, build, digits, trainer


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for family in FAMILIES:
        t = trainer(folder / family, max_steps=3, limit_val_batches=0)
        t.fit(build(family), digits())
    points = build("gan", generator=MLPGenerator(), discriminator=MLPDiscriminator())
    trainer(
        folder / "ring",
        max_steps=1,
        callbacks=[EMA(), Checkpoint(dirpath=str(folder / "ring"))],
        limit_val_batches=0,
    ).fit(points, RingMixture(num_samples=200, batch_size=32))
    bare = [Checkpoint(dirpath=str(folder / "no_ema"))]
    trainer(folder / "no_ema", max_steps=1, callbacks=bare, limit_val_batches=0).fit(build("vae"), digits())
    return folder


@pytest.fixture
def sample(checkpoints, tmp_path):
    def run(family: str, *options: str, out: str = "out") -> int:
        path = str(checkpoints / family / "last.ckpt")
        return main(["sample", "--ckpt_path", path, "--out", str(tmp_path / out), "--device", "cpu", *options])

    return run


def images(tmp_path, out: str = "out") -> np.ndarray:
    return np.load(tmp_path / out / "samples.npz")["images"]


@pytest.mark.parametrize("family", FAMILIES)
def test_npz_holds_images_as_uint8_n_h_w_c(sample, tmp_path, family):
    assert sample(family, "--format", "npz", "--num", "5") == 0
    assert images(tmp_path).shape == (5, 8, 8, 1)
    assert images(tmp_path).dtype == np.uint8
    assert images(tmp_path).std() > 0


def test_npz_of_a_model_of_points_holds_float32_points(sample, tmp_path):
    assert sample("ring", "--format", "npz", "grid", "--num", "5") == 0
    points = np.load(tmp_path / "out/samples.npz")["points"]
    assert points.shape == (5, 2)
    assert points.dtype == np.float32
    assert (tmp_path / "out/grid.png").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_seed_gives_the_same_images_whatever_the_batch_size(sample, tmp_path, family):
    for size in ("7", "3", "1"):
        assert sample(family, "--format", "npz", "--num", "7", "--seed", "3", "--batch_size", size, out=size) == 0
    for size in ("3", "1"):
        # Float sums may round apart in batches of another size: at most one grey level.
        assert np.abs(images(tmp_path, size).astype(int) - images(tmp_path, "7")).max() <= 1


def test_another_seed_gives_other_images(sample, tmp_path):
    sample("vae", "--format", "npz", "--seed", "0", out="a")
    sample("vae", "--format", "npz", "--seed", "1", out="b")
    assert (images(tmp_path, "a") != images(tmp_path, "b")).any()


def test_png_writes_a_file_a_sample_and_grid_one_picture(sample, tmp_path):
    assert sample("gan", "--format", "png", "grid", "npz", "--num", "6", "--columns", "3") == 0
    assert len(list((tmp_path / "out").glob("00000*.png"))) == 6
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out/000002.png")), images(tmp_path)[2, :, :, 0])
    width, height = Image.open(tmp_path / "out/grid.png").size
    assert width > height  # three columns, two rows


def test_gif_shows_the_way_from_noise_to_data(sample, tmp_path):
    assert sample("ddpm", "--format", "gif", "--num", "4") == 0
    assert Image.open(tmp_path / "out/samples.gif").n_frames == 4  # a frame for each of the sampler's steps


def test_labels_are_taken_in_turn(sample, tmp_path):
    sample("ddpm", "--format", "npz", "--num", "4", "--label", "3", "5", out="turn")
    sample("ddpm", "--format", "npz", "--num", "4", "--label", "3", out="threes")
    same = (images(tmp_path, "turn") == images(tmp_path, "threes")).all(axis=(1, 2, 3))
    assert same.tolist() == [True, False, True, False]


def test_the_averaged_weights_are_the_default_and_can_be_refused(sample, tmp_path):
    for out, option in (
        ("default", ()),
        ("ema", ("--ema",)),
        ("named", ("--ema_profile", "ema")),
        ("raw", ("--no-ema",)),
    ):
        assert sample("ddpm", "--format", "npz", "--num", "2", *option, out=out) == 0
    for out in ("ema", "named"):
        np.testing.assert_array_equal(images(tmp_path, "default"), images(tmp_path, out))
    assert (images(tmp_path, "raw") != images(tmp_path, "ema")).any()


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("vae", ("--label", "1"), "has no classes"),
        ("gan", ("--label", "10"), "classes 0..9, got 10"),
        ("vae", ("--format", "gif"), "draws in one step"),
        ("ring", ("--format", "png"), "points, not images"),
        ("no_ema", ("--ema",), "no averaged weights"),
        ("vae", ("--ema_profile", "slow"), "has no average 'slow'. It has: ['ema']"),
        ("vae", ("--no-ema", "--ema_profile", "ema"), "contradict each other"),
        ("nowhere", (), "There is no checkpoint"),
    ],
)
def test_what_a_checkpoint_cannot_do_is_one_readable_error(sample, capsys, family, options, message):
    assert sample(family, *options) == 1
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert message in error


def test_a_number_below_one_is_refused(sample):
    with pytest.raises(SystemExit) as ended:
        sample("vae", "--num", "0")
    assert ended.value.code == 2


def test_a_folder_means_its_newest_checkpoint(checkpoints, tmp_path):
    assert main(["sample", "--ckpt_path", str(checkpoints / "vae"), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "grid.png").exists()
