import pytest
import torch
from torch import nn

from lit_generative.networks.resnet_gan import ConditionalBatchNorm2d, ResNetDiscriminator, ResNetGenerator


def small_pair(
    num_classes: int | None = None, image_size: int = 32, normalization: str = "none"
) -> tuple[ResNetGenerator, ResNetDiscriminator]:
    torch.manual_seed(0)
    generator = ResNetGenerator(image_size, channels=2, latent_dim=5, width=3, num_classes=num_classes)
    discriminator = ResNetDiscriminator(
        image_size, channels=2, width=3, num_classes=num_classes, normalization=normalization
    )
    return generator, discriminator


def widths(network: nn.Module) -> list[int]:
    return [block.conv2.out_channels for block in network.blocks]


@pytest.mark.parametrize("image_size", [32, 48, 64, 128])
def test_latents_become_images_in_range_and_images_become_one_logit_each(image_size):
    generator, discriminator = small_pair(image_size=image_size)
    nn.init.normal_(generator.head.weight)  # large enough to leave the range, were there no tanh
    images = generator(torch.randn(3, 5))
    assert images.shape == (3, 2, image_size, image_size) == (3, *generator.sample_shape)
    assert 0.9 < images.abs().max() <= 1
    assert discriminator(images).shape == (3,)
    assert discriminator.sample_shape == generator.sample_shape


@pytest.mark.parametrize(
    ("image_size", "base", "up", "down", "last_size"),
    [
        (32, (256, 4, 4), [256, 256, 256], [128, 128, 128, 128], 8),
        (48, (512, 6, 6), [256, 128, 64], [64, 128, 256, 512, 512], 3),
        (64, (512, 4, 4), [512, 256, 128, 64], [64, 128, 256, 512, 512], 4),
        (128, (1024, 4, 4), [1024, 512, 256, 128, 64], [64, 128, 256, 512, 1024, 1024], 4),
    ],
)
def test_stages_are_those_of_the_papers_tables(image_size, base, up, down, last_size):
    with torch.device("meta"):
        generator, discriminator = ResNetGenerator(image_size), ResNetDiscriminator(image_size)
        assert generator.base_shape == base
        assert widths(generator) == up
        assert widths(discriminator) == down
        assert discriminator.blocks(torch.empty(1, 3, image_size, image_size)).shape == (
            1,
            down[-1],
            last_size,
            last_size,
        )


def test_parameters_at_32_pixels_are_as_many_as_the_tables_give():
    with torch.device("meta"):
        generator, discriminator = ResNetGenerator(32), ResNetDiscriminator(32)
    conv, shortcut = 256 * 256 * 9 + 256, 256 * 256 + 256
    block = 2 * conv + shortcut + 2 * 2 * 256
    expected = 128 * 4096 + 4096 + 3 * block + 2 * 256 + (256 * 3 * 9 + 3)
    assert sum(p.numel() for p in generator.parameters()) == expected
    conv = 128 * 128 * 9 + 128
    first = (3 * 128 * 9 + 128) + conv + (3 * 128 + 128)
    expected = first + (2 * conv + 128 * 128 + 128) + 2 * 2 * conv + 129
    assert sum(p.numel() for p in discriminator.parameters()) == expected


@pytest.mark.parametrize("image_size", [8, 31, 96, 256])
@pytest.mark.parametrize("network", [ResNetGenerator, ResNetDiscriminator])
def test_other_sizes_are_refused_and_those_that_fit_named(network, image_size):
    with pytest.raises(ValueError, match=rf"{network.__name__}.*one of 32, 48, 64, 128, got {image_size}\."):
        network(image_size)


def test_an_unknown_normalization_is_refused():
    with pytest.raises(ValueError, match="must be 'none' or 'layer', got 'batch'"):
        ResNetDiscriminator(32, width=3, normalization="batch")


def test_images_of_another_size_are_refused_though_the_sum_could_take_them():
    with pytest.raises(ValueError, match=r"images of shape \(2, 32, 32\), got \(2, 64, 64\)"):
        small_pair()[1](torch.randn(1, 2, 64, 64))


