import importlib.util
import sys

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import nn

from lit_generative.networks import diffusers_unet
from lit_generative.networks.diffusers_unet import DiffusersUNet
from lit_generative.recipe import describe

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


# ---- published networks


WIDTHS = (128, 256, 256, 256)


def num_parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def cifar10(**settings) -> DiffusersUNet:
    with torch.device("meta"):
        return DiffusersUNet(32, widths=WIDTHS, mid_attention=True, **settings)


def test_the_cifar10_network_of_ddpm_has_its_published_size():
    network = cifar10(attention_levels=(1,), dropout=0.1)
    assert num_parameters(network) == 35_746_307
    down = ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D")
    up = ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    with torch.device("meta"):  # with the published one's single head
        theirs = UNet2DModel(
            block_out_channels=WIDTHS, down_block_types=down, up_block_types=up, attention_head_dim=None
        )
    shapes = {name: value.shape for name, value in network.unet.state_dict().items()}
    assert shapes == {name: value.shape for name, value in theirs.state_dict().items()}


def test_the_cifar10_network_of_improved_ddpm_has_four_heads_at_16_and_8_pixels():
    network = cifar10(layers_per_block=3, attention_levels=(1, 2), learned_variance=True, scale_shift=True)
    assert num_parameters(network) == 52_546_438
    assert {a.heads for a in attentions(network).values()} == {4}
    assert {name.split(".attentions")[0] for name in attentions(network)} == {
        "down_blocks.1",
        "down_blocks.2",
        "mid_block",
        "up_blocks.1",
        "up_blocks.2",
    }


# ---- further options


@pytest.mark.parametrize(("levels", "mid", "expected"), [((0,), True, True), ((-1,), False, False), ((), True, True)])
def test_attention_in_the_middle_can_be_chosen_apart(levels, mid, expected):
    names = attentions(small_unet(attention_levels=levels, mid_attention=mid))
    assert any(name.startswith("mid_block") for name in names) == expected
    assert any(name.startswith("down_blocks") for name in names) == bool(levels)


def test_attention_in_the_middle_alone_is_over_the_lowest_level():
    for image_size, matmul in ((24, True), (32, False)):
        network = DiffusersUNet(
            image_size, 1, widths=(8, 16), layers_per_block=1, attention_levels=(), mid_attention=True
        )
        assert {type(a.processor) is AttnProcessor for a in attentions(network).values()} == {matmul}


def test_scale_and_shift_need_twice_the_numbers_of_the_time():
    plain, scaled = (small_unet(scale_shift=s).unet.down_blocks[0].resnets[0].time_emb_proj for s in (False, True))
    assert (plain.out_features, scaled.out_features) == (8, 16)
    assert isinstance(small_unet(scale_shift=True).unet.mid_block.attentions[0].group_norm, nn.GroupNorm)


@pytest.mark.parametrize("patch_size", [1, 2])
def test_a_learned_variance_gives_twice_the_channels_the_prediction_first(patch_size):
    network = small_unet(learned_variance=True, patch_size=patch_size)
    x_t = torch.randn(3, 2, 8, 8)
    assert network.learned_variance
    assert network(x_t, torch.rand(3)).shape == (3, 4, 8, 8)
    network.unet.forward = lambda sample, t, class_labels, return_dict: (torch.cat([sample, 2 * sample], dim=1),)
    assert torch.equal(network(x_t, torch.rand(3)), torch.cat([x_t, 2 * x_t], dim=1))


@pytest.mark.parametrize("patch_size", [1, 2])
def test_what_is_shown_beside_matters_and_comes_after_the_image(patch_size):
    network = small_unet(extra_channels=3, patch_size=patch_size)
    assert network.extra_channels == 3
    assert network.sample_shape == (2, 8, 8)
    x_t, t = torch.randn(3, 5, 8, 8), torch.rand(3)
    changed = torch.cat([x_t[:, :2], torch.randn(3, 3, 8, 8)], dim=1)
    assert network(x_t, t).shape == (3, 2, 8, 8)
    assert not torch.allclose(network(x_t, t), network(changed, t))
    seen = 2 * patch_size**2
    network.unet.forward = lambda sample, t, class_labels, return_dict: (sample[:, :seen],)
    assert torch.equal(network(x_t, t), x_t[:, :2])


@pytest.mark.parametrize(("extra", "given"), [(0, 3), (3, 2), (3, 4)])
def test_a_wrong_number_of_channels_is_refused(extra, given):
    message = rf"DiffusersUNet: needs a batch of shape \(N, {2 + extra}, 8, 8\), got \(3, {given}, 8, 8\)"
    with pytest.raises(ValueError, match=message):
        small_unet(extra_channels=extra)(torch.randn(3, given, 8, 8), torch.rand(3))


def test_the_null_class_is_one_more_than_the_classes():
    network = small_unet(num_classes=3)
    assert network.num_classes == 3
    assert network.unet.class_embedding.weight.shape[0] == 4
    x_t = torch.randn(1, 2, 8, 8).expand(4, -1, -1, -1)
    predictions = network(x_t, torch.full((4,), 0.5), torch.arange(4))
    assert all(not torch.allclose(predictions[3], predictions[i]) for i in range(3))
    with pytest.raises(IndexError):
        network(x_t, torch.full((4,), 0.5), torch.full((4,), 4))


# ---- pretrained


def saved(folder, **settings):
    torch.manual_seed(0)
    network = small_unet(**settings).eval()
    network.unet.save_pretrained(folder)
    return network


