import pytest
import torch
from torch import nn

from lit_generative.networks.patch_discriminator import PatchDiscriminator


def discriminator(**options) -> PatchDiscriminator:
    torch.manual_seed(0)
    return PatchDiscriminator(**({"image_size": 16, "channels": 2, "width": 3, "num_stages": 2} | options))


@pytest.mark.parametrize(
    ("image_size", "num_stages", "size"), [(8, 1, 2), (16, 2, 2), (28, 2, 5), (24, 3, 1), (256, 3, 30)]
)
def test_there_is_a_map_of_logits_for_each_image(image_size, num_stages, size):
    network = discriminator(image_size=image_size, num_stages=num_stages)
    assert network(torch.randn(3, 2, image_size, image_size)).shape == (3, size, size)
    assert (network.sample_shape, network.num_classes) == ((2, image_size, image_size), None)


def test_a_logit_of_three_stages_sees_70_pixels():
    network = discriminator(image_size=128, channels=1, num_stages=3, batch_norm=False)
    x = torch.randn(1, 1, 128, 128, requires_grad=True)
    network(x)[0, 7, 7].backward()
    rows = x.grad[0, 0].abs().sum(dim=1).nonzero()
    assert int(rows.max() - rows.min()) + 1 == 70


def test_the_layers_are_the_papers():
    kinds = [type(layer).__name__ for layer in discriminator().layers]
    hidden = ["Conv2d", "BatchNorm2d", "LeakyReLU"]
    assert kinds == ["Conv2d", "LeakyReLU", *hidden, *hidden, "Conv2d"]
    convolutions = [
        layer for layer in discriminator(num_stages=4, image_size=48).layers if isinstance(layer, nn.Conv2d)
    ]
    assert [layer.out_channels for layer in convolutions] == [3, 6, 12, 24, 24, 1]
    assert [layer.stride[0] for layer in convolutions] == [2, 2, 2, 2, 1, 1]
    assert convolutions[3].weight.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("batch_norm", [True, False])
def test_gradients_reach_every_parameter(batch_norm):
    network = discriminator(batch_norm=batch_norm)
    network(torch.randn(5, 2, 16, 16)).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_without_batch_norm_a_verdict_does_not_depend_on_the_batch():
    network, x = discriminator(batch_norm=False).double(), torch.randn(4, 2, 16, 16).double()
    torch.testing.assert_close(network(x[1:2]), network(x)[1:2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_stages": 0}, "PatchDiscriminator: num_stages must be at least 1, got 0"),
        ({"image_size": 11}, "image_size must be at least 12 for num_stages=2, got 11. Take fewer stages"),
    ],
)
def test_what_cannot_be_built_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        discriminator(**options)


def test_other_shapes_than_stated_are_refused():
    with pytest.raises(ValueError, match=r"PatchDiscriminator: needs a batch of shape \(N, 2, 16, 16\)"):
        discriminator()(torch.zeros(1, 2, 8, 8))
