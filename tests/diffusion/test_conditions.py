import jsonargparse
import numpy as np
import pytest
import torch
from PIL import Image

from lit_generative.diffusion.conditions import Condition, SuperResolution
from lit_generative.recipe import describe

CONDITIONS = [cls for cls in Condition.__subclasses__() if cls.__module__.startswith("lit_generative.")]
every_condition = pytest.mark.parametrize("condition", [cls(2) for cls in CONDITIONS], ids=lambda c: type(c).__name__)


def images(num: int = 3) -> torch.Tensor:
    return torch.rand(num, 2, 8, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1


def ramp() -> torch.Tensor:
    """Rises by 3 a row and by 1 a column, ``(1, 1, 16, 24)``."""
    rows, columns = torch.arange(16, dtype=torch.float64), torch.arange(24, dtype=torch.float64)
    return (3 * rows[:, None] + columns)[None, None]


# ---- every condition


@every_condition
def test_a_condition_has_the_size_of_the_image_and_depends_on_it_alone(condition):
    x0 = images()
    shown = condition.of(x0)
    assert shown.shape[0] == 3
    assert shown.shape[2:] == x0.shape[2:]
    assert shown.dtype == x0.dtype
    torch.testing.assert_close(shown, torch.cat([condition.of(x) for x in x0.split(1)]))


@every_condition
def test_a_description_builds_the_same_condition(condition):
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--condition", type=Condition)
    again = parser.instantiate(parser.parse_object({"condition": describe(condition)})).condition
    assert type(again) is type(condition)
    assert vars(again) == vars(condition)


# ---- super-resolution


def test_a_small_image_is_made_of_means_over_squares():
    x0 = torch.arange(24.0).reshape(1, 1, 4, 6)
    small = SuperResolution(2).shrink(x0)
    # 0, 1, 6 and 7 are the first square; the next lies 2 to the right or 12 down.
    torch.testing.assert_close(small, torch.tensor([[[[3.5, 5.5, 7.5], [15.5, 17.5, 19.5]]]]))


def test_the_condition_is_the_small_image_enlarged():
    condition = SuperResolution(4)
    x0 = images()
    low = condition.shrink(x0)
    assert low.shape == (3, 2, 2, 3)
    torch.testing.assert_close(condition.enlarge(low), condition.of(x0), rtol=0, atol=0)


def test_the_small_version_has_the_shape_it_says_and_another_is_refused():
    condition, x0 = SuperResolution(4), images()
    low = condition.shrink(x0)
    assert condition.small_shape((2, 8, 12)) == tuple(low.shape[1:]) == (2, 2, 3)
    condition.check_small(low, (2, 8, 12))
    for other in (low.mT, low[:, :1], x0):
        with pytest.raises(ValueError, match=r"SuperResolution: needs small images of shape \(N, 2, 2, 3\), got \(3"):
            condition.check_small(other, (2, 8, 12))


@pytest.mark.parametrize("scale", [2, 4])
def test_a_ramp_comes_back_where_no_border_is_near(scale):
    """So neither step moves the image, along either axis."""
    inside = slice(6, -6)
    shown = SuperResolution(scale).of(ramp())
    torch.testing.assert_close(shown[..., inside, inside], ramp()[..., inside, inside])


def test_enlarging_agrees_with_pillow():
    low = images(1)[0, 0].float()
    pillow = Image.fromarray(low.numpy()).resize((36, 24), Image.Resampling.BICUBIC)
    enlarged = SuperResolution(3).enlarge(low[None, None])[0, 0]
    torch.testing.assert_close(enlarged, torch.from_numpy(np.array(pillow)), rtol=0, atol=1e-5)


def test_a_constant_image_stays_as_it_is():
    x0 = torch.full((1, 3, 8, 12), 0.3, dtype=torch.float64)
    torch.testing.assert_close(SuperResolution(4).of(x0), x0)


@pytest.mark.parametrize("scale", [1, 0, -2])
def test_a_scale_that_does_not_shrink_is_refused(scale):
    with pytest.raises(ValueError, match=f"SuperResolution: scale must be at least 2, got {scale}"):
        SuperResolution(scale)


@pytest.mark.parametrize("shape", [(1, 1, 9, 8), (1, 1, 8, 9), (8, 8)])
def test_sides_that_the_scale_does_not_divide_are_refused(shape):
    with pytest.raises(ValueError, match=r"whose sides are multiples of scale=4, got \("):
        SuperResolution(4).of(torch.zeros(shape))
