import pytest
import torch
import torch.nn.functional as F

from lit_generative.networks.resnet_vae import ResNetDecoder, ResNetEncoder

NETWORKS = (ResNetEncoder, ResNetDecoder)


def pair(**options) -> tuple[ResNetEncoder, ResNetDecoder]:
    torch.manual_seed(0)
    arguments = {"image_size": 12, "channels": 2, "latent_dim": 5, "width": 4} | options
    return ResNetEncoder(**arguments), ResNetDecoder(**arguments)


def sizes(**options) -> list[int]:
    return [sum(p.numel() for p in network.parameters()) for network in pair(**options)]


@pytest.mark.parametrize(("image_size", "num_stages"), [(2, 1), (6, 1), (12, 2), (28, 2), (24, 3)])
def test_images_become_mean_and_logvar_and_latents_become_parameters(image_size, num_stages):
    encoder, decoder = pair(image_size=image_size, num_stages=num_stages)
    mean, logvar = encoder(torch.randn(3, 2, image_size, image_size))
    assert mean.shape == logvar.shape == (3, 5)
    assert decoder(mean).shape == (3, 2, image_size, image_size)
    assert encoder.sample_shape == decoder.sample_shape == (2, image_size, image_size)
    assert encoder.latent_dim == decoder.latent_dim == 5
    assert encoder.num_classes is decoder.num_classes is None


def test_the_decoder_gives_as_many_parameters_a_value_as_asked():
    decoder = ResNetDecoder(8, channels=3, latent_dim=5, width=4, parameters_per_value=2)
    assert decoder(torch.randn(2, 5)).shape == (2, 6, 8, 8)


@pytest.mark.parametrize("num_blocks", [1, 3])
def test_each_stage_has_as_many_blocks_as_asked(num_blocks):
    block = sum(2 * (9 * width**2 + width + 2 * width) for width in (4, 8))
    differences = [a - b for a, b in zip(sizes(num_blocks=num_blocks), sizes(num_blocks=2), strict=True)]
    assert differences == [(num_blocks - 2) * block] * 2


def test_weights_are_as_many_as_the_layers_add_up_to_at_three_stages_of_doubling_width():
    blocks = sum(2 * (9 * width**2 + width + 2 * width) for width in (4, 8, 16))
    resize = (4 * 8 + 8 * 16 + 16 * 16) * 16 + 8 + 16 + 16
    encoder = (2 * 4 * 9 + 4) + blocks + resize + 2 * 16 + (16 * 9 * 10 + 10)
    resize = (16 * 8 + 8 * 4 + 4 * 4) * 16 + 8 + 4 + 4
    decoder = (5 * 16 * 9 + 16 * 9) + blocks + resize + 2 * 4 + (4 * 2 * 9 + 2)
    assert sizes(image_size=24, num_stages=3, num_blocks=1) == [encoder, decoder]


def test_a_block_is_norm_silu_and_convolution_twice_added_to_its_input():
    block = pair()[0].layers[1].double()
    weights = [p for p in block.parameters() if p.requires_grad]
    for p in weights:
        torch.nn.init.normal_(p)
    scale1, shift1, kernel1, bias1, scale2, shift2, kernel2, bias2 = weights
    x = torch.randn(3, 4, 5, 6).double()
    h = F.conv2d(
        F.silu(F.layer_norm(x, x.shape[1:]) * scale1[:, None, None] + shift1[:, None, None]), kernel1, bias1, 1, 1
    )
    h = F.conv2d(
        F.silu(F.layer_norm(h, h.shape[1:]) * scale2[:, None, None] + shift2[:, None, None]), kernel2, bias2, 1, 1
    )
    torch.testing.assert_close(block(x), x + h)


@pytest.mark.parametrize(("width", "groups"), [(4, 1), (8, 1), (12, 1), (16, 2), (28, 1), (36, 4), (48, 6)])
def test_a_norm_has_groups_of_eight_channels_or_more_whatever_the_width(width, groups):
    for network in pair(width=width, num_stages=1):
        assert {m.num_groups for m in network.modules() if isinstance(m, torch.nn.GroupNorm)} == {groups}