@pytest.mark.parametrize("normalization", ["none", "layer"])
@pytest.mark.parametrize("num_classes", [None, 3])
@pytest.mark.parametrize("image_size", [32, 48])
def test_gradients_reach_every_parameter(num_classes, normalization, image_size):
    generator, discriminator = small_pair(num_classes, image_size, normalization)
    y = None if num_classes is None else torch.tensor([0, 1, 2])
    discriminator(generator(torch.randn(3, 5), y), y).square().sum().backward()
    for network in (generator, discriminator):
        for name, p in network.named_parameters():
            assert p.grad is not None, name
            assert p.grad.abs().sum() > 0, name


def test_the_gradient_of_the_input_gradient_reaches_the_weights():
    for normalization in ("none", "layer"):
        discriminator = small_pair(3, normalization=normalization)[1]
        x = torch.randn(3, 2, 32, 32, requires_grad=True)
        (gradient,) = torch.autograd.grad(discriminator(x, torch.tensor([0, 1, 2])).sum(), x, create_graph=True)
        gradient.square().sum().backward()
        weights = [p for name, p in discriminator.named_parameters() if "conv" in name and name.endswith("weight")]
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in weights)


def test_labels_are_asked_for_if_and_only_if_there_are_classes():
    z, x, y = torch.randn(3, 5), torch.randn(3, 2, 32, 32), torch.tensor([0, 1, 2])
    for network, data in zip(small_pair(num_classes=3), (z, x), strict=True):
        with pytest.raises(ValueError, match="num_classes=3, so it needs labels"):
            network(data)
    for network, data in zip(small_pair(), (z, x), strict=True):
        with pytest.raises(ValueError, match=r"takes no labels, got y of shape \(3,\)"):
            network(data, y)


@pytest.mark.parametrize("table", ["scale", "shift"])
@pytest.mark.parametrize("block", [0, 1, 2])
@pytest.mark.parametrize("norm", [0, 1])
def test_every_norm_of_the_generators_blocks_knows_the_label(table, block, norm):
    generator = small_pair(num_classes=3)[0].eval()
    z, y = torch.randn(1, 5).expand(2, -1), torch.tensor([0, 2])
    before = generator(z, y)
    torch.testing.assert_close(before[0], before[1])  # the classes start equal
    nn.init.normal_(getattr(generator.blocks[block].norms[norm], table).weight)
    after = generator(z, y)
    assert not torch.allclose(after[0], after[1])


def test_conditional_batch_norm_is_batch_norm_with_the_scale_and_shift_of_the_class():
    torch.manual_seed(0)
    norm = ConditionalBatchNorm2d(4, num_classes=3).double()
    nn.init.normal_(norm.scale.weight)
    nn.init.normal_(norm.shift.weight)
    x, y = 3 * torch.randn(5, 4, 2, 3).double() + 1, torch.tensor([2, 0, 1, 1, 2])
    mean, variance = x.mean(dim=(0, 2, 3), keepdim=True), x.var(dim=(0, 2, 3), keepdim=True, unbiased=False)
    scale, shift = norm.scale.weight[y][:, :, None, None], norm.shift.weight[y][:, :, None, None]
    torch.testing.assert_close(norm(x, y), scale * (x - mean) / (variance + 1e-5).sqrt() + shift)


def test_the_label_enters_the_logit_by_projection_of_the_summed_features():
    discriminator = small_pair(num_classes=3)[1].double()
    x, y = torch.randn(4, 2, 32, 32).double(), torch.tensor([2, 0, 0, 1])
    features = discriminator.blocks(x).relu()
    unconditional = torch.einsum("nchw,oc->n", features, discriminator.head.weight) + discriminator.head.bias
    projection = torch.einsum("nc,nchw->n", discriminator.embedding.weight[y], features)
    torch.testing.assert_close(discriminator(x, y), unconditional + projection)
    assert discriminator(x[:1], y[:1]) != discriminator(x[:1], y[1:2])


