import math

import pytest
import torch
import torch.nn.functional as F

from lit_generative.gan.augmentation.draws import Draws
from lit_generative.gan.augmentation.warping import (
    _Resample,
    inverse_transform,
    product,
    rotation,
    sampling_grid,
    scaling,
    translation,
    warp,
)

BLIT = ("x_flip", "rotate_90", "translate_integer")
GEOMETRY = (*BLIT, "scale", "rotate", "scale_anisotropic", "translate")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def always(x: torch.Tensor) -> Draws:
    return Draws(x, torch.tensor(1.0))


def moved(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    return _Resample.apply(x, sampling_grid(matrix.expand(len(x), 3, 3), *x.shape[2:]))


def number(value: float) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.float64)


# ---- what each operation does


def test_a_flip_mirrors_columns_of_one_image_of_two():
    x = torch.randn(400, 2, 5, 7)
    flips = 0
    for image, original in zip(warp(x, always(x), ["x_flip"]), x, strict=True):
        stays = torch.equal(image, original)
        flips += not stays
        torch.testing.assert_close(image, original if stays else original.flip(2), atol=1e-5, rtol=1e-5)
    assert 150 < flips < 250


def test_quarter_turns_are_those_of_torch():
    x = torch.randn(64, 2, 6, 6, dtype=torch.float64)
    turns = []
    for image, original in zip(warp(x, always(x), ["rotate_90"]), x, strict=True):
        turns.append([k for k in range(4) if torch.allclose(image, original.rot90(k, (1, 2)))])
    assert all(len(found) == 1 for found in turns)
    assert {k for found in turns for k in found} == {0, 1, 2, 3}


def test_an_integer_translation_moves_pixels_by_at_most_an_eighth_and_reflects_the_border():
    x = torch.randn(200, 1, 8, 24, dtype=torch.float64)
    found = set()
    for image, original in zip(warp(x, always(x), ["translate_integer"]), x, strict=True):
        padded = torch.cat([original.flip(1), original, original.flip(1)], dim=1)
        padded = torch.cat([padded.flip(2), padded, padded.flip(2)], dim=2)
        shifts = [
            (dy, dx)
            for dy in range(-2, 3)
            for dx in range(-4, 5)
            if torch.allclose(image, padded[:, 8 - dy : 16 - dy, 24 - dx : 48 - dx])
        ]
        assert len(shifts) == 1
        found |= set(shifts)
    assert found == {(dy, dx) for dy in (-1, 0, 1) for dx in range(-3, 4)}


def test_enlarging_shows_the_middle_and_turning_follows_the_angle():
    y, x = torch.meshgrid(torch.arange(9.0) - 4, torch.arange(9.0) - 4, indexing="ij")
    ramp = (2 * x + 3 * y).double().expand(1, 1, 9, 9)
    middle = (..., slice(3, 6), slice(3, 6))  # clear of the border
    torch.testing.assert_close(moved(ramp, scaling(number(0.5), number(0.5)))[middle], ramp[middle] / 2)
    angle = 0.4
    turned = 2 * (math.cos(angle) * x - math.sin(angle) * y) + 3 * (math.sin(angle) * x + math.cos(angle) * y)
    torch.testing.assert_close(moved(ramp, rotation(number(angle)))[0, 0][middle], turned.double()[middle])
    torch.testing.assert_close(moved(ramp, translation(number(0.25), number(-0.5)))[middle], ramp[middle] - 0.5 + 1.5)


def test_isotropic_scaling_keeps_the_shape_and_anisotropic_the_area():
    x = torch.zeros(500, 1, 4, 4, dtype=torch.float64)
    isotropic = inverse_transform(always(x), ["scale"], 4, 4)
    torch.testing.assert_close(isotropic[:, 0, 0], isotropic[:, 1, 1])
    anisotropic = inverse_transform(always(x), ["scale_anisotropic"], 4, 4)
    torch.testing.assert_close(anisotropic[:, 0, 0] * anisotropic[:, 1, 1], torch.ones(500, dtype=torch.float64))
    for matrix in (isotropic, anisotropic):
        assert float(matrix[:, 0, 0].log2().std()) == pytest.approx(0.2, rel=0.1)


