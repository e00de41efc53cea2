import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lit_generative.networks.r3gan import R3GANDiscriminator, R3GANGenerator

Pair = tuple[R3GANGenerator, R3GANDiscriminator]
Y = torch.tensor([0, 1, 2])


def small_pair(num_classes: int | None = None, image_size: int = 16, num_blocks: int = 2, seed: int = 0) -> Pair:
    torch.manual_seed(seed)
    sizes = {"width": 4, "max_width": 8, "num_blocks": num_blocks, "group_width": 4, "num_classes": num_classes}
    generator = R3GANGenerator(image_size, channels=2, latent_dim=5, **sizes)
    return generator, R3GANDiscriminator(image_size, channels=2, **sizes)


def moved_pair(num_classes: int | None = None) -> Pair:
    """A pair whose residual branches are no longer zero."""
    pair = small_pair(num_classes)
    for block in blocks(pair[0]) + blocks(pair[1]):
        nn.init.normal_(block.conv3.weight, std=0.3)
        nn.init.normal_(block.conv2.bias)
    return pair


def blocks(network: nn.Module) -> list[nn.Module]:
    return [m for m in network.layers if hasattr(m, "conv3")]


def transitions(network: nn.Module) -> list[nn.Module]:
    return [m for m in network.layers if not hasattr(m, "conv3")]


@pytest.mark.parametrize("image_size", [8, 16, 64])
def test_latents_become_images_and_images_become_one_logit_each(image_size):
    generator, discriminator = small_pair(image_size=image_size)
    images = generator(torch.randn(3, 5))
    assert images.shape == (3, 2, image_size, image_size) == (3, *generator.sample_shape)
    assert discriminator(images).shape == (3,)
    assert discriminator.sample_shape == generator.sample_shape


def test_at_256_pixels_widths_blocks_and_groups_are_those_of_the_paper():
    with torch.device("meta"):
        pair = R3GANGenerator(256), R3GANDiscriminator(256)
    widths = [[block.conv1.in_channels for block in blocks(network)] for network in pair]
    assert widths[0] == [w for w in (768, 768, 768, 768, 384, 192, 96) for _ in range(2)]
    assert widths[1] == widths[0][::-1]
    first = blocks(pair[0])[0]
    assert (first.conv1.out_channels, first.conv2.groups) == (1536, 96)
    assert [isinstance(t.conv, nn.Identity) for t in transitions(pair[0])] == [True] * 3 + [False] * 3


@pytest.mark.parametrize("num_blocks", [1, 3])
def test_every_size_has_the_number_of_blocks_asked_for(num_blocks):
    for network in small_pair(num_blocks=num_blocks):
        assert len(blocks(network)) == 3 * num_blocks
        assert len(transitions(network)) == 2


@pytest.mark.parametrize("network", [R3GANGenerator, R3GANDiscriminator])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 12}, "image_size must be 4 times a power of two, at least 8, got 12"),
        ({"image_size": 8, "width": 800}, "width must be at least 1 and at most 768, got 800"),
        ({"image_size": 8, "num_blocks": 0}, "must be at least 1, got num_blocks=0"),
        ({"image_size": 8, "group_width": 0}, "num_blocks=2 and group_width=0"),
        ({"image_size": 8, "width": 12}, "group_width=16 must divide .* got 12 channels"),
        ({"image_size": 8, "width": 16, "max_width": 20}, "group_width=16 must divide .* got 20 channels"),
    ],
)
def test_what_does_not_fit_is_refused(network, arguments, message):
    with pytest.raises(ValueError, match=rf"{network.__name__}: .*{message}"):
        network(**arguments)


def test_inputs_of_another_shape_are_refused():
    generator, discriminator = small_pair()
    with pytest.raises(ValueError, match=r"R3GANGenerator: needs a batch of shape \(N, 5\), got \(3, 4\)"):
        generator(torch.randn(3, 4))
    with pytest.raises(ValueError, match=r"needs a batch of shape \(N, 2, 16, 16\), got \(3, 2, 32, 32\)"):
        discriminator(torch.randn(3, 2, 32, 32))


@pytest.mark.parametrize("num_classes", [None, 3])
def test_gradients_reach_every_parameter_once_the_branches_are_not_zero(num_classes):
    generator, discriminator = moved_pair(num_classes)
    y = None if num_classes is None else Y
    discriminator(generator(torch.randn(3, 5), y), y).square().sum().backward()
    for network in (generator, discriminator):
        for name, p in network.named_parameters():
            assert p.grad is not None, name
            assert p.grad.abs().sum() > 0, name


def test_at_the_start_gradients_reach_the_zero_convolutions_and_all_outside_the_blocks():
    generator, discriminator = small_pair(num_classes=3)
    discriminator(generator(torch.randn(3, 5), Y), Y).square().sum().backward()
    for network in (generator, discriminator):
        for name, p in network.named_parameters():
            assert (p.grad.abs().sum() > 0) == ("conv1" not in name and "conv2" not in name), name


def test_labels_are_asked_for_if_and_only_if_there_are_classes():
    z, x = torch.randn(3, 5), torch.randn(3, 2, 16, 16)
    for network, data in zip(small_pair(num_classes=3), (z, x), strict=True):
        with pytest.raises(ValueError, match="num_classes=3, so it needs labels"):
            network(data)
    for network, data in zip(small_pair(), (z, x), strict=True):
        with pytest.raises(ValueError, match=r"takes no labels, got y of shape \(3,\)"):
            network(data, Y)


def test_outputs_depend_on_the_label():
    generator, discriminator = small_pair(num_classes=3)
    z, x = torch.randn(1, 5).expand(2, -1), torch.randn(1, 2, 16, 16).expand(2, -1, -1, -1)
    images, logits = generator(z, Y[1:]), discriminator(x, Y[1:])
    assert not torch.allclose(images[0], images[1])
    assert logits[0] != logits[1]


