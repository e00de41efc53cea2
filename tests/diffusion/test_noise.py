import itertools

import pytest
import torch

from lit_generative.diffusion.noise import Coupling, MinibatchOT, NoiseSource
from tests import tiny

COUPLINGS = [cls for cls in Coupling.__subclasses__() if cls.__module__.startswith("lit_generative.")]
every_coupling = pytest.mark.parametrize("coupling", [cls() for cls in COUPLINGS], ids=lambda c: type(c).__name__)


def batch(num: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.randn(2, num, 3, 2, 4, generator=torch.Generator().manual_seed(0)))


def squared_distance(x0: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    return (x0 - eps).square().flatten(start_dim=1).sum(dim=1)


# ---- plain


def test_the_default_is_independent_standard_normal_noise_shown_as_it_is():
    x0 = torch.zeros(2_000, 3, 2, 4)
    torch.manual_seed(0)
    eps = NoiseSource().draw(x0)
    torch.manual_seed(0)
    torch.testing.assert_close(eps, torch.randn_like(x0), rtol=0, atol=0)
    assert NoiseSource().shown(eps) is eps


@pytest.mark.parametrize("options", [{}, {"offset": 0.5}, {"perturbation": 0.5}, {"coupling": MinibatchOT()}])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_noise_has_the_shape_and_type_of_the_data(options, dtype):
    source, x0 = NoiseSource(**options), torch.zeros(5, 3, 2, 4, dtype=dtype)
    eps = source.draw(x0)
    for noise in (eps, source.shown(eps)):
        assert noise.shape == x0.shape
        assert noise.dtype == dtype


# ---- offset


def test_offset_moves_each_channel_of_each_image_by_a_number_of_its_own():
    x0 = torch.zeros(4_000, 3, 2, 4, dtype=torch.float64)
    torch.manual_seed(0)
    moved = NoiseSource(offset=0.5).draw(x0)
    torch.manual_seed(0)
    offset = (moved - torch.randn_like(x0)) / 0.5
    torch.testing.assert_close(offset, offset[:, :, :1, :1].expand_as(offset))
    numbers = offset[:, :, 0, 0]
    torch.testing.assert_close(numbers.mean(dim=0), torch.zeros(3, dtype=torch.float64), rtol=0, atol=0.05)
    torch.testing.assert_close(numbers.T.cov(), torch.eye(3, dtype=torch.float64), rtol=0, atol=0.06)
    pixels = moved.flatten(start_dim=2)
    torch.testing.assert_close(pixels.var(), torch.tensor(1.25, dtype=torch.float64), rtol=0.02, atol=0)


def test_points_have_no_channels_to_offset():
    with pytest.raises(ValueError, match=r"NoiseSource: offset is for images \(N, C, H, W\), got \(5, 2\)"):
        NoiseSource(offset=0.1).draw(torch.zeros(5, 2))


# ---- perturbation


def test_the_input_is_perturbed_but_not_what_has_to_be_found():
    source, x0 = NoiseSource(perturbation=0.5), torch.zeros(2_000, 3, 2, 4, dtype=torch.float64)
    torch.manual_seed(0)
    eps = source.draw(x0)
    torch.manual_seed(0)
    torch.testing.assert_close(eps, torch.randn_like(x0), rtol=0, atol=0)
    added = source.shown(eps) - eps
    one = torch.tensor(1.0, dtype=torch.float64)
    torch.testing.assert_close(added.std(), 0.5 * one, rtol=0.02, atol=0)
    torch.testing.assert_close(added.mean(), 0 * one, rtol=0, atol=0.01)
    torch.testing.assert_close((added * eps).mean(), 0 * one, rtol=0, atol=0.01)
    assert (source.shown(eps) - eps != added).any()


# ---- coupling


@every_coupling
def test_a_coupling_is_a_permutation(coupling):
    x0, eps = batch()
    partners = coupling.partners(x0, eps)
    assert partners.dtype == torch.int64
    assert sorted(partners.tolist()) == list(range(7))


@every_coupling
def test_a_coupling_does_not_raise_the_total_squared_distance(coupling):
    x0, eps = batch(64)
    paired = eps[coupling.partners(x0, eps)]
    assert squared_distance(x0, paired).sum() < squared_distance(x0, eps).sum()


def test_no_other_pairing_is_shorter():
    x0, eps = batch(5)
    paired = squared_distance(x0, eps[MinibatchOT().partners(x0, eps)]).sum()
    shortest = min(squared_distance(x0, eps[list(order)]).sum() for order in itertools.permutations(range(5)))
    torch.testing.assert_close(paired, shortest)


def test_a_shuffled_batch_finds_itself_whatever_its_size():
    x0, _ = batch(6)
    x0 = x0 * torch.logspace(-1, 1, 6).reshape(-1, 1, 1, 1)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert order[MinibatchOT().partners(x0, x0[order])].tolist() == list(range(6))


def test_a_source_permutes_its_noise_and_nothing_else():
    x0, _ = batch()
    before = x0.clone()
    torch.manual_seed(5)
    paired = NoiseSource(coupling=MinibatchOT()).draw(x0)
    torch.manual_seed(5)
    drawn = torch.randn_like(x0)
    torch.testing.assert_close(paired, drawn[MinibatchOT().partners(x0, drawn)], rtol=0, atol=0)
    assert (paired != drawn).any()
    torch.testing.assert_close(x0, before, rtol=0, atol=0)


def test_labels_stay_with_their_data():
    module, seen = tiny.point_ddpm(num_classes=3, noise=NoiseSource(coupling=MinibatchOT())), []
    module.network.register_forward_pre_hook(lambda _, args: seen.append(args[2].tolist()))
    x0 = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    prediction = module.predict_noisy(x0, torch.tensor([1, 5, 9]), torch.tensor([2, 0, 1]))
    assert seen == [[2, 0, 1]]
    assert prediction.x0 is x0
    alpha, sigma = (value[:, None] for value in module.schedule.alpha_sigma(prediction.t))
    torch.testing.assert_close(prediction.x_t, alpha * x0 + sigma * prediction.eps)


def test_a_run_with_every_option_trains_and_is_built_again(tmp_path):
    module = tiny.ddpm(noise=NoiseSource(0.1, 0.2, MinibatchOT()))
    tiny.train(tmp_path, module, tiny.digits()).save_checkpoint(tmp_path / "run.ckpt")
    noise = type(module).load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True).noise
    assert (noise.offset, noise.perturbation, type(noise.coupling)) == (0.1, 0.2, MinibatchOT)


# ---- refusals


@pytest.mark.parametrize("name", ["offset", "perturbation"])
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_a_deviation_that_is_none_is_refused(name, value):
    with pytest.raises(ValueError, match=f"NoiseSource: {name} must be at least 0 and finite, got"):
        NoiseSource(**{name: value})


def test_minibatch_ot_pairs_in_float32_also_within_autocast():
    x0, eps = torch.randn(2, 16, 5, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        within = MinibatchOT().partners(x0, eps)
    torch.testing.assert_close(within, MinibatchOT().partners(x0, eps))
