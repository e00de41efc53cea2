import pytest
import torch

from lit_generative.gan.augmentation.diff_augment import POLICIES, DiffAugment, change_color, cut_out, translate
from tests import tiny


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("policy", [*([name] for name in POLICIES), POLICIES])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_keep_shape_and_type_and_gradients_pass(policy, channels):
    x = torch.randn(6, channels, 8, 12, requires_grad=True)
    y = DiffAugment(policy)(x)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    y.square().sum().backward()
    assert (x.grad.flatten(1).abs().sum(1) > 0).all()


@pytest.mark.parametrize("policy", POLICIES)
def test_each_image_has_its_own_draw(policy):
    x = torch.randn(1, 3, 16, 16).expand(8, -1, -1, -1)
    y = DiffAugment([policy])(x)
    assert len({tuple(image.flatten().tolist()) for image in y}) > 4


def test_a_translation_moves_whole_pixels_by_at_most_an_eighth_and_black_comes_in():
    x = torch.rand(64, 2, 8, 16)
    moved = translate(x)
    for image, original in zip(moved, x, strict=True):
        shifts = [
            (dy, dx) for dy in (-1, 0, 1) for dx in (-2, -1, 0, 1, 2) if torch.equal(_shifted(original, dy, dx), image)
        ]
        assert len(shifts) == 1


def _shifted(image: torch.Tensor, dy: int, dx: int) -> torch.Tensor:
    H, W = image.shape[1:]
    out = -torch.ones_like(image)
    for y in range(H):
        for x in range(W):
            if 0 <= y + dy < H and 0 <= x + dx < W:
                out[:, y, x] = image[:, y + dy, x + dx]
    return out


def test_a_cutout_is_a_grey_rectangle_of_half_the_size_or_less_at_the_border():
    x = torch.ones(200, 3, 8, 6)
    hole = cut_out(x) == 0
    rows, columns = hole.any(dim=(1, 3)).sum(1), hole.any(dim=(1, 2)).sum(1)
    assert torch.equal(hole.sum(dim=(1, 2, 3)), 3 * rows * columns)
    assert (int(rows.max()), int(columns.max())) == (4, 3)
    assert int(rows.min()) >= 1


def test_colour_changes_are_those_of_their_factors(monkeypatch):
    x = torch.rand(2, 3, 4, 5)
    draws = torch.tensor([[0.5, 1.0], [0.5, 0.0], [0.5, 1.0]])
    monkeypatch.setattr(torch, "rand", lambda *_, **__: draws)
    y = change_color(x)
    torch.testing.assert_close(y[0], x[0])  # in the middle of every range nothing changes
    grey = (x[1] + 0.5).mean(0, keepdim=True).expand(3, -1, -1)  # brighter, without saturation, more contrast
    torch.testing.assert_close(y[1], grey.mean() + 1.5 * (grey - grey.mean()))


def test_a_gan_trains_through_it(tmp_path):
    module = tiny.image_gan(augmentation=DiffAugment(["translation", "color"]))
    tiny.train(tmp_path, module, tiny.digits(), max_steps=2)
    assert all(value.isfinite().all() for value in module.state_dict().values())


def test_unknown_policies_and_points_are_refused():
    with pytest.raises(ValueError, match=r"policy must be some of .* got \['colour'\]"):
        DiffAugment(["colour"])
    with pytest.raises(ValueError, match="policy must be some of"):
        DiffAugment([])
    with pytest.raises(ValueError, match=r"needs images \(N, C, H, W\), got \(3, 2\)"):
        DiffAugment()(torch.zeros(3, 2))
