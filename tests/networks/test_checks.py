import re

import pytest
import torch
from torch import nn

from lit_generative.networks.checks import check_divisible, check_label, check_shape, pyramid_widths, with_label


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
