import numpy as np
import pytest
import torch
from PIL import Image

from lit_generative.pictures import PLOT_SIZE, grid, pil, save_gif, save_png
from lit_generative.tensor_ops import from_uint8


def _flat(*levels: int, channels: int = 1, height: int = 8, width: int = 6) -> torch.Tensor:
    """One image of one grey level for each of ``levels``."""
    pixels = torch.tensor(levels, dtype=torch.uint8).reshape(-1, 1, 1, 1)
    return from_uint8(pixels.expand(-1, channels, height, width))


def test_a_grid_has_a_border_of_one_pixel_and_is_enlarged_by_a_whole_factor():
    # 5 images of 8 x 6 in rows of 3: two rows, (2 * 9 + 1) x (3 * 7 + 1) = 19 x 22
    picture = grid(_flat(0, 50, 100, 150, 200), columns=3)
    factor = PLOT_SIZE // 22
    assert factor > 1
    assert picture.dtype == torch.uint8
    assert picture.shape == (19 * factor, 22 * factor, 3)


def test_samples_lie_in_reading_order_and_pixels_stay_pixels():
    enlarged = grid(_flat(0, 50, 100, 150, 200), columns=3)
    factor = PLOT_SIZE // 22
    picture = enlarged[::factor, ::factor]
    assert picture[4, [3, 10, 17]].tolist() == [[0] * 3, [50] * 3, [100] * 3]
    assert picture[13, [3, 10, 17]].tolist() == [[150] * 3, [200] * 3, [64] * 3]
    torch.testing.assert_close(picture.repeat_interleave(factor, 0).repeat_interleave(factor, 1), enlarged)


@pytest.mark.parametrize(("num", "rows", "columns"), [(4, 2, 2), (9, 3, 3), (7, 3, 3), (2, 2, 1), (12, 4, 3)])
def test_without_columns_a_grid_is_about_square(num, rows, columns):
    height, width = rows * 9 + 1, columns * 7 + 1
    factor = PLOT_SIZE // max(height, width)
    assert grid(_flat(*range(num))).shape == (height * factor, width * factor, 3)


