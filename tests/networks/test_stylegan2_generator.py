import pytest
import torch
from torch import nn

from lit_generative.networks.stylegan2_generator import MappingNetwork, StyleGAN2Generator

Y = torch.tensor([0, 1, 2])


def small(num_classes: int | None = None, image_size: int = 16, seed: int = 0, **kwargs: float) -> StyleGAN2Generator:
    torch.manual_seed(seed)
    return StyleGAN2Generator(
        image_size,
        channels=2,
        latent_dim=5,
        style_dim=6,
        width=4,
        num_mapping_layers=2,
        num_classes=num_classes,
        **kwargs,
    )


def noisy(**kwargs: float) -> StyleGAN2Generator:
    """One whose noise has a strength."""
    generator = small(**kwargs)
    for conv in generator.convs:
        nn.init.ones_(conv.noise_strength)
    return generator


@pytest.mark.parametrize("image_size", [8, 16, 64])
def test_latents_become_images(image_size):
    generator = small(image_size=image_size)
    assert generator(torch.randn(3, 5)).shape == (3, 2, image_size, image_size) == (3, *generator.sample_shape)


def test_the_paper_s_network_for_1024_pixels_has_18_styles_and_at_most_512_channels():
    with torch.device("meta"):
        generator = StyleGAN2Generator(1024, width=32)
    assert generator.num_styles == 18
    assert len(generator.mapping.layers) == 8
    ups = [conv.conv.weight.shape[0] for conv in generator.convs][::2]
    assert ups == [512, 512, 512, 512, 512, 256, 128, 64, 32]
    assert [tuple(conv.noise.shape) for conv in generator.convs][-2:] == [(1024, 1024)] * 2


@pytest.mark.parametrize("image_size", [4, 12])
def test_other_sizes_are_refused(image_size):
    with pytest.raises(ValueError, match=rf"StyleGAN2Generator: image_size .*got {image_size}"):
        StyleGAN2Generator(image_size)


def test_a_fraction_of_mixed_images_out_of_range_and_no_mapping_layer_are_refused():
    with pytest.raises(ValueError, match=r"style_mixing must be in \[0, 1\], got 1.1"):
        small(style_mixing=1.1)
    with pytest.raises(ValueError, match="at least 1 layer, got 0"):
        MappingNetwork(4, 4, 0)


def test_latents_of_another_length_are_refused():
    with pytest.raises(ValueError, match=r"StyleGAN2Generator: needs a batch of shape \(N, 5\), got \(3, 4\)"):
        small()(torch.randn(3, 4))


@pytest.mark.parametrize("num_classes", [None, 3])
def test_gradients_reach_every_parameter(num_classes):
    generator = small(num_classes)
    generator(torch.randn(3, 5), None if num_classes is None else Y).square().sum().backward()
    for name, p in generator.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().sum() > 0, name


def test_labels_are_asked_for_if_and_only_if_there_are_classes():
    with pytest.raises(ValueError, match="num_classes=3, so it needs labels"):
        small(num_classes=3)(torch.randn(3, 5))
    with pytest.raises(ValueError, match=r"takes no labels, got y of shape \(3,\)"):
        small()(torch.randn(3, 5), Y)


def test_the_image_depends_on_the_label():
    images = small(num_classes=3).eval()(torch.randn(1, 5).expand(2, -1), torch.tensor([0, 2]))
    assert not torch.allclose(images[0], images[1])


@pytest.mark.parametrize("num_classes", [None, 3])
def test_in_evaluation_mode_an_image_depends_on_its_latent_and_label_alone(num_classes):
    generator = noisy(num_classes=num_classes, truncation=0.7).double().eval()
    nn.init.normal_(generator.w_avg)
    z, y = torch.randn(3, 5).double(), None if num_classes is None else Y
    torch.manual_seed(1)
    images = generator(z, y)
    torch.manual_seed(2)
    torch.testing.assert_close(generator(z[1:2], None if y is None else y[1:2]), images[1:2])


def test_in_training_mode_the_noise_is_fresh_and_differs_between_examples():
    generator = noisy(style_mixing=0.0)
    z = torch.randn(1, 5).expand(2, -1)
    first, second = generator(z), generator(z)
    assert not torch.allclose(first, second)
    assert not torch.allclose(first[0], first[1])


