import re

import pytest
import torch
from torch import nn

from lit_generative.networks.checks import (
    check_counts,
    check_divisible,
    check_label,
    check_shape,
    pyramid_widths,
    with_label,
)
from lit_generative.networks.conv_vae import ConvDecoder, ConvEncoder
from lit_generative.networks.conv_vq import ConvFeatureDecoder, ConvFeatureEncoder
from lit_generative.networks.diffusers_unet import DiffusersUNet
from lit_generative.networks.dit import DiT
from lit_generative.networks.mlp import MLPDecoder, MLPDenoiser, MLPDiscriminator, MLPEncoder, MLPGenerator
from lit_generative.networks.resnet_vae import ResNetDecoder, ResNetEncoder

IMAGE = {"image_size": 8, "channels": 1}
COUNTED = [
    (DiffusersUNet, IMAGE, ("channels", "num_classes", "layers_per_block")),
    (DiT, IMAGE, ("channels", "num_classes", "width")),
    (ConvEncoder, {**IMAGE, "latent_dim": 2}, ("channels", "latent_dim", "width", "num_classes")),
    (
        ConvDecoder,
        {**IMAGE, "latent_dim": 2},
        ("channels", "latent_dim", "width", "num_classes", "parameters_per_value"),
    ),
    (ResNetEncoder, {**IMAGE, "latent_dim": 2}, ("channels", "latent_dim", "width", "num_classes")),
    (ResNetDecoder, {**IMAGE, "latent_dim": 2}, ("channels", "latent_dim", "width", "parameters_per_value")),
    (ConvFeatureEncoder, {**IMAGE, "dim": 2}, ("channels", "dim", "width")),
    (ConvFeatureDecoder, {**IMAGE, "dim": 2}, ("channels", "dim", "width", "parameters_per_value")),
    (MLPEncoder, {"sample_shape": (2,), "latent_dim": 2}, ("latent_dim", "hidden_dim", "num_classes")),
    (MLPDecoder, {"sample_shape": (2,), "latent_dim": 2}, ("latent_dim", "hidden_dim", "parameters_per_value")),
    (MLPGenerator, {}, ("latent_dim", "hidden_dim")),
    (MLPDiscriminator, {}, ("hidden_dim",)),
    (MLPDenoiser, {}, ("hidden_dim", "num_classes")),
]


@pytest.mark.parametrize(("cls", "arguments", "name"), [(c, a, name) for c, a, names in COUNTED for name in names])
def test_sizes_below_one_are_refused_by_name(cls, arguments, name):
    for value in (0, -1):
        with pytest.raises(ValueError, match=f"^{cls.__name__}: .*{name} .*at least .*{value}"):
            cls(**arguments | {name: value})


def test_no_count_passes():
    check_counts("Network", num_classes=None, channels=1)


@pytest.mark.parametrize(
    ("cls", "changes", "message"),
    [
        (DiffusersUNet, {"widths": (0, 8)}, "at least one of widths, all of them positive"),
        (DiffusersUNet, {"extra_channels": -1}, "extra_channels not negative"),
        (DiffusersUNet, {"dropout": 2.0}, r"dropout in \[0, 1\)"),
        (DiT, {"extra_channels": -1}, "extra_channels must not be negative"),
        (DiT, {"mlp_ratio": 0.0}, "mlp_ratio positive, got 0 and 0.0"),
    ],
)
def test_numbers_that_make_no_denoiser_are_refused(cls, changes, message):
    with pytest.raises(ValueError, match=f"{cls.__name__}: .*{message}"):
        cls(**IMAGE | changes)


@pytest.mark.parametrize("image_size", [4, 8, 28])
def test_multiples_pass(image_size):
    check_divisible("Network", image_size, 4, "patch_size")


@pytest.mark.parametrize(("image_size", "nearest"), [(-4, "4"), (0, "4"), (3, "4"), (6, "4 and 8"), (30, "28 and 32")])
def test_other_sizes_are_refused_and_the_nearest_named(image_size, nearest):
    message = f"Network: image_size must be a positive multiple of 4 (patch_size), got {image_size}. "
    with pytest.raises(ValueError, match=f"^{re.escape(message)}Nearest that fit: {nearest}\\.$"):
        check_divisible("Network", image_size, 4, "patch_size")


def test_a_label_passes_if_and_only_if_there_are_classes():
    y = torch.tensor([0, 1])
    check_label(nn.Identity(), None, None)
    check_label(nn.Identity(), 2, y)
    with pytest.raises(ValueError, match=r"Identity: built with num_classes=2, so it needs labels y of shape \(N,\)"):
        check_label(nn.Identity(), 2, None)
    with pytest.raises(ValueError, match=r"Identity: built without num_classes.*got y of shape \(2,\)"):
        check_label(nn.Identity(), None, y)


def test_widths_double_with_every_halving_up_to_the_most():
    assert pyramid_widths("Network", 64, 3, 20) == [3, 6, 12, 20, 20]


@pytest.mark.parametrize(("image_size", "nearest"), [(4, "8"), (7, "8"), (28, "16 and 32"), (33, "32 and 64")])
def test_sizes_that_do_not_halve_to_four_are_refused_and_the_nearest_named(image_size, nearest):
    with pytest.raises(ValueError, match=rf"Network: .*got {image_size}\. Nearest that fit: {nearest}\."):
        pyramid_widths("Network", image_size, 4, 8)


@pytest.mark.parametrize("width", [0, 9])
def test_a_width_out_of_range_is_refused(width):
    with pytest.raises(ValueError, match=rf"width must be at least 1 and at most 8, got {width}"):
        pyramid_widths("Network", 8, width, 8)


def test_a_wrong_shape_is_refused():
    network = nn.Linear(2, 3)
    check_shape(network, torch.randn(5, 2), (2,))
    with pytest.raises(ValueError, match=r"Linear: needs a batch of shape \(N, 2\), got \(2, 5\)"):
        check_shape(network, torch.randn(2, 5), (2,))


def test_a_class_is_joined_to_a_row_as_one_hot():
    rows, network = torch.tensor([[0.5, 2.0], [1.0, 3.0]]), nn.Identity()
    joined = with_label(network, rows, 3, torch.tensor([2, 0]))
    torch.testing.assert_close(joined, torch.tensor([[0.5, 2.0, 0, 0, 1], [1.0, 3.0, 1, 0, 0]]))
    assert with_label(network, rows, None, None) is rows
    with pytest.raises(ValueError, match="Identity: built with num_classes=3, so it needs labels"):
        with_label(network, rows, 3, None)
