import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lit_generative.networks.dit import DiT


def small_dit(num_classes: int | None = None, **settings) -> DiT:
    """A network whose gates are open, as after some training."""
    torch.manual_seed(0)
    defaults = {"patch_size": 2, "width": 8, "depth": 2, "num_heads": 2}
    network = DiT(8, 3, num_classes, **defaults | settings)
    for p in network.parameters():
        nn.init.normal_(p, std=0.3)
    return network


INPUTS = torch.randn(3, 3, 8, 8), torch.tensor([0, 400, 999])


def num_parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(
    ("width", "depth", "num_heads", "published"),
    [(384, 12, 6, 33e6), (768, 12, 12, 130e6), (1024, 24, 16, 458e6), (1152, 28, 16, 675e6)],
)
def test_the_published_networks_have_their_sizes(width, depth, num_heads, published):
    with torch.device("meta"):
        network = DiT(32, 4, 1000, 2, width, depth, num_heads, learned_variance=True)
    assert abs(num_parameters(network) / published - 1) < 0.01


def test_dit_s_2_has_the_parameters_that_were_counted_by_hand():
    with torch.device("meta"):
        network = DiT(32, 4, 1000, 2, 384, 12, 6, learned_variance=True)
    d = 384
    block = (d * 3 * d + 3 * d) + (d * d + d) + (d * 4 * d + 4 * d) + (4 * d * d + d) + (d * 6 * d + 6 * d)
    ends = (16 * d + d) + (256 * d + d) + (d * d + d) + 1001 * d + (d * 2 * d + 2 * d) + (d * 32 + 32)
    assert num_parameters(network) == 12 * block + ends == 32_865_056


@pytest.mark.parametrize(("patch_size", "learned", "channels"), [(1, False, 3), (2, True, 6), (4, False, 3)])
def test_the_prediction_has_the_shape_of_its_input(patch_size, learned, channels):
    network = small_dit(patch_size=patch_size, learned_variance=learned)
    assert network(*INPUTS).shape == (3, channels, 8, 8)
    assert network.sample_shape == (3, 8, 8)
    assert network.learned_variance == learned


def test_the_first_prediction_is_zero_and_each_block_the_identity():
    network = DiT(8, 3, 5, width=8, depth=2, num_heads=2)
    assert not network(*INPUTS, torch.tensor([0, 1, 5])).any()
    tokens, known = torch.randn(2, 16, 8), torch.randn(2, 8)
    for block in network.blocks:
        assert torch.equal(block(tokens, known), tokens)


def test_weights_start_at_the_variance_that_keeps_signals_in_size():
    network = DiT(8, 3, 500, width=96, depth=1, num_heads=2)
    (block,) = network.blocks
    for weight in (network.patches.weight.flatten(1), block.qkv.weight, block.mlp[0].weight, network.time[0].weight):
        expected = (2 / sum(weight.shape)) ** 0.5  # Glorot & Bengio 2010, eq. 16
        torch.testing.assert_close(weight.std().item(), expected, rtol=0.05, atol=0)
    torch.testing.assert_close(network.labels.weight.std().item(), 0.02, rtol=0.05, atol=0)
    assert not block.qkv.bias.any()


def test_one_block_is_that_of_the_paper():
    network = small_dit().double()
    (block, _), tokens, known = network.blocks, torch.randn(2, 5, 8).double(), torch.randn(2, 8).double()
    numbers = F.silu(known) @ block.modulation.linear.weight.T + block.modulation.linear.bias
    shift1, scale1, gate1, shift2, scale2, gate2 = (part[:, None] for part in numbers.split(8, dim=1))
    attention = nn.MultiheadAttention(8, 2, batch_first=True).double()
    attention.load_state_dict(
        {
            "in_proj_weight": block.qkv.weight,
            "in_proj_bias": block.qkv.bias,
            "out_proj.weight": block.joined.weight,
            "out_proj.bias": block.joined.bias,
        }
    )
    h = F.layer_norm(tokens, (8,), eps=1e-6) * (1 + scale1) + shift1
    expected = tokens + gate1 * attention(h, h, h)[0]
    h = F.layer_norm(expected, (8,), eps=1e-6) * (1 + scale2) + shift2
    h = F.gelu(h @ block.mlp[0].weight.T + block.mlp[0].bias, approximate="tanh")
    expected = expected + gate2 * (h @ block.mlp[2].weight.T + block.mlp[2].bias)
    torch.testing.assert_close(block(tokens, known), expected)


def test_tokens_are_patches_and_go_back_to_their_places():
    network = DiT(8, 3, patch_size=2, width=12, depth=1, num_heads=1)
    # Each token is its patch, each block the identity: what comes out is the norm of every patch.
    network.patches.weight.data = torch.eye(12).view(12, 3, 2, 2)
    network.out.weight.data = torch.eye(12)
    network.positions.zero_()
    x_t, t = INPUTS
    patches = F.pixel_unshuffle(x_t, 2)
    normal = F.layer_norm(patches.permute(0, 2, 3, 1), (12,), eps=1e-6).permute(0, 3, 1, 2)
    torch.testing.assert_close(network(x_t, t), F.pixel_shuffle(normal, 2))


