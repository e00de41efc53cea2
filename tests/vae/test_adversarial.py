import pytest
import torch
from torch import nn

from lit_generative.networks.conv_kl import ConvMapEncoder
from lit_generative.networks.conv_vae import ConvDecoder, ConvEncoder
from lit_generative.networks.conv_vq import ConvFeatureDecoder, ConvFeatureEncoder
from lit_generative.networks.dcgan import DCGANDiscriminator
from lit_generative.vae.adversarial import (
    adaptive_weight,
    check_no_labels,
    common_latent_shape,
    discriminator_hinge,
    generator_hinge,
    last_weight,
)

IMAGES = {"image_size": 8, "channels": 1, "width": 4}


def test_the_hinge_is_taken_of_each_patch_before_the_mean():
    real, fake = torch.tensor([[3.0, 0.5], [1.0, -2.0]]), torch.tensor([[-1.0, 0.0], [2.0, -4.0]])
    torch.testing.assert_close(discriminator_hinge(real, fake), torch.tensor([0.25 + 0.5, 1.5 + 1.5]))
    torch.testing.assert_close(generator_hinge(fake), torch.tensor([0.5, 1.0]))


def test_the_adaptive_weight_is_the_ratio_of_the_norms():
    first, second = torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.tensor([[0.0, 0.5], [0.0, 0.0]])
    torch.testing.assert_close(adaptive_weight(first, second), torch.tensor(5 / 0.5001))
    # the two terms then pull equally hard
    torch.testing.assert_close((adaptive_weight(first, second) * second).norm(), first.norm(), rtol=1e-3, atol=0)


def test_the_adaptive_weight_is_clamped_and_has_no_graph():
    gradient = torch.ones(4, requires_grad=True) * 3
    torch.testing.assert_close(adaptive_weight(gradient, torch.zeros(4)), torch.tensor(1e4))
    torch.testing.assert_close(adaptive_weight(gradient / 100, torch.zeros(4)), torch.tensor(600.0))
    torch.testing.assert_close(adaptive_weight(torch.zeros(4), gradient), torch.tensor(0.0))
    assert not adaptive_weight(gradient, gradient).requires_grad


def test_the_last_weight_is_the_last_matrix_or_the_one_that_is_named():
    network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4), nn.LayerNorm(4))
    assert last_weight(network) is network[1].weight
    network.last_weight = network[0].weight
    assert last_weight(network) is network[0].weight


@pytest.mark.parametrize("decoder", [nn.ReLU(), nn.LayerNorm(3), nn.Linear(2, 3).requires_grad_(False)])
def test_a_decoder_without_a_trained_weight_is_refused(decoder):
    with pytest.raises(ValueError, match=f"{type(decoder).__name__} has none that is trained. Give it an attribute"):
        last_weight(decoder)


def test_the_latent_is_a_vector_or_a_map():
    vectors = ConvEncoder(latent_dim=3, **IMAGES), ConvDecoder(latent_dim=3, **IMAGES)
    maps = ConvMapEncoder(dim=3, num_stages=1, **IMAGES), ConvFeatureDecoder(dim=3, num_stages=1, **IMAGES)
    assert common_latent_shape(*vectors) == (3,)
    assert common_latent_shape(*maps) == (3, 4, 4)
    assert common_latent_shape(maps[0], nn.Conv2d(3, 1, 1)) == (3, 4, 4)  # a decoder need not say


@pytest.mark.parametrize(
    ("decoder", "shapes"),
    [
        (ConvDecoder(latent_dim=3, **IMAGES), r"\(3, 4, 4\) and \(3,\)"),
        (ConvFeatureDecoder(dim=2, num_stages=1, **IMAGES), r"\(3, 4, 4\) and \(2, 4, 4\)"),
        (ConvFeatureDecoder(dim=3, num_stages=2, **IMAGES), r"\(3, 4, 4\) and \(3, 2, 2\)"),
    ],
)
def test_latents_that_differ_are_refused(decoder, shapes):
    with pytest.raises(ValueError, match=f"must have latents of the same shape, got {shapes}"):
        common_latent_shape(ConvMapEncoder(dim=3, num_stages=1, **IMAGES), decoder)


def test_an_encoder_that_gives_one_map_is_refused():
    with pytest.raises(ValueError, match=r"ConvFeatureEncoder does not\. Use ConvMapEncoder, or ConvEncoder"):
        common_latent_shape(ConvFeatureEncoder(dim=3, **IMAGES), ConvFeatureDecoder(dim=3, **IMAGES))


def test_networks_that_want_labels_are_refused():
    check_no_labels({"discriminator": DCGANDiscriminator(**IMAGES)})
    with pytest.raises(ValueError, match="the judge must take no labels, got DCGANDiscriminator with num_classes=10"):
        check_no_labels({"judge": DCGANDiscriminator(**IMAGES, num_classes=10)})
