import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from lit_generative.tensor_ops import (
    check_pixel_levels,
    derive_seed,
    evaluating,
    expand_like,
    from_uint8,
    frozen,
    full_precision,
    generators_of,
    log_ndtr,
    perplexity,
    randn,
    random_labels,
    sample_generators,
    sum_per_example,
    to_float32,
    to_uint8,
    uniform,
)


@pytest.mark.parametrize("shape", [(3,), (3, 2), (3, 2, 4, 5), (3, 2, 4, 5, 6)])
def test_one_value_per_example_multiplies_every_entry_of_its_example(shape):
    x = torch.ones(shape)
    values = torch.tensor([2.0, 3.0, 5.0])
    product = expand_like(values, x) * x
    assert product.shape == x.shape
    for i, value in enumerate(values):
        torch.testing.assert_close(product[i], torch.full(shape[1:], float(value)))


def test_the_sum_per_example_leaves_the_batch_axis():
    x = torch.arange(24.0).reshape(2, 3, 4)
    torch.testing.assert_close(sum_per_example(x), torch.tensor([66.0, 210.0]))


def test_the_sum_per_example_of_one_axis_of_values_is_their_sum():
    torch.testing.assert_close(sum_per_example(torch.tensor([[1.0, 2.0], [3.0, 4.0]])), torch.tensor([3.0, 7.0]))


def _half_frozen() -> nn.Sequential:
    network = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    network[0].weight.requires_grad_(False)
    network[1].eval()
    return network


def test_inside_frozen_no_parameter_asks_for_a_gradient_but_the_input_gets_one():
    network, x = nn.Linear(2, 3), torch.ones(4, 2, requires_grad=True)
    with frozen(network):
        assert not any(p.requires_grad for p in network.parameters())
        network(x).sum().backward()
    assert network.weight.grad is None
    torch.testing.assert_close(x.grad, network.weight.detach().sum(dim=0).expand(4, 2))


def test_a_parameter_frozen_before_stays_frozen_after():
    network = _half_frozen()
    before = [p.requires_grad for p in network.parameters()]
    with frozen(network):
        pass
    assert [p.requires_grad for p in network.parameters()] == before
    assert before.count(False) == 1


def test_frozen_gives_the_settings_back_after_an_exception():
    network = _half_frozen()
    before = [p.requires_grad for p in network.parameters()]
    with pytest.raises(KeyError), frozen(network):
        raise KeyError
    assert [p.requires_grad for p in network.parameters()] == before


def test_inside_evaluating_every_submodule_is_in_evaluation_mode():
    network = _half_frozen()
    with evaluating(network):
        assert not any(m.training for m in network.modules())


def test_evaluating_gives_each_submodule_its_own_mode_back_also_after_an_exception():
    network = _half_frozen()
    before = [m.training for m in network.modules()]
    with evaluating(network):
        pass
    assert [m.training for m in network.modules()] == before
    with pytest.raises(KeyError), evaluating(network):
        raise KeyError
    assert [m.training for m in network.modules()] == before
    assert before == [True, True, False, True]


def test_seeds_of_different_parts_differ_and_fit_in_63_bits():
    parts = [("train", 0, 1), ("train", 1, 0), ("val", 0, 1), ("train", 0), ("train", "0", 1), ("train", 0, 11)]
    seeds = [derive_seed(*p) for p in parts]
    assert len(set(seeds)) == len(parts)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_seed_is_the_same_in_another_process():
    code = "from lit_generative.tensor_ops import derive_seed; print(derive_seed('sample', 3, 14))"
    environment = os.environ | {"PYTHONHASHSEED": "77"}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert int(out.stdout) == derive_seed("sample", 3, 14)