def test_a_generator_block_is_the_papers_shortcut_after_upsampling_plus_two_convolutions():
    block = small_pair(image_size=48)[0].blocks[0].double().eval()
    x = torch.randn(2, 24, 3, 5).double()
    up = nn.Upsample(scale_factor=2)
    residual = block.conv2(block.norms[1](block.conv1(up(block.norms[0](x).relu()))).relu())
    torch.testing.assert_close(block(x, None), residual + block.shortcut(up(x)))


@pytest.mark.parametrize("index", [1, 2, 4])
def test_a_discriminator_block_is_the_papers_pooled_shortcut_plus_two_convolutions(index):
    block = small_pair(image_size=48, normalization="layer")[1].blocks[index].double()
    x = torch.randn(2, block.conv1.in_channels, 4, 6).double()
    pool = nn.AvgPool2d(2) if index < 4 else nn.Identity()  # the last block keeps the size
    h = block.conv1(nn.functional.layer_norm(x, x.shape[1:]).relu())
    residual = pool(block.conv2(nn.functional.layer_norm(h, h.shape[1:]).relu()))
    torch.testing.assert_close(block(x), residual + pool(block.shortcut(x)))


def test_the_first_block_has_no_activation_before_its_first_convolution():
    block = small_pair()[1].blocks[0].double()
    x, pool = torch.randn(2, 2, 4, 6).double(), nn.AvgPool2d(2)
    torch.testing.assert_close(block(x), pool(block.conv2(block.conv1(x).relu())) + block.shortcut(pool(x)))


@pytest.mark.parametrize("normalization", ["none", "layer"])
def test_an_example_does_not_depend_on_its_batch(normalization):
    generator, discriminator = (network.double() for network in small_pair(3, normalization=normalization))
    z, x, y = torch.randn(3, 5).double(), torch.randn(3, 2, 32, 32).double(), torch.tensor([0, 1, 2])
    generator.eval()
    torch.testing.assert_close(generator(z[1:2], y[1:2]), generator(z, y)[1:2])
    torch.testing.assert_close(discriminator(x[1:2], y[1:2]), discriminator(x, y)[1:2])


def test_layer_norm_is_off_unless_asked_for():
    counts = [
        sum(isinstance(m, nn.GroupNorm) for m in small_pair(normalization=choice)[1].modules())
        for choice in ("none", "layer")
    ]
    assert counts == [0, 6]


def test_weights_start_uniform_with_the_gains_of_their_places():
    torch.manual_seed(0)
    block = ResNetGenerator(32, width=64).blocks[0]
    bound = (2 * 6 / (2 * 9 * 64)) ** 0.5
    torch.testing.assert_close(block.conv1.weight.abs().max().detach(), torch.tensor(bound), rtol=1e-3, atol=0)
    bound = (6 / (2 * 64)) ** 0.5
    torch.testing.assert_close(block.shortcut.weight.abs().max().detach(), torch.tensor(bound), rtol=1e-3, atol=0)
    assert not block.conv1.bias.any()


def test_a_seed_gives_the_same_network_and_a_state_dict_the_same_output():
    z, x, y = torch.randn(3, 5), torch.randn(3, 2, 32, 32), torch.tensor([0, 1, 2])
    for first, second, data in zip(small_pair(num_classes=3), small_pair(num_classes=3), (z, x), strict=True):
        assert torch.equal(first(data, y), second(data, y))
        for p in first.parameters():
            nn.init.normal_(p, std=0.1)
        second.load_state_dict(first.state_dict())
        assert torch.equal(first.eval()(data, y), second.eval()(data, y))


def test_bfloat16_autocast_gives_finite_output():
    generator, discriminator = small_pair(num_classes=3, normalization="layer")
    y = torch.tensor([0, 1, 2])
    with torch.autocast("cpu", torch.bfloat16):
        images = generator(torch.randn(3, 5), y)
        logits = discriminator(images, y)
    assert images.isfinite().all()
    assert logits.isfinite().all()
