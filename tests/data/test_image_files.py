import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from lit_generative.data.image_files import decode_image, find_images, shown


def save(path, mode: str = "RGB", size=(6, 4), color=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path, **options)
    return str(path)


def colours(image: torch.Tensor) -> list[list[int]]:
    """The different pixels of an image."""
    return image.flatten(1).T.unique(dim=0).tolist()


def half_and_half(path, left, right, mode="RGB", size=(8, 4), **options) -> str:
    image = Image.new(mode, size, right)
    image.paste(left, (0, 0, size[0] // 2, size[1]))
    image.save(path, **options)
    return str(path)


def test_images_are_found_at_any_depth_and_in_any_case_and_nothing_else(tmp_path):
    for name in ("b/z.PNG", "b/a.png", "b.png", "a/deep/er/x.JPeG"):
        save(tmp_path / name)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    (tmp_path / "png").write_text("no image")
    assert find_images(str(tmp_path)) == ["a/deep/er/x.JPeG", "b/a.png", "b/z.PNG", "b.png"]


def test_hidden_files_and_folders_are_left_out(tmp_path):
    for name in ("a.png", "._a.png", ".thumbs/b.png"):
        save(tmp_path / name)
    assert find_images(str(tmp_path)) == ["a.png"]


def test_a_circle_of_links_ends(tmp_path):
    save(tmp_path / "a" / "x.png")
    (tmp_path / "a" / "loop").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "a" / "self").symlink_to(tmp_path / "a", target_is_directory=True)
    assert find_images(str(tmp_path)) == ["a/x.png"]


def test_a_linked_folder_is_read_once_and_under_its_own_name_if_it_has_one(tmp_path):
    save(tmp_path / "pool" / "x.png")
    save(tmp_path / "root" / "own" / "y.png")
    for name, target in (("link", "pool"), ("more", "pool"), ("alias", "root/own")):
        (tmp_path / "root" / name).symlink_to(tmp_path / target, target_is_directory=True)
    found = find_images(str(tmp_path / "root"))
    assert sorted(os.path.basename(path) for path in found) == ["x.png", "y.png"]
    assert "own/y.png" in found


def test_only_regular_files_are_images(tmp_path):
    save(tmp_path / "a.png")
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "linked.png").symlink_to(tmp_path / "a.png")
    assert find_images(str(tmp_path)) == ["a.png", "linked.png"]


def test_a_name_that_is_not_utf8_can_be_found_read_and_shown(tmp_path):
    path = os.fsencode(tmp_path) + b"/\xff\xfe.png"
    with open(save(tmp_path / "a.png"), "rb") as source, open(path, "wb") as target:
        target.write(source.read())
    (tmp_path / "a.png").unlink()
    (found,) = find_images(str(tmp_path))
    decode_image(str(tmp_path / found), 4)
    assert shown(found).encode() == rb"\xff\xfe.png"


def test_pixels_come_back_as_written(tmp_path):
    pixels = torch.randint(256, (3, 5, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    torch.testing.assert_close(decode_image(str(tmp_path / "a.png"), 5), pixels)


def test_one_channel_is_grey(tmp_path):
    path = save(tmp_path / "a.png", color=(255, 0, 0))
    assert decode_image(path, 4, channels=1).unique().tolist() == [76]  # ITU-R 601: 0.299 * 255
    assert decode_image(path, 4, channels=1).shape == (1, 4, 4)


def test_the_centre_is_kept_and_the_shorter_side_scaled(tmp_path):
    image = Image.new("L", (8, 4), 0)
    image.paste(200, (2, 0, 6, 4))
    image.save(tmp_path / "a.png")
    assert decode_image(str(tmp_path / "a.png"), 4, channels=1).unique().tolist() == [200]
    assert decode_image(str(tmp_path / "a.png"), 2, channels=1).shape == (1, 2, 2)


def test_making_an_image_smaller_takes_means(tmp_path):
    checkerboard = np.tile(np.array([[0, 200], [200, 0]], dtype=np.uint8), (16, 16))
    Image.fromarray(checkerboard).save(tmp_path / "a.png")
    torch.testing.assert_close(
        decode_image(str(tmp_path / "a.png"), 4, 1).float(), torch.full((1, 4, 4), 100.0), rtol=0, atol=2
    )


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (200, 1)])
def test_extreme_shapes_are_accepted(tmp_path, size):
    assert colours(decode_image(save(tmp_path / "a.png", size=size, color=(1, 2, 3)), 4)) == [[1, 2, 3]]