@pytest.mark.parametrize("draw", [lambda n, g: randn((n, 2, 3), g), lambda n, g: random_labels(n, 1000, g)])
def test_with_a_generator_each_the_first_samples_do_not_depend_on_how_many_are_drawn(draw):
    torch.testing.assert_close(draw(5, sample_generators(7, 5))[:2], draw(2, sample_generators(7, 2)), rtol=0, atol=0)
    torch.testing.assert_close(
        draw(5, sample_generators(7, 5))[3:], draw(2, sample_generators(7, 2, start=3)), rtol=0, atol=0
    )


def test_samples_of_other_seeds_and_other_indices_differ():
    x = torch.cat([randn((3, 4), sample_generators(seed, 3)) for seed in (0, 1)])
    assert len(x.unique(dim=0)) == 6


def test_noise_of_many_generators_is_standard_normal():
    x = randn((400, 5, 5), sample_generators(0, 400))
    assert x.dtype == torch.float32
    torch.testing.assert_close(x.mean(), torch.tensor(0.0), rtol=0, atol=0.04)
    torch.testing.assert_close(x.std(), torch.tensor(1.0), rtol=0, atol=0.04)


def test_one_generator_gives_torchs_own_stream():
    generator = torch.Generator().manual_seed(3)
    expected = torch.randn(4, 2, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(randn((4, 2), generator), expected, rtol=0, atol=0)
    torch.manual_seed(3)
    torch.testing.assert_close(randn([4, 2]), expected, rtol=0, atol=0)


@pytest.mark.parametrize("generator", [None, torch.Generator().manual_seed(1), sample_generators(1, 600)])
def test_labels_take_every_class_about_equally_often(generator):
    torch.manual_seed(1)
    labels = random_labels(600, 3, generator)
    assert labels.dtype == torch.int64
    counts = labels.bincount(minlength=3).double()
    assert len(counts) == 3
    torch.testing.assert_close(counts, torch.full((3,), 200.0).double(), rtol=0, atol=45)


@pytest.mark.parametrize("draw", [lambda g: randn((3, 2), g), lambda g: random_labels(3, 5, g)])
def test_a_wrong_number_of_generators_is_refused(draw):
    with pytest.raises(ValueError, match="generator: need one for each of 3 samples, got 2"):
        draw(sample_generators(0, 2))


def test_no_samples_need_no_generators():
    assert randn((0, 2, 3), []).shape == (0, 2, 3)
    assert random_labels(0, 5, []).shape == (0,)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_noise_and_labels_lie_on_the_device_asked_for(device):
    assert randn((2, 3), torch.Generator(), device).device.type == device
    assert randn((2, 3), sample_generators(0, 2), device).device.type == device
    assert random_labels(2, 3, sample_generators(0, 2), device).device.type == device


def test_all_256_levels_survive_the_round_trip():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 32, 8)
    x = from_uint8(pixels)
    torch.testing.assert_close(to_uint8(x), pixels)
    torch.testing.assert_close(torch.stack([x.min(), x.max()]), torch.tensor([-1.0, 1.0]), rtol=0, atol=0)
    torch.testing.assert_close(to_uint8(x.double()), pixels)


