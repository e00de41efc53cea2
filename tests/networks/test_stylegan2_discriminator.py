import pytest
import torch
from torch import nn

from lit_generative.networks.minibatch_std import MinibatchStd
from lit_generative.networks.stylegan2_discriminator import StyleGAN2Discriminator

Y = torch.tensor([0, 1, 2])


def small(
    num_classes: int | None = None, image_size: int = 16, seed: int = 0, group_size: int | None = 4
) -> StyleGAN2Discriminator:
    torch.manual_seed(seed)
    return StyleGAN2Discriminator(image_size, channels=2, width=4, num_classes=num_classes, group_size=group_size)


@pytest.mark.parametrize("image_size", [8, 16, 64])
@pytest.mark.parametrize("num", [1, 3, 7])
def test_images_become_one_logit_each_whatever_the_batch_size(image_size, num):
    discriminator = small(image_size=image_size)
    assert discriminator.sample_shape == (2, image_size, image_size)
    assert discriminator(torch.randn(num, 2, image_size, image_size)).shape == (num,)


def test_widths_double_towards_4x4_up_to_512():
    with torch.device("meta"):
        discriminator = StyleGAN2Discriminator(1024, width=32)
    assert [block.conv2.weight.shape[0] for block in discriminator.blocks] == [64, 128, 256, 512, 512, 512, 512, 512]


@pytest.mark.parametrize("image_size", [4, 12])
def test_other_sizes_are_refused(image_size):
    with pytest.raises(ValueError, match=rf"StyleGAN2Discriminator: image_size .*got {image_size}"):
        StyleGAN2Discriminator(image_size)


def test_images_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"needs a batch of shape \(N, 2, 16, 16\), got \(3, 2, 8, 8\)"):
        small()(torch.randn(3, 2, 8, 8))


@pytest.mark.parametrize("num_classes", [None, 3])
def test_gradients_reach_every_parameter(num_classes):
    discriminator = small(num_classes)
    x, y = torch.randn(3, 2, 16, 16), None if num_classes is None else Y
    discriminator(x, y).square().sum().backward()
    for name, p in discriminator.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().sum() > 0, name


def test_labels_are_asked_for_if_and_only_if_there_are_classes():
    x = torch.randn(3, 2, 16, 16)
    with pytest.raises(ValueError, match="num_classes=3, so it needs labels"):
        small(num_classes=3)(x)
    with pytest.raises(ValueError, match=r"takes no labels, got y of shape \(3,\)"):
        small()(x, Y)


def test_the_label_enters_by_projection_on_rows_of_unit_mean_square():
    discriminator = small(num_classes=3).double()
    x = torch.randn(3, 2, 16, 16).double()
    features = discriminator.features(x)
    rows = discriminator.embedding.weight
    rows = rows / rows.norm(dim=1, keepdim=True)
    expected = discriminator.head(features)[:, 0] + torch.einsum("nd,nd->n", rows[Y], features)
    torch.testing.assert_close(discriminator(x, Y), expected)
    assert (discriminator(x, Y) != discriminator(x, Y.roll(1))).all()


def test_a_block_is_the_sum_of_both_branches_over_the_root_of_2():
    block = small().blocks[0].double()
    x = torch.randn(2, 4, 8, 12).double()

    def act(h: torch.Tensor) -> torch.Tensor:
        return nn.functional.leaky_relu(h, 0.2) * 2**0.5

    assert block.shortcut.bias is None
    torch.testing.assert_close(block(x), (act(block.conv2(act(block.conv1(x)))) + block.shortcut(x)) * 0.5**0.5)


@pytest.mark.parametrize("group_size", [4, None])
def test_minibatch_standard_deviation_alone_makes_a_verdict_depend_on_the_batch(group_size):
    discriminator = small(group_size=group_size).double()
    x = torch.randn(4, 2, 16, 16).double()
    alone, together = discriminator(x[:1]), discriminator(x)[:1]
    assert torch.allclose(alone, together) == (group_size is None)
    assert any(isinstance(m, MinibatchStd) for m in discriminator.modules()) == (group_size is not None)


@pytest.mark.parametrize("group_size", [4, None])
def test_the_gradient_penalty_can_be_differentiated_and_reaches_every_weight(group_size):
    discriminator = small(num_classes=3, group_size=group_size)
    x = torch.randn(3, 2, 16, 16, requires_grad=True)
    (gradient,) = torch.autograd.grad(discriminator(x, Y).sum(), x, create_graph=True)
    gradient.square().sum().backward()
    for name, p in discriminator.named_parameters():
        if name.endswith("weight"):
            assert p.grad is not None, name
            assert p.grad.abs().sum() > 0, name


def test_second_derivatives_are_those_of_finite_differences():
    torch.manual_seed(0)
    discriminator = StyleGAN2Discriminator(8, channels=1, width=2).double()
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda images: discriminator(images).square(), x, fast_mode=True)


def test_a_seed_gives_the_same_network_and_a_state_dict_the_same_logits():
    x = torch.randn(3, 2, 16, 16)
    first, second, other = small(num_classes=3), small(num_classes=3), small(num_classes=3, seed=1)
    assert torch.equal(first(x, Y), second(x, Y))
    other.load_state_dict(first.state_dict())
    assert torch.equal(first(x, Y), other(x, Y))


def test_bfloat16_autocast_gives_finite_logits():
    with torch.autocast("cpu", torch.bfloat16):
        assert small(num_classes=3)(torch.randn(3, 2, 16, 16), Y).isfinite().all()
