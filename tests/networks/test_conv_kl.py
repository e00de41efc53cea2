import pytest
import torch

from lit_generative.networks.conv_kl import ConvMapEncoder
from lit_generative.networks.conv_vq import ConvFeatureDecoder


def encoder(**options) -> ConvMapEncoder:
    torch.manual_seed(0)
    return ConvMapEncoder(**({"image_size": 12, "channels": 2, "dim": 3, "width": 4, "num_blocks": 1} | options))


@pytest.mark.parametrize(("num_stages", "grid_size"), [(1, 6), (2, 3)])
def test_images_become_maps_of_means_and_log_variances_that_the_decoder_takes(num_stages, grid_size):
    network = encoder(num_stages=num_stages)
    mean, logvar = network(torch.randn(5, 2, 12, 12))
    assert mean.shape == logvar.shape == (5, 3, grid_size, grid_size)
    assert network.latent_shape == (3, grid_size, grid_size)
    assert (network.sample_shape, network.num_classes) == ((2, 12, 12), None)
    decoder = ConvFeatureDecoder(12, channels=2, dim=3, width=4, num_stages=num_stages)
    assert decoder(mean).shape == (5, 2, 12, 12)


def test_the_means_are_the_first_half_of_the_maps_and_the_log_variances_the_second():
    network, x = encoder(), torch.randn(2, 2, 12, 12)
    maps = network.features(x)
    mean, logvar = network(x)
    torch.testing.assert_close(mean, maps[:, :3], rtol=0, atol=0)
    torch.testing.assert_close(logvar, maps[:, 3:], rtol=0, atol=0)


def test_gradients_reach_every_parameter():
    network = encoder()
    mean, logvar = network(torch.randn(6, 2, 12, 12))
    (mean.square() + logvar.exp()).sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, "ConvMapEncoder: dim must be at least 1, got 0"),
        ({"image_size": 10}, r"multiple of 4 \(2\*\*num_stages\), got 10\. Nearest that fit: 8 and 12"),
        ({"num_stages": 0}, "num_stages must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_built_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        encoder(**options)