def test_fractional_translations_are_shares_of_each_size():
    x = torch.zeros(4000, 1, 4, 32, dtype=torch.float64)
    matrix = inverse_transform(always(x), ["translate"], 4, 32)
    torch.testing.assert_close(matrix[:, :2, :2], torch.eye(2, dtype=torch.float64).expand(4000, 2, 2))
    assert float(matrix[:, 0, 2].std()) == pytest.approx(0.125 * 32, rel=0.05)
    assert float(matrix[:, 1, 2].std()) == pytest.approx(0.125 * 4, rel=0.05)


def test_an_image_is_turned_at_all_with_the_probability_of_the_others():
    x = torch.zeros(20_000, 1, 4, 4, dtype=torch.float64)
    for name in GEOMETRY[3:]:
        matrix = inverse_transform(Draws(x, torch.tensor(0.36)), [name], 4, 4)
        acted = (matrix != torch.eye(3, dtype=torch.float64)).flatten(1).any(1)
        assert float(acted.double().mean()) == pytest.approx(0.36, abs=0.015), name


def test_what_is_composed_first_is_done_to_the_image_first():
    # A translation along x and then a quarter turn from x to y: content ends up along y.
    x = torch.zeros(1, 1, 7, 7, dtype=torch.float64)
    x[..., 3, 3] = 1
    quarter = rotation(number(-math.pi / 2)).round()
    y = moved(x, product(translation(number(2.0), number(0.0)), quarter))
    assert [int(i) for i in y[0, 0].argmax().unsqueeze(0)] == [5 * 7 + 3]


def test_operations_are_composed_in_the_order_of_the_paper():
    x = torch.zeros(50, 1, 8, 16, dtype=torch.float64)
    order = ["x_flip", "rotate_90", "translate_integer", "scale", "scale_anisotropic", "translate"]
    torch.manual_seed(3)
    composed = inverse_transform(always(x), order, 8, 16)
    torch.manual_seed(3)
    expected = torch.eye(3, dtype=torch.float64)
    for name in order:
        expected = expected @ inverse_transform(always(x), [name], 8, 16)
    torch.testing.assert_close(composed, expected)


def test_an_image_is_turned_before_and_after_it_is_stretched():
    x = torch.zeros(50, 1, 8, 8, dtype=torch.float64)
    m = inverse_transform(always(x), ["rotate", "scale_anisotropic"], 8, 8)[:, :2, :2]
    for square in (m @ m.transpose(1, 2), m.transpose(1, 2) @ m):  # diagonal without the turn on that side
        assert float(square[:, 0, 1].abs().mean()) > 0.1


# ---- laws


@pytest.mark.parametrize("operations", [*([name] for name in GEOMETRY), GEOMETRY])
def test_the_gradient_penalty_can_be_trained_through(operations):
    x = torch.randn(3, 2, 5, 5, dtype=torch.float64, requires_grad=True)

    def seeded(images):
        torch.manual_seed(1)
        return warp(images, always(images), operations)

    assert torch.autograd.gradcheck(seeded, x)
    assert torch.autograd.gradgradcheck(seeded, x)


def test_resampling_is_that_of_torch():
    x = torch.randn(3, 2, 5, 6, dtype=torch.float64)
    theta = torch.randn(3, 2, 3, dtype=torch.float64) / 2
    sizes = torch.tensor([6.0, 5.0], dtype=torch.float64)  # torch's matrix is in halves of the size
    matrix = torch.eye(3, dtype=torch.float64).repeat(3, 1, 1)
    matrix[:, :2] = theta * sizes[:, None] / torch.tensor([6.0, 5.0, 2.0], dtype=torch.float64)
    grid = F.affine_grid(theta, [3, 2, 5, 6], align_corners=False)
    torch.testing.assert_close(sampling_grid(matrix, 5, 6), grid)
    expected = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    torch.testing.assert_close(_Resample.apply(x, grid), expected)


def test_images_that_no_operation_acts_on_stay_bit_by_bit():
    x = torch.randn(64, 3, 8, 8)
    assert torch.equal(warp(x, Draws(x, torch.tensor(0.0)), GEOMETRY), x)
    y = warp(x, Draws(x, torch.tensor(0.1)), GEOMETRY)
    same = [torch.equal(a, b) for a, b in zip(x, y, strict=True)]
    assert 15 < sum(same) < 50