def small(folder=None, image_size=8, channels=2, **settings):
    defaults = {"widths": (8, 16), "layers_per_block": 1, "pretrained": folder and str(folder)}
    return DiffusersUNet(image_size, channels, **defaults | settings)


INPUTS = torch.randn(3, 2, 8, 8), torch.tensor([0, 400, 999]), torch.tensor([0, 3, 2])


def test_a_saved_network_is_a_plain_unet_of_diffusers(tmp_path):
    network = saved(tmp_path, num_classes=3)
    x_t, t, y = INPUTS
    theirs = UNet2DModel.from_pretrained(tmp_path)(x_t, t, class_labels=y).sample
    torch.testing.assert_close(theirs, network(x_t, t, y))


@pytest.mark.parametrize(
    "settings", [{}, {"learned_variance": True}, {"scale_shift": True, "mid_attention": False}, {"patch_size": 2}]
)
def test_training_can_start_from_a_saved_network(tmp_path, settings):
    network = saved(tmp_path, num_classes=3, **settings)
    again = small(tmp_path, num_classes=3, **settings)
    assert all(module.training for module in again.modules())
    again.eval()
    torch.testing.assert_close(again(*INPUTS), network(*INPUTS))
    assert all(p.requires_grad for p in again.parameters())


def test_subfolder_and_revision_are_those_asked_for(tmp_path, monkeypatch):
    network = saved(tmp_path / "unet")
    x_t, t, _ = INPUTS
    torch.testing.assert_close(small(tmp_path, subfolder="unet").eval()(x_t, t), network(x_t, t))
    asked = {}
    monkeypatch.setattr(UNet2DModel, "load_config", lambda name, **place: asked.update(place) or {})
    with pytest.raises(ValueError, match=r"its config\.json says None"):
        small("owner/name", subfolder="unet", revision="abc")
    assert asked == {"subfolder": "unet", "revision": "abc"}


def test_norms_and_heads_are_the_files_and_size_and_dropout_the_arguments(tmp_path):
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    settings = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 8, "attention_head_dim": 4}
    UNet2DModel(8, 2, 2, **blocks, **settings, norm_eps=1e-6, dropout=0.5).half().save_pretrained(tmp_path)
    network = small(tmp_path, image_size=16, dropout=0.1).eval()
    assert {m.num_groups for m in network.modules() if isinstance(m, nn.GroupNorm)} == {8}
    assert {a.heads for a in attentions(network).values()} == {4}
    assert network.unet.config.norm_eps == 1e-6
    assert {m.p for m in network.modules() if isinstance(m, nn.Dropout)} == {0.1, 0.0}  # 0.0 is attention's
    assert network.unet.config.sample_size == 16
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    assert network(torch.randn(1, 2, 16, 16), torch.rand(1)).shape == (1, 2, 16, 16)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"extra_channels": 1}, r"in_channels is 2 there, 3 here \(channels, extra_channels, patch_size\)\.$"),
        ({"learned_variance": True}, r"out_channels is 2 there, 4 here"),
        ({"widths": (8, 32)}, r"block_out_channels is \[8, 16\] there, \[8, 32\] here \(widths\)"),
        ({"layers_per_block": 2}, r"layers_per_block is 1 there, 2 here"),
        (
            {"attention_levels": (0,), "num_classes": 3},
            r"down_block_types .*up_block_types .*; num_class_embeds is None there, 4 here",
        ),
        ({"mid_attention": False}, r"add_attention is True there, False here \(mid_attention\)"),
        ({"scale_shift": True}, r"resnet_time_scale_shift is 'default' there, 'scale_shift' here \(scale_shift\)"),
    ],
)
def test_a_saved_network_that_does_not_fit_is_refused_and_what_differs_named(tmp_path, settings, message):
    saved(tmp_path)
    with pytest.raises(ValueError, match=rf"DiffusersUNet: '.*' does not fit the arguments: .*{message}"):
        small(tmp_path, **settings)


@pytest.mark.parametrize("setting", [{"time_embedding_type": "fourier"}, {"center_input_sample": True}])
def test_a_network_that_reads_time_or_images_otherwise_is_refused(tmp_path, setting):
    config = {name: value for name, value in saved(tmp_path).unet.config.items() if not name.startswith("_")}
    UNet2DModel(**config | setting).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"does not fit the arguments: {next(iter(setting))} is"):
        small(tmp_path)


def test_a_network_from_a_folder_is_described_without_it(tmp_path):
    saved(tmp_path, num_classes=3)
    arguments = describe(small(tmp_path, num_classes=3))["init_args"]
    assert [arguments[name] for name in ("pretrained", "subfolder", "revision")] == [None] * 3
    again = DiffusersUNet(**arguments)
    again.load_state_dict(small(tmp_path, num_classes=3).state_dict())
    torch.testing.assert_close(again(*INPUTS), small(tmp_path, num_classes=3)(*INPUTS))
    with pytest.raises(ValueError, match="config does not fit the arguments: layers_per_block is 1 there, 2 here"):
        DiffusersUNet(**{**arguments, "layers_per_block": 2})


def test_a_folder_and_a_config_together_are_refused(tmp_path):
    with pytest.raises(ValueError, match="give pretrained or config, not both"):
        small(tmp_path, config="{}")


def test_a_size_that_cannot_be_halved_is_refused_of_a_pretrained_network_too(tmp_path):
    saved(tmp_path)
    with pytest.raises(ValueError, match=r"image_size must be a positive multiple of 2 .*, got 9"):
        small(tmp_path, image_size=9)