def test_the_label_enters_the_logit_by_projection():
    discriminator = moved_pair(num_classes=3)[1].double()
    x = torch.randn(3, 2, 16, 16).double()
    features = discriminator.features(x)
    expected = features @ discriminator.head.weight[0] + discriminator.head.bias
    expected = expected + (features * discriminator.embedding.weight[Y]).sum(dim=1)
    torch.testing.assert_close(discriminator(x, Y), expected)


def test_a_block_adds_three_convolutions_with_two_activations():
    block = blocks(moved_pair()[0])[0].double()
    x = torch.randn(2, 8, 3, 5).double()
    h = F.leaky_relu(F.conv2d(x, block.conv1.weight, block.conv1.bias), 0.2)
    h = F.leaky_relu(F.conv2d(h, block.conv2.weight, block.conv2.bias, padding=1, groups=4), 0.2)
    torch.testing.assert_close(block(x), x + F.conv2d(h, block.conv3.weight))


def test_a_block_is_the_identity_at_the_start():
    for network in small_pair():
        x = torch.randn(2, blocks(network)[0].conv1.in_channels, 4, 4)
        assert torch.equal(blocks(network)[0](x), x)


@pytest.mark.parametrize("num_blocks", [1, 4])
def test_weights_start_smaller_the_more_blocks_there_are(num_blocks):
    torch.manual_seed(0)
    generator = R3GANGenerator(8, width=64, num_blocks=num_blocks)
    discriminator = R3GANDiscriminator(8, width=64, num_blocks=num_blocks)
    gain = (2 / (1 + 0.2**2)) ** 0.5 * (2 * num_blocks) ** -0.25  # 2 sizes
    for block in (blocks(generator)[-1], blocks(discriminator)[0]):
        torch.testing.assert_close(block.conv1.weight.std().item(), gain / 64**0.5, rtol=0.03, atol=0)
        torch.testing.assert_close(block.conv2.weight.std().item(), gain / (16 * 9) ** 0.5, rtol=0.03, atol=0)
        assert not block.conv1.bias.any()
    transition = transitions(generator)[0].conv.weight
    torch.testing.assert_close(transition.std().item(), 1 / 128**0.5, rtol=0.03, atol=0)


def test_the_generator_starts_from_a_basis_scaled_by_the_latent_and_ends_without_activation():
    generator = small_pair(num_classes=3)[0].double()
    z = torch.randn(3, 5).double()
    scale = generator.scale(torch.cat([z, generator.embedding.weight[Y]], dim=1))
    x = torch.einsum("nc,chw->nchw", scale, generator.basis)
    torch.testing.assert_close(generator(z, Y), generator.head(generator.layers(x)))


def test_upsampling_is_bilinear_after_the_change_of_width():
    transition = transitions(small_pair()[0])[1].double()
    x = torch.randn(2, 8, 3, 5).double()
    expected = transition.conv(F.interpolate(x, size=(6, 10), mode="bilinear"))
    torch.testing.assert_close(transition(x), expected)


def test_downsampling_is_the_mean_of_2x2_pixels():
    transition = transitions(small_pair()[1])[0].double()
    x = torch.randn(2, 4, 6, 10).double()
    torch.testing.assert_close(transition(x), F.avg_pool2d(transition.conv(x), 2))


def test_the_last_map_is_read_by_one_filter_a_channel():
    discriminator = small_pair()[1].double()
    x = torch.randn(3, 2, 16, 16).double()
    last = discriminator.layers(discriminator.from_colours(x))
    expected = torch.einsum("nchw,chw->nc", last, discriminator.pool.weight[:, 0])
    torch.testing.assert_close(discriminator.features(x), expected)


def test_an_example_does_not_depend_on_its_batch_or_the_mode():
    z, x = torch.randn(3, 5).double(), torch.randn(3, 2, 16, 16).double()
    for network, data in zip(moved_pair(num_classes=3), (z, x), strict=True):
        together = network.double().train()(data, Y)
        torch.testing.assert_close(network.eval()(data[1:2], Y[1:2]), together[1:2])


def test_second_derivatives_are_those_of_finite_differences():
    discriminator = moved_pair(num_classes=3)[1].double()
    x = torch.randn(3, 2, 16, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda images: discriminator(images, Y).square(), x, fast_mode=True)


def test_the_gradient_penalty_reaches_every_weight():
    discriminator = moved_pair(num_classes=3)[1]
    x = torch.randn(3, 2, 16, 16, requires_grad=True)
    (gradient,) = torch.autograd.grad(discriminator(x, Y).sum(), x, create_graph=True)
    gradient.square().sum().backward()
    for name, p in discriminator.named_parameters():
        if name.endswith("weight"):
            assert p.grad is not None, name
            assert p.grad.abs().sum() > 0, name


def test_a_seed_gives_the_same_network_and_a_state_dict_the_same_output():
    z, x = torch.randn(3, 5), torch.randn(3, 2, 16, 16)
    trios = zip(moved_pair(3), moved_pair(3), small_pair(3, seed=1), (z, x), strict=True)
    for first, second, other, data in trios:
        assert torch.equal(first(data, Y), second(data, Y))
        other.load_state_dict(first.state_dict())
        assert torch.equal(first(data, Y), other(data, Y))


def test_bfloat16_autocast_gives_finite_output():
    generator, discriminator = moved_pair(num_classes=3)
    with torch.autocast("cpu", torch.bfloat16):
        images = generator(torch.randn(3, 5), Y)
        logits = discriminator(images, Y)
    assert images.isfinite().all()
    assert logits.isfinite().all()