@pytest.mark.parametrize("index", range(5))
def test_every_noise_map_is_added_times_its_strength(index):
    generator, w = small().eval(), torch.randn(2, 6)
    conv = generator.convs[index]
    x = torch.randn(2, conv.conv.weight.shape[1], *(s // (2 if conv.conv.filter else 1) for s in conv.noise.shape))
    nn.init.constant_(conv.noise_strength, 0.5)
    nn.init.normal_(conv.bias)
    expected = conv.conv(x, w) + 0.5 * conv.noise + conv.bias[:, None, None]
    torch.testing.assert_close(conv(x, w), nn.functional.leaky_relu(expected, 0.2) * 2**0.5)


def test_the_image_is_the_sum_of_upsampled_colours():
    generator = small().double().eval()
    w = torch.randn(2, generator.num_styles, 6).double()
    x = generator.convs[0](generator.base.expand(2, -1, -1, -1), w[:, 0])
    colours = [generator.to_colours[0](x, w[:, 1])]
    for i, (first, second) in enumerate([(2, 3), (4, 5)], start=1):  # the first style is that of the colours before
        x = generator.convs[2 * i - 1](x, w[:, first - 1])
        x = generator.convs[2 * i](x, w[:, second - 1])
        colours.append(generator.to_colours[i](x, w[:, second]))
    up = generator.upsample
    torch.testing.assert_close(generator.synthesize(w), up(up(colours[0])) + up(colours[1]) + colours[2])


def test_colours_are_not_demodulated_so_that_a_style_may_make_them_brighter():
    generator = small()
    layer, x, w = generator.to_colours[0], torch.randn(2, 16, 4, 4), torch.randn(2, 6)
    before = layer(x, w)
    with torch.no_grad():
        for p in layer.conv.scale.parameters():
            p *= 3
    torch.testing.assert_close(layer(x, w), 3 * before)


def test_latents_are_normalized_so_that_their_length_does_not_matter():
    mapping, z = small(num_classes=3).mapping, torch.randn(3, 5)
    torch.testing.assert_close(mapping(z, Y), mapping(10 * z, Y))
    before = mapping(z, Y)
    with torch.no_grad():
        mapping.embedding.weight *= 10
    torch.testing.assert_close(mapping(z, Y), before)


def test_the_mean_style_is_followed_in_training_only():
    generator = small(style_mixing=0.0)
    z = torch.randn(7, 5)
    generator.eval()(z)
    assert not generator.w_avg.any()
    w = generator.mapping(z).mean(dim=0)
    generator.train()(z)
    torch.testing.assert_close(generator.w_avg, 0.002 * w)
    generator(z)
    torch.testing.assert_close(generator.w_avg, 0.998 * 0.002 * w + 0.002 * w)


def test_truncation_pulls_styles_to_the_mean_one_in_evaluation_only():
    generator = small(truncation=0.25).eval()
    nn.init.normal_(generator.w_avg)
    z = torch.randn(3, 5)
    w = generator.mapping(z)
    expected = (0.25 * w + 0.75 * generator.w_avg)[:, None].expand(-1, 6, -1)
    torch.testing.assert_close(generator.styles(z), expected)
    generator.truncation = 0.0
    images = generator(z)
    torch.testing.assert_close(images[0], images[1])
    generator.truncation = 1.0
    torch.testing.assert_close(generator.styles(z)[:, 3], w)
    training = small(truncation=0.0, style_mixing=0.0)
    torch.testing.assert_close(training.styles(z)[:, 0], training.mapping(z))


def test_style_mixing_goes_over_to_a_second_latent_at_a_random_layer():
    generator, z = small(style_mixing=1.0), torch.randn(200, 5)
    own = (generator.styles(z) == generator.mapping(z)[:, None]).all(dim=2)
    assert own[:, 0].all()
    assert not own[:, -1].any()
    assert (own[:, :-1] >= own[:, 1:]).all()  # never back to the first
    assert own.sum(dim=1).unique().tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(("fraction", "low", "high"), [(0.0, 0, 0), (0.75, 270, 330), (1.0, 400, 400)])
def test_the_fraction_of_mixed_images_is_as_asked(fraction, low, high):
    generator, z = small(style_mixing=fraction), torch.randn(400, 5)
    styles = generator.styles(z)
    assert low <= (styles[:, 0] != styles[:, -1]).any(dim=1).sum() <= high
    generator.eval()
    assert torch.equal(generator.styles(z)[:, 0], generator.styles(z)[:, -1])


def test_the_second_latent_of_a_mixed_image_has_the_same_label():
    generator = small(num_classes=3, style_mixing=1.0)
    seen = []
    generator.mapping.register_forward_hook(lambda module, inputs, output: seen.append(inputs))
    generator(torch.randn(3, 5), Y)
    assert len(seen) == 2
    assert not torch.equal(seen[0][0], seen[1][0])
    assert torch.equal(seen[0][1], seen[1][1])


def test_second_order_gradients_reach_the_weights():
    generator = small()
    z = torch.randn(2, 5)
    w = generator.styles(z)
    (gradient,) = torch.autograd.grad(generator.synthesize(w).sum(), w, create_graph=True)
    gradient.square().sum().backward()
    assert all(conv.conv.weight.grad.abs().sum() > 0 for conv in generator.convs)


def test_a_seed_gives_the_same_network_and_a_state_dict_the_same_images():
    z = torch.randn(3, 5)
    first, second, other = noisy(num_classes=3), noisy(num_classes=3), noisy(num_classes=3, seed=1)
    torch.manual_seed(0)
    expected = first(z, Y)
    torch.manual_seed(0)
    assert torch.equal(second(z, Y), expected)
    other.truncation = first.truncation = 0.5
    other.load_state_dict(first.state_dict())
    assert torch.equal(first.eval()(z, Y), other.eval()(z, Y))


def test_bfloat16_autocast_gives_finite_images_near_those_of_float32():
    generator, z = small(num_classes=3).eval(), torch.randn(3, 5)
    expected = generator(z, Y)
    with torch.autocast("cpu", torch.bfloat16):
        images = generator(z, Y)
    torch.testing.assert_close(images.float(), expected, rtol=0.1, atol=0.1)
    generator.train()(z, Y).sum().backward()
