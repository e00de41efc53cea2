import pytest
import torch

from lit_generative.networks.conv_vq import ConvFeatureDecoder, ConvFeatureEncoder

NETWORKS = (ConvFeatureEncoder, ConvFeatureDecoder)


def pair(**options) -> tuple[ConvFeatureEncoder, ConvFeatureDecoder]:
    torch.manual_seed(0)
    arguments = {"image_size": 12, "channels": 2, "dim": 3, "width": 4} | options
    return ConvFeatureEncoder(**arguments), ConvFeatureDecoder(**arguments)


@pytest.mark.parametrize(("image_size", "num_stages", "grid_size"), [(6, 1, 3), (12, 2, 3), (28, 2, 7), (32, 3, 4)])
def test_images_become_maps_and_maps_become_parameters(image_size, num_stages, grid_size):
    encoder, decoder = pair(image_size=image_size, num_stages=num_stages)
    z = encoder(torch.randn(5, 2, image_size, image_size))
    assert z.shape == (5, 3, grid_size, grid_size)
    assert decoder(z).shape == (5, 2, image_size, image_size)
    for network in (encoder, decoder):
        assert (network.dim, network.grid_size, network.num_classes) == (3, grid_size, None)
        assert network.sample_shape == (2, image_size, image_size)


def test_the_decoder_gives_as_many_parameters_a_value_as_asked():
    decoder = ConvFeatureDecoder(8, channels=3, dim=5, width=4, parameters_per_value=2)
    assert decoder(torch.randn(2, 5, 2, 2)).shape == (2, 6, 8, 8)


@pytest.mark.parametrize("num_blocks", [0, 3])
def test_there_are_as_many_residual_blocks_as_asked(num_blocks):
    sizes = [[sum(p.numel() for p in network.parameters()) for network in pair(num_blocks=n)] for n in (num_blocks, 1)]
    block = 4 * 4 * 9 + 4 + 4 * 4 + 4
    assert [a - b for a, b in zip(*sizes, strict=True)] == [(num_blocks - 1) * block] * 2


@pytest.mark.parametrize("network", NETWORKS)
def test_sizes_that_cannot_be_halved_are_refused_and_the_nearest_named(network):
    name = network.__name__
    with pytest.raises(ValueError, match=rf"{name}.*multiple of 8.*got 28\. Nearest that fit: 24 and 32\."):
        network(28, channels=1, dim=3, num_stages=3)
    with pytest.raises(ValueError, match=f"{name}: num_stages must be at least 1, got 0"):
        network(28, channels=1, dim=3, num_stages=0)
    with pytest.raises(ValueError, match=f"{name}: num_blocks must not be negative, got -1"):
        network(28, channels=1, dim=3, num_blocks=-1)


def test_other_shapes_than_stated_are_refused():
    encoder, decoder = pair()
    with pytest.raises(ValueError, match=r"ConvFeatureEncoder: needs a batch of shape \(N, 2, 12, 12\)"):
        encoder(torch.zeros(1, 2, 16, 16))
    with pytest.raises(ValueError, match=r"ConvFeatureDecoder: needs a batch of shape \(N, 3, 3, 3\)"):
        decoder(torch.zeros(1, 3, 4, 4))


def test_gradients_reach_every_parameter():
    encoder, decoder = pair()
    decoder(encoder(torch.randn(6, 2, 12, 12))).square().sum().backward()
    for network in (encoder, decoder):
        for name, p in network.named_parameters():
            assert p.grad is not None, name
            assert p.grad.abs().sum() > 0, name


def test_an_example_does_not_depend_on_its_batch_even_in_training():
    encoder, decoder = (network.double() for network in pair())
    x, z = torch.randn(3, 2, 12, 12).double(), torch.randn(3, 3, 3, 3).double()
    torch.testing.assert_close(encoder(x[1:2]), encoder(x)[1:2])
    torch.testing.assert_close(decoder(z[1:2]), decoder(z)[1:2])


def test_bfloat16_autocast_gives_finite_output():
    encoder, decoder = pair()
    with torch.autocast("cpu", torch.bfloat16):
        assert decoder(encoder(torch.randn(3, 2, 12, 12))).isfinite().all()
