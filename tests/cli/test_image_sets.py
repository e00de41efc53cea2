import numpy as np
import pytest
import torch
from PIL import Image

from lit_generative.cli.image_sets import FolderImages, NpzImages, load_arrays


def write_images(folder, count: int = 5, size=(6, 4), mode: str = "RGB", seed: int = 0) -> np.ndarray:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, size[1], size[0], 3), dtype=np.uint8)
    folder.mkdir(exist_ok=True)
    for index, image in enumerate(pixels):
        Image.fromarray(image).convert(mode).save(folder / f"{index:03d}.png")
    return pixels


def test_a_folder_gives_its_images_in_the_order_of_their_names(tmp_path):
    pixels = write_images(tmp_path / "a")
    source = FolderImages(tmp_path / "a")
    assert source.count == 5
    torch.testing.assert_close(
        source.pixels(torch.tensor([3, 1])), torch.from_numpy(pixels[[3, 1]]).permute(0, 3, 1, 2)
    )


def test_grey_files_come_as_three_equal_channels(tmp_path):
    write_images(tmp_path / "a", mode="L")
    pixels = FolderImages(tmp_path / "a").pixels(torch.arange(5))
    assert pixels.shape == (5, 3, 4, 6)
    assert torch.equal(pixels[:, 0], pixels[:, 2])


def test_images_of_two_sizes_are_refused_by_name(tmp_path):
    write_images(tmp_path / "a")
    Image.new("RGB", (7, 4)).save(tmp_path / "a" / "004.png")
    with pytest.raises(ValueError, match=r"004.png: all images must have one size, this one is 4 x 7 .* 4 x 6"):
        FolderImages(tmp_path / "a").pixels(torch.arange(5))


def test_a_broken_file_is_named(tmp_path):
    write_images(tmp_path / "a")
    (tmp_path / "a" / "002.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"cannot read .*002.png"):
        FolderImages(tmp_path / "a").pixels(torch.arange(5))


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no image files"):
        FolderImages(tmp_path)


def test_the_record_changes_with_names_and_pixels(tmp_path):
    write_images(tmp_path / "a")
    before = FolderImages(tmp_path / "a").record()
    assert before == FolderImages(tmp_path / "a").record()
    assert (before["folder"], before["count"]) == ("a", 5)
    (tmp_path / "a" / "004.png").rename(tmp_path / "a" / "005.png")
    renamed = FolderImages(tmp_path / "a").record()
    assert renamed["names"] != before["names"]
    Image.new("RGB", (6, 4)).save(tmp_path / "a" / "005.png")
    assert FolderImages(tmp_path / "a").record()["fingerprint"] != renamed["fingerprint"]


@pytest.mark.parametrize("name", ["images", "arr_0"])
@pytest.mark.parametrize("shape", [(5, 4, 6, 3), (5, 4, 6, 1), (5, 4, 6)])
def test_an_array_gives_its_images(tmp_path, name, shape):
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.savez(tmp_path / "a.npz", **{name: images})
    source = NpzImages(tmp_path / "a.npz")
    expected = torch.from_numpy(images.reshape(5, 4, 6, -1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(source.pixels(torch.tensor([4, 0])), expected[[4, 0]])
    assert source.record()["count"] == 5


def test_floats_are_quantized(tmp_path):
    images = np.linspace(-1, 1, 2 * 4 * 4, dtype=np.float32).reshape(2, 4, 4, 1)
    np.savez(tmp_path / "a.npz", images=images)
    pixels = NpzImages(tmp_path / "a.npz").pixels(torch.tensor([0, 1]))
    assert pixels.dtype == torch.uint8
    assert (int(pixels.min()), int(pixels.max())) == (0, 255)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((3, 4, 4, 1), 2.0, np.float32), r"image 0: 16 values lie outside \[-1, 1\], the largest is 2"),
        (np.zeros((3, 4, 4, 2), np.uint8), r"must hold an array `images` \(N, H, W, C\)"),
        (np.zeros((3, 4), np.uint8), "must hold an array"),
        (np.zeros((3, 4, 4, 1), np.int64), "must be uint8, or floats in"),
    ],
)
def test_other_arrays_are_refused(tmp_path, array, message):
    np.savez(tmp_path / "a.npz", images=array)
    with pytest.raises(ValueError, match=message):
        NpzImages(tmp_path / "a.npz")


def test_nan_in_an_array_is_named(tmp_path):
    images = np.zeros((3, 4, 4, 1), np.float32)
    images[1, 2, 2] = np.nan
    np.savez(tmp_path / "a.npz", images=images)
    with pytest.raises(ValueError, match=r"a.npz, process 0, image 1: NaN"):
        NpzImages(tmp_path / "a.npz").pixels(torch.arange(3))


def test_python_objects_and_broken_files_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.array([{"a": 1}], dtype=object))
    (tmp_path / "b.npz").write_bytes(b"PK something")
    for name in ("a.npz", "b.npz"):
        with pytest.raises(ValueError, match=r"cannot be read as .npz"):
            load_arrays(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no file"):
        load_arrays(tmp_path / "c.npz")
