import pytest
import torch

from lit_generative.networks.minibatch_std import MinibatchStd


def test_the_map_is_the_mean_over_channels_and_positions_of_the_deviation_in_the_group():
    torch.manual_seed(0)
    x = torch.randn(6, 4, 2, 3).double()
    out = MinibatchStd(group_size=3)(x)
    assert out.shape == (6, 5, 2, 3)
    assert torch.equal(out[:, :4], x)
    for group in (slice(0, 3), slice(3, 6)):
        expected = x[group].std(dim=0, unbiased=False).mean()
        torch.testing.assert_close(out[group, 4], expected.expand(3, 2, 3), rtol=1e-6, atol=0)


def test_by_hand_two_examples_that_differ_by_2_have_a_deviation_of_1():
    x = torch.tensor([1.0, 3.0, 7.0, 7.0]).reshape(4, 1, 1, 1)
    torch.testing.assert_close(MinibatchStd(2)(x)[:, 1, 0, 0], torch.tensor([1.0, 1.0, 1e-4, 1e-4]))


def test_each_feature_has_its_own_part_of_the_channels():
    torch.manual_seed(0)
    x = torch.randn(4, 6, 2, 3).double()
    out = MinibatchStd(group_size=4, num_features=2)(x)
    assert out.shape == (4, 8, 2, 3)
    for i in range(2):
        expected = MinibatchStd(group_size=4)(x[:, 3 * i : 3 * i + 3])[:, 3]
        torch.testing.assert_close(out[:, 6 + i], expected)


@pytest.mark.parametrize(("num", "group"), [(1, 1), (2, 2), (3, 3), (5, 1), (6, 3), (7, 1), (8, 4), (9, 3), (10, 2)])
def test_a_group_is_the_largest_divisor_of_the_batch_up_to_4(num, group):
    torch.manual_seed(0)
    x = torch.randn(num, 2, 3, 3)
    maps = MinibatchStd(group_size=4)(x)[:, 2, 0, 0]
    torch.testing.assert_close(maps, MinibatchStd(group_size=group)(x)[:, 2, 0, 0])
    assert len(maps.unique()) == (1 if group == 1 else num // group)
    assert (maps[0] < 1e-3) == (group == 1)


def test_equal_images_have_finite_first_and_second_derivatives():
    x = torch.ones(4, 2, 3, 3, requires_grad=True)
    out = MinibatchStd()(x)
    (gradient,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    gradient.square().sum().backward()
    assert gradient.isfinite().all()
    assert x.grad.isfinite().all()


def test_half_precision_does_not_overflow():
    x = torch.tensor([-1000.0, 1000.0], dtype=torch.float16).reshape(2, 1, 1, 1)
    out = MinibatchStd()(x)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out[:, 1].flatten(), torch.tensor([1000.0, 1000.0], dtype=torch.float16))


def test_an_empty_batch_stays_empty():
    assert MinibatchStd()(torch.empty(0, 2, 3, 3)).shape == (0, 3, 3, 3)


@pytest.mark.parametrize("arguments", [{"group_size": 0}, {"num_features": 0}])
def test_numbers_below_1_are_refused(arguments):
    with pytest.raises(ValueError, match=rf"{next(iter(arguments))} must be at least 1, got 0"):
        MinibatchStd(**arguments)


def test_features_that_do_not_divide_the_channels_are_refused():
    with pytest.raises(ValueError, match="num_features=2 must divide the channels, got 3"):
        MinibatchStd(num_features=2)(torch.randn(2, 3, 4, 4))