@pytest.mark.parametrize(("background", "level"), [("white", 255), ("black", 0)])
def test_transparent_pixels_show_the_background_and_not_their_hidden_colour(tmp_path, background, level):
    path = half_and_half(tmp_path / "a.png", (10, 20, 30, 255), (90, 90, 90, 0), mode="RGBA", size=(8, 8))
    assert sorted(colours(decode_image(path, 8, background=background))) == sorted([[10, 20, 30], [level] * 3])


def test_half_transparent_pixels_are_mixed_with_the_background(tmp_path):
    path = save(tmp_path / "a.png", mode="LA", color=(0, 51))
    assert colours(decode_image(path, 4)) == [[204, 204, 204]]


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_a_transparent_colour_shows_the_background(tmp_path, mode):
    path = save(tmp_path / "a.png", mode=mode, transparency=(0, 0, 0) if mode == "RGB" else 0)
    assert colours(decode_image(path, 4, background="white")) == [[255, 255, 255]]


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_16_bit_grey_is_rescaled_and_not_clipped(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(np.array([[0, 257], [32896, 65535]], dtype=np.uint16)).save(path)
    assert decode_image(str(path), 2, channels=1).flatten().tolist() == [0, 1, 128, 255]


def test_float_grey_between_zero_and_one_is_rescaled(tmp_path):
    Image.fromarray(np.array([[0, 0.2], [0.6, 1]], dtype=np.float32)).save(tmp_path / "a.tiff")
    assert decode_image(str(tmp_path / "a.tiff"), 2, channels=1).flatten().tolist() == [0, 51, 153, 255]


@pytest.mark.parametrize("value", [1.5, -0.1, float("nan")])
def test_float_grey_of_unknown_range_is_refused(tmp_path, value):
    Image.fromarray(np.full((2, 2), value, dtype=np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(ValueError, match=r"a.tiff .*values must lie in \[0, 1\]"):
        decode_image(str(tmp_path / "a.tiff"), 2)


def test_cmyk_bilevel_and_animated_images_are_converted(tmp_path):
    cmyk = decode_image(save(tmp_path / "a.jpg", mode="CMYK", color=(0, 255, 255, 0), quality=100), 4)
    torch.testing.assert_close(cmyk[:, 0, 0].float(), torch.tensor([255.0, 0.0, 0.0]), rtol=0, atol=4)
    assert colours(decode_image(save(tmp_path / "b.png", mode="1", color=1), 4)) == [[255] * 3]
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "c.gif", save_all=True, append_images=frames[1:])
    assert colours(decode_image(str(tmp_path / "c.gif"), 4)) == [[255, 0, 0]]


def test_an_image_is_turned_as_its_exif_orientation_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned right by a quarter: left becomes top
    path = half_and_half(tmp_path / "a.png", (255, 0, 0), (0, 0, 255), size=(8, 8), exif=exif)
    image = decode_image(path, 8)
    assert colours(image[:, :4]) == [[255, 0, 0]]
    assert colours(image[:, 4:]) == [[0, 0, 255]]


def noisy(path):
    Image.fromarray(np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)).save(path)
    return path


def write_png(path, width: int, *chunks: tuple[bytes, bytes]) -> None:
    """A square bilevel PNG of these chunks, whatever they hold."""
    header = (b"IHDR", struct.pack(">2I5B", width, width, 1, 0, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n"
    for kind, content in (header, *chunks, (b"IEND", b"")):
        data += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("truncated.jpg", lambda path: os.truncate(noisy(path), 3000)),
        ("truncated.png", lambda path: os.truncate(noisy(path), 3000)),
        ("empty.png", lambda path: path.write_bytes(b"")),
        ("text.jpg", lambda path: path.write_text("not an image")),
        ("flipped.png", lambda path: path.write_bytes(noisy(path).read_bytes().replace(b"IDAT", b"IDBT"))),
        ("bomb.png", lambda path: write_png(path, 20_000, (b"IDAT", b""))),  # 400 megapixels
        ("broken.png", lambda path: write_png(path, 8, (b"IDAT", zlib.compress(bytes(16))[:4]), (b"\0\0\0\0", b"xx"))),
        ("gone.png", lambda path: None),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, damage):
    damage(tmp_path / name)
    with pytest.raises(ValueError, match=rf"decode_image: cannot read .*{name} \(.*\). Remove or replace the file"):
        decode_image(str(tmp_path / name), 4)
