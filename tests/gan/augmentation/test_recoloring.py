import math

import pytest
import torch

from lit_generative.gan.augmentation.draws import Draws
from lit_generative.gan.augmentation.recoloring import color_transform, recolor

COLOR = ("brightness", "contrast", "luma_flip", "hue", "saturation")
GREY = torch.full((3, 3), 1 / 3, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def matrices(name: str, num: int = 2000, channels: int = 3, p: float = 1.0) -> torch.Tensor:
    x = torch.zeros(num, channels, 1, 1, dtype=torch.float64)
    return color_transform(Draws(x, torch.tensor(p)), [name], channels)


def eye(num: int, size: int) -> torch.Tensor:
    return torch.eye(size, dtype=torch.float64).expand(num, size, size)


def test_brightness_shifts_all_channels_alike():
    m = matrices("brightness")
    torch.testing.assert_close(m[:, :3, :3], eye(2000, 3))
    assert torch.equal(m[:, :3, 3], m[:, :1, 3].expand(-1, 3))
    assert float(m[:, 0, 3].std()) == pytest.approx(0.2, rel=0.05)


def test_contrast_scales_all_channels_alike():
    m = matrices("contrast")
    torch.testing.assert_close(m[:, :3, :3], m[:, :1, :1] * eye(2000, 3))
    assert float(m[:, 0, 0].log2().std()) == pytest.approx(0.5, rel=0.05)
    assert not m[:, :3, 3].any()


def test_a_luma_flip_turns_grey_round_and_keeps_what_lies_across():
    m = matrices("luma_flip")[:, :3, :3]
    flipped = eye(1, 3)[0] - 2 * GREY
    is_flipped = [torch.allclose(one, flipped) for one in m]
    assert all(flip or torch.equal(one, eye(1, 3)[0]) for one, flip in zip(m, is_flipped, strict=True))
    assert sum(is_flipped) / 2000 == pytest.approx(0.5, abs=0.05)


def test_hue_turns_colours_about_the_grey_axis_by_any_angle():
    m = matrices("hue")[:, :3, :3]
    torch.testing.assert_close(m @ m.transpose(1, 2), eye(2000, 3))
    torch.testing.assert_close(torch.linalg.det(m), torch.ones(2000, dtype=torch.float64))
    torch.testing.assert_close(m @ GREY, GREY.expand(2000, 3, 3))
    angles = ((m.diagonal(dim1=1, dim2=2).sum(1) - 1) / 2).clamp(-1, 1).acos()
    assert float(angles.mean()) == pytest.approx(math.pi / 2, rel=0.05)


def test_saturation_scales_the_distance_from_grey():
    m = matrices("saturation")[:, :3, :3]
    factor = (m - GREY)[:, 0, 0] * 1.5
    torch.testing.assert_close(m, factor[:, None, None] * (eye(2000, 3) - GREY) + GREY)
    assert float(factor.log2().std()) == pytest.approx(1.0, rel=0.05)


def test_operations_are_done_in_their_order():
    x = torch.zeros(50, 3, 1, 1, dtype=torch.float64)
    torch.manual_seed(1)
    both = color_transform(Draws(x, torch.tensor(1.0)), COLOR[:2], 3)
    torch.testing.assert_close(both[:, 0, 3] / both[:, 0, 0], _first_shift(x))  # contrast scales the shift too


def _first_shift(x: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(1)
    return color_transform(Draws(x, torch.tensor(1.0)), COLOR[:1], 3)[:, 0, 3]


def test_each_pixel_is_changed_by_the_matrix_of_its_image():
    x = torch.randn(4, 3, 2, 5, dtype=torch.float64)
    torch.manual_seed(2)
    y = recolor(x, Draws(x, torch.tensor(1.0)), COLOR)
    torch.manual_seed(2)
    m = color_transform(Draws(x, torch.tensor(1.0)), COLOR, 3)
    expected = torch.einsum("nij,njhw->nihw", m[:, :3, :3], x) + m[:, :3, 3, None, None]
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("name", COLOR[:3])
def test_grey_images_have_the_first_three(name):
    m = matrices(name, channels=1)
    assert m.shape == (2000, 2, 2)
    assert not torch.equal(m, eye(2000, 2))
    if name == "luma_flip":
        assert set(m[:, 0, 0].tolist()) == {-1.0, 1.0}


@pytest.mark.parametrize("name", COLOR[3:])
def test_grey_images_have_neither_hue_nor_saturation(name):
    assert torch.equal(matrices(name, channels=1), eye(2000, 2))


@pytest.mark.parametrize("name", COLOR)
def test_an_operation_acts_with_its_probability(name):
    changed = (matrices(name, 20_000, p=0.4) != eye(20_000, 4)).flatten(1).any(1)
    expected = 0.2 if name == "luma_flip" else 0.4  # it flips one of two
    assert float(changed.double().mean()) == pytest.approx(expected, abs=0.015)


@pytest.mark.parametrize("channels", [1, 3])
def test_images_that_no_operation_acts_on_stay_bit_by_bit(channels):
    x = torch.randn(5, channels, 3, 4)
    assert torch.equal(recolor(x, Draws(x, torch.tensor(0.0)), COLOR), x)


def test_the_gradient_penalty_can_be_trained_through():
    x = torch.randn(3, 3, 2, 2, dtype=torch.float64, requires_grad=True)

    def seeded(images):
        torch.manual_seed(1)
        return recolor(images, Draws(images, torch.tensor(1.0)), COLOR)

    assert torch.autograd.gradcheck(seeded, x)
    assert torch.autograd.gradgradcheck(seeded, x)
