import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from lit_generative.metrics.resizing import AntialiasResize, BicubicResize, CleanResize, TF1Resize

ALL = pytest.mark.parametrize("resize", [TF1Resize(), CleanResize(), AntialiasResize(), BicubicResize()])


def noise(*shape):
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@ALL
def test_the_result_is_square_and_float(resize):
    resized = resize(noise(2, 3, 5, 9), 7)
    assert resized.shape == (2, 3, 7, 7)
    assert resized.dtype == torch.float32
    assert resize(noise(0, 3, 5, 9), 7).shape == (0, 3, 7, 7)


@ALL
def test_a_plain_image_stays_plain(resize):
    torch.testing.assert_close(resize(torch.full((1, 1, 6, 9), 200).byte(), 13), torch.full((1, 1, 13, 13), 200.0))


@ALL
def test_the_same_size_changes_nothing(resize):
    images = noise(2, 3, 8, 8)
    torch.testing.assert_close(resize(images, 8), images.float(), atol=1e-3, rtol=0)


@ALL
def test_height_and_width_are_not_swapped(resize):
    images = noise(2, 3, 5, 9)
    torch.testing.assert_close(resize(images.transpose(2, 3), 7), resize(images, 7).transpose(2, 3), atol=1e-3, rtol=0)


def test_the_names_differ():
    assert len({r.name for r in (TF1Resize, CleanResize, AntialiasResize, BicubicResize)}) == 4


@pytest.mark.parametrize("shape", [(28, 28), (40, 64), (310, 299), (1, 3)])
def test_tf1_is_that_of_torch_fidelity(shape):
    images = noise(2, 3, *shape)
    expected = interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=(299, 299), align_corners=False)
    resize = TF1Resize()
    for _ in range(2):  # the second call uses the stored matrices
        torch.testing.assert_close(resize(images, 299), expected, atol=1e-3, rtol=0)


def test_tf1_by_hand():
    doubled = TF1Resize()(torch.tensor([[[[0, 100], [0, 100]]]], dtype=torch.uint8), 4)
    torch.testing.assert_close(doubled[0, 0], torch.tensor([0.0, 50.0, 100.0, 100.0]).expand(4, 4))


def test_clean_is_pillow_on_float_pixels():
    images = noise(2, 3, 20, 31)
    resized = CleanResize()(images, 9)
    for n, c in ((0, 0), (1, 2)):
        plane = Image.fromarray(images[n, c].float().numpy(), mode="F").resize((9, 9), Image.Resampling.BICUBIC)
        torch.testing.assert_close(resized[n, c], torch.from_numpy(np.array(plane)).clamp(0, 255))


def test_clean_cuts_overshoot_off_and_bicubic_keeps_it():
    edge = torch.tensor([0, 0, 255, 255]).byte().expand(1, 1, 4, 4)
    clean, bicubic = CleanResize()(edge, 16), BicubicResize()(edge, 16)
    assert clean.min() == 0
    assert clean.max() == 255
    assert bicubic.min() < -1
    assert bicubic.max() > 256
    torch.testing.assert_close(clean, bicubic.clamp(0, 255), atol=1e-2, rtol=0)


def test_antialias_is_torchmetrics_default():
    images = noise(2, 3, 20, 31)
    expected = F.interpolate(images.float(), (9, 9), mode="bilinear", antialias=True)
    torch.testing.assert_close(AntialiasResize()(images, 9), expected)


def test_antialiased_filters_see_every_pixel_and_tf1_does_not():
    stripes = torch.tensor([0, 255]).byte().repeat(16).expand(1, 1, 32, 32)
    assert TF1Resize()(stripes, 8).max() == 0
    for resize in (CleanResize(), AntialiasResize(), BicubicResize()):
        middle = resize(stripes, 8)[..., 2:-2]
        torch.testing.assert_close(middle, torch.full_like(middle, 127.5), atol=2, rtol=0)
