import importlib.util
import sys

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import nn

from lit_generative.networks import diffusers_unet
from lit_generative.networks.diffusers_unet import DiffusersUNet

# diffusers' AttnProcessor takes the softmax in float32 whatever the dtype, so float64 agrees only so far.
FLOAT32_SOFTMAX = {"rtol": 1e-4, "atol": 1e-4}


def small_unet(num_classes: int | None = None, patch_size: int = 1, **settings) -> DiffusersUNet:
    """A network whose last convolution is not zero, as after some training."""
    network = DiffusersUNet(8, 2, num_classes, widths=(8, 16), layers_per_block=1, patch_size=patch_size, **settings)
    nn.init.normal_(network.unet.conv_out.weight)
    return network


def attentions(network: DiffusersUNet) -> dict[str, Attention]:
    return {name: m for name, m in network.unet.named_modules() if isinstance(m, Attention)}


@pytest.mark.parametrize("patch_size", [1, 2])
def test_the_prediction_has_the_shape_of_its_input(patch_size):
    network = small_unet(patch_size=patch_size)
    assert network(torch.randn(3, 2, 8, 8), torch.rand(3)).shape == (3, 2, 8, 8)
    assert network.sample_shape == (2, 8, 8)


def test_the_first_prediction_is_zero():
    network = DiffusersUNet(8, 1, widths=(8, 16), layers_per_block=1)
    assert not network(torch.randn(3, 1, 8, 8), torch.rand(3)).any()


def test_patches_are_folded_into_channels_at_half_the_resolution():
    network = small_unet(patch_size=2)
    sizes = []
    network.unet.conv_in.register_forward_pre_hook(lambda module, inputs: sizes.append(tuple(inputs[0].shape)))
    network(torch.randn(3, 2, 8, 8), torch.rand(3))
    assert sizes == [(3, 8, 4, 4)]


def test_folding_and_unfolding_keep_every_pixel_in_place():
    network = DiffusersUNet(8, 2, widths=(8, 16), patch_size=2)
    network.unet.forward = lambda sample, t, class_labels, return_dict: (sample,)
    x_t = torch.randn(3, 2, 8, 8)
    assert torch.equal(network(x_t, torch.rand(3)), x_t)


@pytest.mark.parametrize(("patch_size", "widths", "divisor"), [(1, (8, 8, 8, 8), 8), (2, (8, 8, 8), 8), (4, (8,), 4)])
def test_sizes_that_cannot_be_halved_are_refused_and_the_nearest_named(patch_size, widths, divisor):
    with pytest.raises(ValueError, match=rf"multiple of {divisor} .*got 30\. Nearest that fit: \d+ and 32\."):
        DiffusersUNet(30, widths=widths, patch_size=patch_size)


@pytest.mark.parametrize("num_classes", [None, 3])
def test_gradients_reach_every_parameter(num_classes):
    network = small_unet(num_classes)
    y = None if num_classes is None else torch.tensor([0, 1, 2])
    network(torch.randn(3, 2, 8, 8), torch.rand(3), y).square().sum().backward()
    # Softmax does not see what is added to all scores of a query: the bias of the keys has no gradient.
    for name, p in network.named_parameters():
        assert p.grad is not None, name
        assert name.endswith("to_k.bias") or p.grad.abs().sum() > 0, name


def test_labels_are_asked_for_if_and_only_if_there_are_classes():
    x_t, t, y = torch.randn(3, 2, 8, 8), torch.rand(3), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match="DiffusersUNet: built with num_classes=3, so it needs labels"):
        small_unet(num_classes=3)(x_t, t)
    with pytest.raises(ValueError, match="DiffusersUNet: built without num_classes"):
        small_unet()(x_t, t, y)


def test_the_prediction_depends_on_time_and_label():
    network = small_unet(num_classes=3)
    x_t = torch.randn(1, 2, 8, 8).expand(2, -1, -1, -1)
    by_time = network(x_t, torch.tensor([0.25, 0.75]), torch.tensor([1, 1]))
    by_label = network(x_t, torch.tensor([0.5, 0.5]), torch.tensor([0, 2]))
    assert not torch.allclose(by_time[0], by_time[1])
    assert not torch.allclose(by_label[0], by_label[1])


def test_a_float_time_is_read_like_the_step_a_thousand_times_as_large():
    network, x_t, steps = small_unet(), torch.randn(3, 2, 8, 8), torch.tensor([0, 250, 1000])
    torch.testing.assert_close(network(x_t, steps / 1000), network(x_t, steps))


@pytest.mark.parametrize("patch_size", [1, 2])
def test_an_example_does_not_depend_on_its_batch(patch_size):
    network = small_unet(num_classes=3, patch_size=patch_size).double()
    x_t, t, y = torch.randn(3, 2, 8, 8).double(), torch.rand(3).double(), torch.tensor([0, 1, 2])
    torch.testing.assert_close(network(x_t[1:2], t[1:2], y[1:2]), network(x_t, t, y)[1:2], **FLOAT32_SOFTMAX)