@pytest.mark.parametrize("network", NETWORKS)
def test_settings_that_cannot_be_are_refused_and_the_nearest_sizes_named(network):
    name = network.__name__
    with pytest.raises(ValueError, match=rf"{name}.*multiple of 8.*got 28\. Nearest that fit: 24 and 32\."):
        network(28, channels=1, latent_dim=3, num_stages=3)
    with pytest.raises(ValueError, match=r"Nearest that fit: 4\."):
        network(2, channels=1, latent_dim=3)
    with pytest.raises(ValueError, match=f"{name}: num_stages must be at least 1, got 0"):
        network(28, channels=1, latent_dim=3, num_stages=0)
    with pytest.raises(ValueError, match=f"{name}: num_blocks must be at least 1, got 0"):
        network(28, channels=1, latent_dim=3, num_blocks=0)


def test_other_shapes_than_stated_are_refused():
    encoder, decoder = pair()
    with pytest.raises(ValueError, match=r"ResNetEncoder: needs a batch of shape \(N, 2, 12, 12\)"):
        encoder(torch.zeros(1, 2, 16, 16))
    with pytest.raises(ValueError, match=r"ResNetDecoder: needs a batch of shape \(N, 5\), got \(1, 6\)"):
        decoder(torch.zeros(1, 6))


@pytest.mark.parametrize("num_classes", [None, 3])
def test_gradients_reach_every_parameter(num_classes):
    encoder, decoder = pair(num_classes=num_classes)
    labels = () if num_classes is None else (torch.tensor([0, 1, 2]),)
    mean, logvar = encoder(torch.randn(3, 2, 12, 12), *labels)
    (decoder(mean, *labels).square().sum() + logvar.square().sum()).backward()
    for network in (encoder, decoder):
        for name, p in network.named_parameters():
            assert p.grad is not None, name
            assert p.grad.abs().sum() > 0, name


def test_mean_and_logvar_are_different_functions():
    mean, logvar = pair()[0](torch.randn(3, 2, 12, 12))
    assert not torch.allclose(mean, logvar)


def test_an_example_does_not_depend_on_its_batch_even_in_training():
    encoder, decoder = (network.double() for network in pair())
    x, z = torch.randn(3, 2, 12, 12).double(), torch.randn(3, 5).double()
    for alone, together in zip(encoder(x[1:2]), encoder(x), strict=True):
        torch.testing.assert_close(alone, together[1:2])
    torch.testing.assert_close(decoder(z[1:2]), decoder(z)[1:2])


def test_bfloat16_autocast_gives_finite_output():
    encoder, decoder = pair()
    with torch.autocast("cpu", torch.bfloat16):
        mean, logvar = encoder(torch.randn(3, 2, 12, 12))
        parameters = decoder(mean)
    assert all(tensor.isfinite().all() for tensor in (mean, logvar, parameters))


def test_a_label_moves_posterior_and_image_and_every_class_has_its_own():
    encoder, decoder = pair(image_size=8, num_classes=3)
    x, z, y = torch.randn(1, 2, 8, 8).expand(3, -1, -1, -1), torch.randn(1, 5).expand(3, -1), torch.arange(3)
    for output in (encoder(x, y)[0], encoder(x, y)[1], decoder(z, y)):
        assert len(output.flatten(1).unique(dim=0)) == 3
    assert encoder.num_classes == decoder.num_classes == 3


def test_a_label_that_is_missing_or_not_wanted_is_refused():
    for network, value in zip(pair(), (torch.zeros(1, 2, 12, 12), torch.zeros(1, 5)), strict=True):
        with pytest.raises(ValueError, match=f"{type(network).__name__}: built without num_classes"):
            network(value, torch.tensor([0]))
    for network, value in zip(pair(num_classes=3), (torch.zeros(1, 2, 12, 12), torch.zeros(1, 5)), strict=True):
        with pytest.raises(ValueError, match=f"{type(network).__name__}: built with num_classes=3, so it needs labels"):
            network(value)


def test_the_pair_says_how_it_was_built():
    for network in pair(num_classes=3):
        again = type(network)(**network._recipe["init_args"])
        again.load_state_dict(network.state_dict())
        value, y = torch.randn(2, *((5,) if isinstance(network, ResNetDecoder) else (2, 12, 12))), torch.tensor([0, 2])
        torch.testing.assert_close(network(value, y), again(value, y), rtol=0, atol=0)