def test_one_sample_is_one_picture():
    picture = grid(_flat(77))
    assert min(picture.shape[:2]) > 6 * 30
    assert picture[picture.shape[0] // 2, picture.shape[1] // 2].tolist() == [77] * 3


def test_images_larger_than_the_plot_keep_their_size():
    assert grid(_flat(1, 2, height=401, width=PLOT_SIZE), columns=2).shape == (403, 2 * PLOT_SIZE + 3, 3)


def test_three_channels_are_red_green_and_blue():
    image = from_uint8(torch.tensor([10, 20, 30], dtype=torch.uint8).reshape(1, 3, 1, 1).expand(2, 3, 4, 5))
    picture = grid(image, columns=2)
    assert picture[picture.shape[0] // 2, picture.shape[1] // 4].tolist() == [10, 20, 30]


@pytest.mark.parametrize(("channels", "expected"), [(2, [10, 10, 10]), (4, [10, 20, 30])])
def test_of_two_channels_the_first_is_shown_and_of_four_the_first_three(channels, expected):
    levels = torch.tensor([10, 20, 30, 40][:channels], dtype=torch.uint8).reshape(1, -1, 1, 1)
    picture = grid(from_uint8(levels.expand(2, channels, 4, 5)), columns=2)
    assert picture[picture.shape[0] // 2, picture.shape[1] // 4].tolist() == expected


def test_half_precision_with_a_gradient_can_be_shown():
    samples = _flat(0, 255).to(torch.bfloat16).requires_grad_()
    torch.testing.assert_close(grid(samples), grid(_flat(0, 255)))


def _dark(picture: torch.Tensor) -> torch.Tensor:
    """``(column, row)`` of the pixels that are not white."""
    return (picture != 255).any(dim=2).nonzero().flip(1)


def test_a_point_is_a_cross_at_its_place_with_y_upwards():
    picture = grid(torch.tensor([[0.75, -0.25]]))
    assert picture.shape == (PLOT_SIZE, PLOT_SIZE, 3)
    # [-1.5, 1.5] are the middles of the outermost pixels: three quarters from the left, five twelfths from below
    column, row = round((PLOT_SIZE - 1) * 3 / 4), PLOT_SIZE - 1 - round((PLOT_SIZE - 1) * 5 / 12)
    cross = {(column, row), (column + 1, row), (column - 1, row), (column, row + 1), (column, row - 1)}
    assert {tuple(pixel) for pixel in _dark(picture).tolist()} == cross


def test_points_outside_the_plot_are_left_out_and_those_on_its_edge_shown():
    assert len(_dark(grid(torch.tensor([[1.6, 0.0], [0.0, -9.0], [float("nan"), 0.0], [float("inf"), 0.0]])))) == 0
    corners = _dark(grid(torch.tensor([[1.5, 1.5], [-1.5, -1.5]]))).tolist()
    assert [PLOT_SIZE - 1, 0] in corners
    assert [0, PLOT_SIZE - 1] in corners


def test_no_samples_and_other_shapes_are_refused():
    with pytest.raises(ValueError, match="at least one sample, got none"):
        grid(torch.zeros(0, 1, 8, 8))
    with pytest.raises(ValueError, match=r"must be \(N, C, H, W\) or \(N, 2\), got \(4, 3\)"):
        grid(torch.zeros(4, 3))


def test_a_png_holds_the_picture_bit_for_bit_and_its_folder_is_made(tmp_path):
    picture = torch.arange(24, dtype=torch.uint8).reshape(2, 4, 3)
    path = save_png(picture, tmp_path / "a" / "b" / "c.png")
    assert path == tmp_path / "a" / "b" / "c.png"
    np.testing.assert_array_equal(np.asarray(Image.open(path)), picture.numpy())


def test_a_png_of_one_channel_is_grey(tmp_path):
    picture = torch.arange(8, dtype=torch.uint8).reshape(2, 4, 1)
    image = Image.open(save_png(picture, str(tmp_path / "grey.png")))
    assert image.mode == "L"
    np.testing.assert_array_equal(np.asarray(image), picture[..., 0].numpy())


def _film(path) -> tuple[list[int], list[int], int]:
    """Grey level and duration of each frame, and the loop count."""
    with Image.open(path) as film:
        levels, durations = [], []
        for i in range(film.n_frames):
            film.seek(i)
            levels.append(film.convert("L").getpixel((1, 1)))
            durations.append(film.info["duration"])
        return levels, durations, film.info["loop"]


def test_a_film_has_its_frames_in_order_loops_and_rests_on_the_last(tmp_path):
    pictures = [torch.full((4, 6, 3), level, dtype=torch.uint8) for level in (0, 100, 200, 255)]
    path = save_gif(pictures, tmp_path / "films" / "walk.gif", seconds=2.0)
    levels, durations, loop = _film(path)
    assert levels == [0, 100, 200, 255]
    assert durations == [500, 500, 500, 1500]
    assert loop == 0


def test_equal_neighbours_in_a_film_do_not_shorten_it(tmp_path):
    pictures = [torch.full((4, 6, 3), level, dtype=torch.uint8) for level in (0, 0, 200)]
    _, durations, _ = _film(save_gif(pictures, tmp_path / "still.gif", seconds=3.0))
    assert sum(durations) == 1000 + 1000 + 1500


def test_no_frame_is_shorter_than_viewers_can_show(tmp_path):
    pictures = [torch.full((4, 6, 3), level, dtype=torch.uint8) for level in range(0, 250, 25)]
    assert _film(save_gif(pictures, tmp_path / "fast.gif", seconds=0.01))[1][:9] == [20] * 9


def test_a_film_of_one_picture_is_a_still(tmp_path):
    assert _film_frames(save_gif([torch.zeros(4, 6, 3, dtype=torch.uint8)], tmp_path / "one.gif")) == 1


def _film_frames(path) -> int:
    with Image.open(path) as film:
        return film.n_frames


def test_a_film_without_pictures_is_refused(tmp_path):
    with pytest.raises(ValueError, match="save_gif: there must be at least one picture, got none"):
        save_gif([], tmp_path / "none.gif")


def test_a_picture_becomes_a_pil_image_of_its_size():
    assert pil(torch.zeros(4, 6, 3, dtype=torch.uint8)).size == (6, 4)
    assert pil(torch.zeros(4, 6, 1, dtype=torch.uint8)).mode == "L"