def test_a_value_goes_to_the_nearest_level():
    levels = torch.tensor([10.4, 10.6, 254.6, 0.4]) / 127.5 - 1
    assert to_uint8(levels).tolist() == [10, 11, 255, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_loses_nothing_on_the_way_to_pixels(dtype):
    x = torch.linspace(-1, 1, 999, dtype=torch.float64).to(dtype)
    torch.testing.assert_close(to_uint8(x), to_uint8(x.double()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_what_lies_outside_becomes_black_or_white(dtype):
    x = torch.tensor([-float("inf"), -7.0, -1.01, 1.01, 7.0, float("inf")], dtype=dtype)
    assert to_uint8(x).tolist() == [0, 0, 0, 255, 255, 255]


def test_inside_full_precision_autocast_is_off_and_on_again_after_an_error():
    layer, x = nn.Linear(2, 3), torch.ones(4, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with full_precision("cpu"):
            assert layer(x).dtype == torch.float32
        assert layer(x).dtype == torch.bfloat16
        with pytest.raises(RuntimeError), full_precision(x.device):
            layer(x.bfloat16())  # autocast would have made the two alike
        assert layer(x).dtype == torch.bfloat16


def test_only_tensors_of_half_precision_become_float32_at_any_depth():
    half, brain, double, label = torch.ones(2).half(), torch.ones(2).bfloat16(), torch.ones(2).double(), torch.arange(2)
    cast = to_float32({"a": [half, (brain, None)], "b": double, "c": label, "d": "text"})
    assert [t.dtype for t in (cast["a"][0], cast["a"][1][0])] == [torch.float32] * 2
    assert isinstance(cast["a"][1], tuple)
    assert cast["a"][1][1] is None
    assert cast["b"] is double
    assert cast["c"] is label


def test_the_perplexity_counts_what_is_used():
    torch.testing.assert_close(perplexity(torch.tensor([2.0, 2.0, 0.0, 2.0])), torch.tensor(3.0))
    torch.testing.assert_close(perplexity(torch.tensor([0, 7])), torch.tensor(1.0))
    p = torch.tensor([0.5, 0.3, 0.2]).double()
    torch.testing.assert_close(perplexity(10 * p), torch.distributions.Categorical(p).entropy().exp())


def test_uniform_numbers_lie_in_the_unit_interval_and_do_not_depend_on_the_batch():
    numbers = uniform((4000, 3), torch.Generator().manual_seed(0))
    assert 0 <= float(numbers.min()) < 0.01 < 0.99 < float(numbers.max()) < 1
    together = uniform((4, 2), sample_generators(0, 4))
    apart = torch.cat([uniform((1, 2), sample_generators(0, 1, start=i)) for i in range(4)])
    torch.testing.assert_close(apart, together, rtol=0, atol=0)
    assert uniform((0, 2), []).shape == (0, 2)
    with pytest.raises(ValueError, match="need one for each of 3 samples, got 2"):
        uniform((3,), sample_generators(0, 2))


def test_generators_belong_to_the_example_and_to_what_else_is_named():
    x = torch.randn(4, 2, 3)

    def draws(*arguments):
        return torch.stack([torch.randn(3, generator=g) for g in generators_of(*arguments)])

    together = draws(x, "a", 1)
    torch.testing.assert_close(draws(x[[2, 0]], "a", 1), together[[2, 0]])
    assert not torch.equal(draws(x, "a", 2), together)
    assert len(torch.unique(together)) == together.numel()


def test_pixel_levels_pass_also_in_bfloat16_and_nothing_else_does():
    levels = torch.arange(256) / 127.5 - 1
    check_pixel_levels("Who: images", levels, "Do this.")
    check_pixel_levels("Who: images", levels.bfloat16(), "Do this.")
    for bad in (levels + 1 / 255, levels * 1.01, torch.tensor([torch.nan])):
        with pytest.raises(ValueError, match=r"Who: images must hold the 256 levels .* nearest\. Do this\."):
            check_pixel_levels("Who: images", bad, "Do this.")


def test_the_logarithm_of_the_normal_distribution_function_has_an_exact_gradient_at_any_distance():
    x = torch.tensor([-1e30, -1e5, -1e4, -300.0, -5.0, 0.0, 2.0, 30.0, 1e30], requires_grad=True)
    y = log_ndtr(x)
    torch.testing.assert_close(y.detach(), torch.special.log_ndtr(x.detach()), rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    middle = x.detach().double()[3:7].requires_grad_()
    (expected,) = torch.autograd.grad(torch.special.log_ndtr(middle).sum(), middle)
    torch.testing.assert_close(gradient[3:7].double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient[:3], -x.detach()[:3])  # phi(x) / Phi(x) is -x - 1/x there, and less
    assert gradient[-1] == 0


def test_the_gradient_of_the_normal_distribution_function_is_that_of_differences():
    x = torch.linspace(-30, 4, 20, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(log_ndtr, x)
