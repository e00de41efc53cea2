import pytest
import torch

from lit_generative.networks.conv_vae import ConvDecoder, ConvEncoder


def small_pair() -> tuple[ConvEncoder, ConvDecoder]:
    return ConvEncoder(12, channels=2, latent_dim=5, width=4), ConvDecoder(12, channels=2, latent_dim=5, width=4)


@pytest.mark.parametrize(("image_size", "num_stages"), [(6, 1), (12, 2), (28, 2), (32, 3)])
def test_images_become_mean_and_logvar_and_latents_become_parameters(image_size, num_stages):
    encoder = ConvEncoder(image_size, channels=2, latent_dim=5, width=4, num_stages=num_stages)
    decoder = ConvDecoder(image_size, channels=2, latent_dim=5, width=4, num_stages=num_stages)
    mean, logvar = encoder(torch.randn(3, 2, image_size, image_size))
    assert mean.shape == logvar.shape == (3, 5)
    assert decoder(mean).shape == (3, 2, image_size, image_size)
    assert encoder.sample_shape == decoder.sample_shape == (2, image_size, image_size)
    assert encoder.latent_dim == decoder.latent_dim == 5


def test_the_decoder_gives_as_many_parameters_a_value_as_asked():
    decoder = ConvDecoder(8, channels=3, latent_dim=5, width=4, parameters_per_value=2)
    assert decoder(torch.randn(2, 5)).shape == (2, 6, 8, 8)


@pytest.mark.parametrize("width", [12, 36])
def test_widths_that_are_no_power_of_two_work(width):
    mean, _ = ConvEncoder(8, channels=1, latent_dim=3, width=width)(torch.randn(2, 1, 8, 8))
    assert ConvDecoder(8, channels=1, latent_dim=3, width=width)(mean).shape == (2, 1, 8, 8)


@pytest.mark.parametrize("network", [ConvEncoder, ConvDecoder])
def test_sizes_that_cannot_be_halved_are_refused_and_the_nearest_named(network):
    with pytest.raises(ValueError, match=rf"{network.__name__}.*multiple of 8.*got 28\. Nearest that fit: 24 and 32\."):
        network(28, channels=1, latent_dim=3, num_stages=3)
    with pytest.raises(ValueError, match=r"Nearest that fit: 4\."):
        network(2, channels=1, latent_dim=3)
    with pytest.raises(ValueError, match=rf"{network.__name__}: num_stages must be at least 1, got 0"):
        network(28, channels=1, latent_dim=3, num_stages=0)


def test_gradients_reach_every_parameter():
    encoder, decoder = small_pair()
    mean, logvar = encoder(torch.randn(3, 2, 12, 12))
    (decoder(mean).square().sum() + logvar.square().sum()).backward()
    for network in (encoder, decoder):
        for name, p in network.named_parameters():
            assert p.grad is not None, name
            assert p.grad.abs().sum() > 0, name


def test_mean_and_logvar_are_different_functions():
    mean, logvar = small_pair()[0](torch.randn(3, 2, 12, 12))
    assert not torch.allclose(mean, logvar)


def test_an_example_does_not_depend_on_its_batch_even_in_training():
    encoder, decoder = (network.double() for network in small_pair())
    x, z = torch.randn(3, 2, 12, 12).double(), torch.randn(3, 5).double()
    for alone, together in zip(encoder(x[1:2]), encoder(x), strict=True):
        torch.testing.assert_close(alone, together[1:2])
    torch.testing.assert_close(decoder(z[1:2]), decoder(z)[1:2])


def test_a_state_dict_round_trip_keeps_the_output():
    x, z = torch.randn(3, 2, 12, 12), torch.randn(3, 5)
    (encoder, decoder), (encoder_2, decoder_2) = small_pair(), small_pair()
    encoder_2.load_state_dict(encoder.state_dict())
    decoder_2.load_state_dict(decoder.state_dict())
    assert torch.equal(encoder(x)[0], encoder_2(x)[0])
    assert torch.equal(decoder(z), decoder_2(z))


def test_bfloat16_autocast_gives_finite_output():
    encoder, decoder = small_pair()
    with torch.autocast("cpu", torch.bfloat16):
        mean, logvar = encoder(torch.randn(3, 2, 12, 12))
        parameters = decoder(mean)
    assert all(tensor.isfinite().all() for tensor in (mean, logvar, parameters))


def test_a_label_moves_posterior_and_image_and_every_class_has_its_own():
    encoder = ConvEncoder(8, channels=2, latent_dim=5, width=4, num_classes=3)
    decoder = ConvDecoder(8, channels=2, latent_dim=5, width=4, num_classes=3)
    x, z, y = torch.randn(1, 2, 8, 8).expand(3, -1, -1, -1), torch.randn(1, 5).expand(3, -1), torch.arange(3)
    for output in (encoder(x, y)[0], encoder(x, y)[1], decoder(z, y)):
        assert len(output.flatten(1).unique(dim=0)) == 3
    loss = sum(value.square().sum() for value in (*encoder(x, y), decoder(z, y)))
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for network in (encoder, decoder) for p in network.parameters())


def test_a_label_that_is_missing_or_not_wanted_is_refused():
    encoder, decoder = small_pair()
    for network, value in ((encoder, torch.zeros(1, 2, 12, 12)), (decoder, torch.zeros(1, 5))):
        with pytest.raises(ValueError, match=f"{type(network).__name__}: built without num_classes"):
            network(value, torch.tensor([0]))
    with pytest.raises(ValueError, match="ConvEncoder: built with num_classes=3, so it needs labels"):
        ConvEncoder(8, 1, latent_dim=2, width=4, num_classes=3)(torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match="ConvDecoder: built with num_classes=3, so it needs labels"):
        ConvDecoder(8, 1, latent_dim=2, width=4, num_classes=3)(torch.zeros(1, 2))