def test_a_state_dict_round_trip_keeps_the_output():
    first, second = small_unet(num_classes=3), small_unet(num_classes=3)
    second.load_state_dict(first.state_dict())
    inputs = torch.randn(3, 2, 8, 8), torch.rand(3), torch.tensor([0, 1, 2])
    assert torch.equal(first(*inputs), second(*inputs))


@pytest.mark.parametrize("patch_size", [1, 2])
def test_bfloat16_autocast_gives_finite_output_and_gradients(patch_size):
    network = small_unet(num_classes=3, patch_size=patch_size)
    with torch.autocast("cpu", torch.bfloat16):
        prediction = network(torch.randn(3, 2, 8, 8), torch.rand(3), torch.tensor([0, 1, 2]))
    prediction.float().square().mean().backward()
    assert prediction.isfinite().all()
    assert all(p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize(
    ("levels", "blocks"),
    [
        ((), set()),
        ((0,), {"down_blocks.0", "up_blocks.1"}),
        ((-1,), {"down_blocks.1", "mid_block", "up_blocks.0"}),
        ((-2,), {"down_blocks.0", "up_blocks.1"}),
        ((0, 1), {"down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"}),
    ],
)
def test_attention_is_at_the_levels_asked_for(levels, blocks):
    network = small_unet(attention_levels=levels)
    assert {name.split(".attentions")[0] for name in attentions(network)} == blocks


@pytest.mark.parametrize("level", [2, -3])
def test_levels_that_do_not_exist_are_refused(level):
    with pytest.raises(ValueError, match=rf"lie in \[-2, 2\) as there are 2 widths, got \[{level}\]"):
        small_unet(attention_levels=(level,))


@pytest.mark.parametrize(
    ("image_size", "patch_size", "level", "matmul"),
    [(24, 1, 1, True), (32, 1, 1, False), (24, 1, 0, False), (24, 2, 0, True)],
)
def test_short_sequences_are_attended_to_by_plain_matrix_products(image_size, patch_size, level, matmul):
    network = DiffusersUNet(
        image_size, 1, widths=(8, 16), layers_per_block=1, attention_levels=(level, -1), patch_size=patch_size
    )
    assert {type(a.processor) is AttnProcessor for a in attentions(network).values()} == {matmul}


def test_both_kinds_of_attention_compute_the_same():
    network = DiffusersUNet(32, 1, widths=(8, 16), layers_per_block=1).double()
    nn.init.normal_(network.unet.conv_out.weight)
    x_t, t = torch.randn(2, 1, 32, 32).double(), torch.rand(2)
    fused = network(x_t, t)
    for attention in attentions(network).values():
        attention.set_processor(AttnProcessor())
    torch.testing.assert_close(network(x_t, t), fused, **FLOAT32_SOFTMAX)


@pytest.mark.parametrize(("widths", "groups"), [((32, 64), 8), ((64, 64), 16), ((256,), 32), ((12, 30), 3), ((7,), 1)])
def test_groups_of_the_norm_divide_every_width_and_hold_at_least_four_channels(widths, groups):
    network = DiffusersUNet(8, 1, widths=widths, layers_per_block=1)
    assert {m.num_groups for m in network.modules() if isinstance(m, nn.GroupNorm)} == {groups}


def test_layers_per_block_counts_residual_blocks():
    network = DiffusersUNet(8, 1, widths=(8, 16), layers_per_block=3)
    assert [len(block.resnets) for block in network.unet.down_blocks] == [3, 3]


def test_dropout_acts_in_training_and_not_in_evaluation():
    network = small_unet(dropout=0.5)
    x_t, t = torch.randn(3, 2, 8, 8), torch.rand(3)
    assert not torch.equal(network(x_t, t), network(x_t, t))
    network.eval()
    assert torch.equal(network(x_t, t), network(x_t, t))


def test_heads_have_up_to_64_channels():
    network = DiffusersUNet(8, 1, widths=(64, 128), layers_per_block=1, attention_levels=(0, 1))
    assert {a.inner_dim // a.heads for a in attentions(network).values()} == {64}


@pytest.mark.parametrize("settings", [{"widths": ()}, {"patch_size": 0}])
def test_a_network_of_nothing_is_refused(settings):
    with pytest.raises(ValueError, match="patch_size of at least 1 and at least one of widths"):
        DiffusersUNet(8, **settings)


def test_importing_the_module_does_not_import_diffusers(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)  # now its import raises
    spec = importlib.util.spec_from_file_location("fresh_copy", diffusers_unet.__file__)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
