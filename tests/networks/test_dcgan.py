import pytest
import torch
from torch import nn

from lit_generative.networks.dcgan import DCGANDiscriminator, DCGANGenerator


def small_pair(num_classes: int | None = None, image_size: int = 16) -> tuple[DCGANGenerator, DCGANDiscriminator]:
    generator = DCGANGenerator(image_size, channels=2, latent_dim=5, width=4, num_classes=num_classes)
    return generator, DCGANDiscriminator(image_size, channels=2, width=4, num_classes=num_classes)


@pytest.mark.parametrize("image_size", [8, 16, 32, 64])
def test_latents_become_images_in_range_and_images_become_one_logit_each(image_size):
    generator, discriminator = small_pair(image_size=image_size)
    nn.init.normal_(generator.layers[-2].weight)  # large enough to leave the range, were there no tanh
    images = generator(torch.randn(3, 5))
    assert images.shape == (3, 2, image_size, image_size) == (3, *generator.sample_shape)
    assert 0.9 < images.abs().max() <= 1
    assert discriminator(images).shape == (3,)
    assert discriminator.sample_shape == generator.sample_shape


def test_widths_double_towards_4x4_and_stop_at_8_times_the_narrowest():
    generator = DCGANGenerator(128, width=3)
    discriminator = DCGANDiscriminator(128, width=3)
    up = [m.in_channels for m in generator.layers if isinstance(m, nn.ConvTranspose2d)]
    down = [m.out_channels for m in discriminator.layers if isinstance(m, nn.Conv2d)]
    assert up == [128, 24, 24, 12, 6, 3]
    assert down == [3, 6, 12, 24, 24]


@pytest.mark.parametrize(("image_size", "nearest"), [(4, "8"), (7, "8"), (28, "16 and 32"), (33, "32 and 64")])
@pytest.mark.parametrize("network", [DCGANGenerator, DCGANDiscriminator])
def test_other_sizes_are_refused_and_the_nearest_named(network, image_size, nearest):
    with pytest.raises(ValueError, match=rf"{network.__name__}.*got {image_size}\. Nearest that fit: {nearest}\."):
        network(image_size)


@pytest.mark.parametrize("num_classes", [None, 3])
def test_gradients_reach_every_parameter(num_classes):
    generator, discriminator = small_pair(num_classes)
    y = None if num_classes is None else torch.tensor([0, 1, 2])
    discriminator(generator(torch.randn(3, 5), y), y).square().sum().backward()
    for network in (generator, discriminator):
        for name, p in network.named_parameters():
            assert p.grad is not None, name
            assert p.grad.abs().sum() > 0, name


def test_labels_are_asked_for_if_and_only_if_there_are_classes():
    z, x, y = torch.randn(3, 5), torch.randn(3, 2, 16, 16), torch.tensor([0, 1, 2])
    for network, data in zip(small_pair(num_classes=3), (z, x), strict=True):
        with pytest.raises(ValueError, match="num_classes=3, so it needs labels"):
            network(data)
    for network, data in zip(small_pair(), (z, x), strict=True):
        with pytest.raises(ValueError, match=r"takes no labels, got y of shape \(3,\)"):
            network(data, y)


def test_outputs_depend_on_the_label():
    generator, discriminator = (network.eval() for network in small_pair(num_classes=3))
    z, x = torch.randn(1, 5).expand(2, -1), torch.randn(1, 2, 16, 16).expand(2, -1, -1, -1)
    images, logits = generator(z, torch.tensor([0, 2])), discriminator(x, torch.tensor([0, 2]))
    assert not torch.equal(images[0], images[1])
    assert logits[0] != logits[1]


def test_the_label_enters_the_logit_by_projection_of_the_summed_features():
    discriminator = small_pair(num_classes=3)[1].double().eval()
    x, y = torch.randn(4, 2, 16, 16).double(), torch.tensor([2, 0, 0, 1])
    features = discriminator.layers(x)
    unconditional = torch.einsum("nchw,ochw->n", features, discriminator.head.weight) + discriminator.head.bias
    projection = torch.einsum("nc,nchw->n", discriminator.embedding.weight[y], features)
    torch.testing.assert_close(discriminator(x, y), unconditional + projection)


@pytest.mark.parametrize("num_classes", [None, 3])
def test_an_example_does_not_depend_on_its_batch_in_eval_mode(num_classes):
    generator, discriminator = (network.double().eval() for network in small_pair(num_classes))
    z, x = torch.randn(3, 5).double(), torch.randn(3, 2, 16, 16).double()
    y = None if num_classes is None else torch.tensor([0, 1, 2])
    y_1 = None if y is None else y[1:2]
    torch.testing.assert_close(generator(z[1:2], y_1), generator(z, y)[1:2])
    torch.testing.assert_close(discriminator(x[1:2], y_1), discriminator(x, y)[1:2])


def test_without_batch_norm_an_example_does_not_depend_on_its_batch_in_training_either():
    x = torch.randn(3, 2, 16, 16).double()
    with_norm = DCGANDiscriminator(16, channels=2, width=4).double()
    without = DCGANDiscriminator(16, channels=2, width=4, batch_norm=False).double()
    torch.testing.assert_close(without(x[1:2]), without(x)[1:2])
    assert not torch.allclose(with_norm(x[1:2]), with_norm(x)[1:2])


def test_weights_start_as_in_the_paper():
    torch.manual_seed(0)
    generator = DCGANGenerator(32, width=32)
    discriminator = DCGANDiscriminator(32, width=32)
    for network in (generator, discriminator):
        convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
        weights = torch.cat([m.weight.detach().flatten() for m in convolutions])
        torch.testing.assert_close(weights.std(), torch.tensor(0.02), rtol=0.02, atol=0)
        assert all(m.bias is None or not m.bias.any() for m in convolutions)
    embedding = DCGANDiscriminator(32, num_classes=10).embedding.weight.detach()
    torch.testing.assert_close(embedding.std(), torch.tensor(0.02), rtol=0.1, atol=0)


def test_only_convolutions_without_a_norm_after_them_have_a_bias():
    generator, discriminator = DCGANGenerator(32), DCGANDiscriminator(32)
    assert [m.bias is None for m in generator.layers if isinstance(m, nn.ConvTranspose2d)] == [True, True, True, False]
    assert [m.bias is None for m in discriminator.layers if isinstance(m, nn.Conv2d)] == [False, True, True]


def test_a_state_dict_round_trip_keeps_the_output():
    z, x, y = torch.randn(3, 5), torch.randn(3, 2, 16, 16), torch.tensor([0, 1, 2])
    for first, second, data in zip(small_pair(num_classes=3), small_pair(num_classes=3), (z, x), strict=True):
        first(data, y)  # moves the running statistics of batch norm
        second.load_state_dict(first.state_dict())
        assert torch.equal(first.eval()(data, y), second.eval()(data, y))


def test_bfloat16_autocast_gives_finite_output():
    generator, discriminator = small_pair(num_classes=3)
    y = torch.tensor([0, 1, 2])
    with torch.autocast("cpu", torch.bfloat16):
        images = generator(torch.randn(3, 5), y)
        logits = discriminator(images, y)
    assert images.isfinite().all()
    assert logits.isfinite().all()