def test_positions_tell_rows_from_columns():
    positions = small_dit(width=8).positions
    assert positions.shape == (16, 8)
    grid = positions.view(4, 4, 8)
    assert torch.equal(grid[:, :1, :4].expand(-1, 4, -1), grid[:, :, :4])  # the first half says the row
    assert torch.equal(grid[:1, :, 4:].expand(4, -1, -1), grid[:, :, 4:])  # the second the column
    row = torch.tensor([torch.cos(torch.tensor(2.0)), torch.cos(torch.tensor(2e-4))])
    torch.testing.assert_close(grid[2, 3, :2], row)
    assert len(positions.unique(dim=0)) == 16
    assert "positions" not in small_dit().state_dict()


def test_moving_the_image_is_seen():
    network = small_dit().double()
    x_t, t = INPUTS[0].double(), INPUTS[1]
    moved = network(x_t.roll(2, dims=3), t).roll(-2, dims=3)
    assert not torch.allclose(moved, network(x_t, t))


@pytest.mark.parametrize(("image_size", "fused"), [(24, False), (26, True)])
def test_short_sequences_are_attended_to_by_plain_matrix_products(image_size, fused):
    network = DiT(image_size, 1, width=8, depth=2, num_heads=2)
    assert {block.fused for block in network.blocks} == {fused}


def test_both_kinds_of_attention_compute_the_same():
    network = small_dit().double()
    x_t, t = INPUTS[0].double(), INPUTS[1]
    plain = network(x_t, t)
    for block in network.blocks:
        block.fused = True
    torch.testing.assert_close(network(x_t, t), plain)


def test_the_prediction_depends_on_time_and_label_and_the_null_class_is_one_more():
    network = small_dit(num_classes=3)
    assert network.labels.weight.shape == (4, 8)
    x_t = INPUTS[0][:1].expand(4, -1, -1, -1)
    by_time = network(x_t, torch.tensor([0, 10, 400, 999]), torch.zeros(4, dtype=torch.int64))
    by_label = network(x_t, torch.full((4,), 0.5), torch.arange(4))
    for predictions in (by_time, by_label):
        assert all(not torch.allclose(predictions[i], predictions[j]) for i in range(4) for j in range(i))
    with pytest.raises(IndexError):
        network(x_t, torch.full((4,), 0.5), torch.full((4,), 4))


def test_labels_are_asked_for_if_and_only_if_there_are_classes():
    with pytest.raises(ValueError, match="DiT: built with num_classes=3, so it needs labels"):
        small_dit(num_classes=3)(*INPUTS)
    with pytest.raises(ValueError, match="DiT: built without num_classes"):
        small_dit()(*INPUTS, torch.tensor([0, 1, 2]))


def test_what_is_shown_beside_matters():
    network = small_dit(extra_channels=2)
    x_t, t = torch.randn(3, 5, 8, 8), INPUTS[1]
    changed = torch.cat([x_t[:, :3], torch.randn(3, 2, 8, 8)], dim=1)
    assert network(x_t, t).shape == (3, 3, 8, 8)
    assert not torch.allclose(network(x_t, t), network(changed, t))
    with pytest.raises(ValueError, match=r"DiT: needs a batch of shape \(N, 5, 8, 8\), got \(3, 3, 8, 8\)"):
        network(*INPUTS)


def test_a_float_time_is_read_like_the_step_a_thousand_times_as_large():
    network, (x_t, t) = small_dit(), INPUTS
    torch.testing.assert_close(network(x_t, t / 1000), network(x_t, t))


def test_the_ratio_is_the_perceptrons_width_in_widths_of_a_token():
    assert small_dit(mlp_ratio=2.5).blocks[0].mlp[0].out_features == 20


def test_depth_and_heads_are_as_asked():
    network = small_dit(depth=3, num_heads=4)
    assert [block.num_heads for block in network.blocks] == [4, 4, 4]


@pytest.mark.parametrize("num_classes", [None, 3])
def test_gradients_reach_every_parameter(num_classes):
    network = small_dit(num_classes)
    y = None if num_classes is None else torch.tensor([0, 1, 3])
    network(*INPUTS, y).square().sum().backward()
    for name, p in network.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().sum() > 0, name


def test_an_example_does_not_depend_on_its_batch():
    network = small_dit(num_classes=3).double()
    x_t, t, y = INPUTS[0].double(), INPUTS[1], torch.tensor([0, 1, 2])
    torch.testing.assert_close(network(x_t[1:2], t[1:2], y[1:2]), network(x_t, t, y)[1:2])


def test_bfloat16_autocast_gives_finite_output_and_gradients():
    network = small_dit(num_classes=3)
    with torch.autocast("cpu", torch.bfloat16):
        prediction = network(*INPUTS, torch.tensor([0, 1, 2]))
    prediction.float().square().mean().backward()
    assert prediction.isfinite().all()
    assert all(p.grad.isfinite().all() for p in network.parameters())


def test_a_state_dict_round_trip_keeps_the_output():
    first, second = small_dit(), DiT(8, 3, width=8, depth=2, num_heads=2)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(*INPUTS), second(*INPUTS))


def test_a_size_that_cannot_be_cut_is_refused_and_the_nearest_named():
    with pytest.raises(ValueError, match=r"DiT: image_size must be a positive multiple of 4 .*got 30\. .*28 and 32"):
        DiT(30, patch_size=4)


@pytest.mark.parametrize(
    "settings",
    [{"width": 10}, {"width": 12, "num_heads": 8}, {"depth": 0}, {"patch_size": 0}, {"num_heads": 0}, {"width": 4}],
)
def test_sizes_that_do_not_go_together_are_refused(settings):
    with pytest.raises(ValueError, match="DiT: patch_size, depth and num_heads must be at least 1, and width a mult"):
        DiT(8, **{"width": 8, "depth": 1, "num_heads": 1} | settings)
