import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torchmetrics.image.fid import _compute_fid

from lit_generative.metrics.feature_set import FeatureSet
from lit_generative.metrics.frechet import (
    Frechet,
    FrechetInfinity,
    _drawn_moments,
    bias_warning,
    frechet_bias,
    frechet_distance,
)
from lit_generative.metrics.moments import Moments, moments_of

DIM = 6


def features(n: int, dim: int = DIM, seed: int = 0, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.linspace(1.0, 0.2, dim, dtype=torch.float64).diag() + 0.1
    return torch.randn(n, dim, generator=generator, dtype=torch.float64) @ mixing + shift


def feature_set(x: torch.Tensor) -> FeatureSet:
    return FeatureSet(moments_of(x), x.float())


def test_distance_agrees_with_scipy_and_torchmetrics():
    a, b = moments_of(features(50)), moments_of(features(40, seed=1, shift=0.3))
    root = sqrtm((a.cov @ b.cov).numpy()).real.trace()
    by_hand = float((a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace()) - 2 * float(root)
    assert frechet_distance(a, b) == pytest.approx(by_hand, rel=1e-9)
    assert frechet_distance(a, b) == pytest.approx(float(_compute_fid(a.mean, a.cov, b.mean, b.cov)), rel=1e-9)


def test_distance_of_one_dimensional_gaussians_is_that_of_means_and_deviations():
    a = Moments(9, torch.tensor([1.0]).double(), torch.tensor([[4.0]]).double())
    b = Moments(9, torch.tensor([4.0]).double(), torch.tensor([[25.0]]).double())
    assert frechet_distance(a, b) == pytest.approx(3.0**2 + (5.0 - 2.0) ** 2)


@pytest.mark.parametrize("n", [40, 4])
def test_distance_is_symmetric(n):
    a, b = moments_of(features(50)), moments_of(features(n, seed=1, shift=0.3))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)


@pytest.mark.parametrize("n", [50, 4])
def test_equal_sets_are_at_distance_zero(n):
    a = moments_of(features(n))
    assert 0.0 <= frechet_distance(a, moments_of(features(n).flip(0))) < 1e-12


def test_a_translation_adds_its_squared_length():
    a, b = moments_of(features(50)), moments_of(features(50, shift=0.3))
    assert frechet_distance(a, b) == pytest.approx(DIM * 0.3**2, rel=1e-9)


def test_fewer_samples_than_dimensions_are_exact():
    x, y = features(300, dim=40), features(9, dim=40, seed=1)
    a, b = moments_of(x), moments_of(y)
    singular = torch.linalg.svdvals((y - b.mean) / 8**0.5 @ ((x - a.mean) / 299**0.5).T).sum()
    expected = (a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace() - 2 * singular
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-11)


def test_copies_of_one_image_are_as_far_as_all_variance_and_the_mean():
    a, b = moments_of(features(50)), moments_of(features(1, seed=1).expand(20, DIM))
    expected = float((a.mean - b.mean).square().sum() + a.cov.trace())
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(b, b) < 1e-30


def test_what_is_not_a_number_is_no_perfect_score():
    a, nan = moments_of(features(50)), torch.full((DIM,), float("nan")).double()
    assert frechet_distance(a, Moments(50, nan, a.cov)) != 0.0


def test_the_measure_is_called_fid():
    a, b = feature_set(features(50)), feature_set(features(40, seed=1))
    assert Frechet().compute(a, b) == {"fid": frechet_distance(a.moments, b.moments)}


@pytest.mark.parametrize(("dim", "num_real", "num_fake"), [(6, 100_000, 60), (6, 60, 300), (20, 500, 12)])
def test_the_bias_is_what_a_perfect_generator_scores_on_average(dim, num_real, num_fake):
    real = moments_of(features(num_real, dim))
    predicted = [frechet_bias(real, num_fake, seed) for seed in range(30)]
    reals = [moments_of(features(min(num_real, 4000), dim, seed=3 * k + 1)) for k in range(30)]
    measured = [frechet_distance(r, moments_of(features(num_fake, dim, 3 * k + 2))) for k, r in enumerate(reals)]
    assert sum(predicted) == pytest.approx(sum(measured), rel=0.25)


@pytest.mark.parametrize("count", [4, 12])
def test_drawn_moments_are_spread_as_those_of_samples(count):
    real = moments_of(features(50))
    draw = np.random.default_rng(0)
    drawn = [_drawn_moments(real, count, draw) for _ in range(2000)]
    means, covs = torch.stack([m.mean for m in drawn]), torch.stack([m.cov for m in drawn])
    assert torch.linalg.matrix_rank(covs[0]) == min(count - 1, DIM)
    torch.testing.assert_close(means.T.cov(), real.cov / count, rtol=0.15, atol=0.01)
    torch.testing.assert_close(covs.mean(dim=0), real.cov, rtol=0.1, atol=0.02)
    variance = (real.cov.square() + real.cov.diagonal().outer(real.cov.diagonal())) / (count - 1)  # of a Wishart matrix
    torch.testing.assert_close(covs.var(dim=0), variance, rtol=0.2, atol=0.005)


def test_the_bias_is_reproducible_and_needs_two_images():
    real = moments_of(features(50))
    state = torch.get_rng_state()
    assert frechet_bias(real, 20) == frechet_bias(real, 20) != frechet_bias(real, 20, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="got 1"):
        frechet_bias(real, 1)


def test_only_counts_up_to_the_dimension_are_warned_of():
    real = moments_of(features(50))
    assert bias_warning(real, DIM + 1) is None
    assert f"would score about {frechet_bias(real, DIM):.3g}" in str(bias_warning(real, DIM))


def test_the_extrapolation_is_nearer_the_truth():
    truth = Moments(10**9, torch.zeros(DIM).double(), moments_of(features(200_000)).cov)
    real = FeatureSet(truth)
    fakes = [feature_set(features(400, seed=seed, shift=0.1)) for seed in range(20)]
    plain = sum(Frechet().compute(real, fake)["fid"] for fake in fakes) / 20
    extrapolated = sum(FrechetInfinity().compute(real, fake)["fid_inf"] for fake in fakes) / 20
    assert abs(extrapolated - DIM * 0.01) < 0.5 * abs(plain - DIM * 0.01)


def test_the_extrapolation_is_a_line_through_the_counts_by_hand():
    real, x = feature_set(features(50)), features(40, seed=1).float()
    generator = torch.Generator().manual_seed(7)
    counts = [20, 30, 40]
    y = [
        frechet_distance(real.moments, moments_of(x[torch.randperm(40, generator=generator)[:n]].double()))
        for n in counts
    ]
    t = [1 / n for n in counts]
    slope = sum((a - sum(t) / 3) * b for a, b in zip(t, y, strict=True)) / sum((a - sum(t) / 3) ** 2 for a in t)
    measure = FrechetInfinity(num_points=3, smallest=0.5, seed=7)
    fid_inf = measure.compute(real, feature_set(x.double()))["fid_inf"]
    assert fid_inf == pytest.approx(sum(y) / 3 - slope * sum(t) / 3, rel=1e-9)


def test_the_extrapolation_leaves_the_global_generator_alone():
    real, fake = feature_set(features(50)), feature_set(features(40, seed=1))
    state = torch.get_rng_state()
    assert FrechetInfinity().compute(real, fake) == FrechetInfinity().compute(real, fake)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("arguments", [{"num_points": 1}, {"smallest": 0.0}, {"smallest": 1.0}])
def test_what_is_no_line_is_refused(arguments):
    with pytest.raises(ValueError, match="FrechetInfinity: need num_points"):
        FrechetInfinity(**arguments)


def test_subsets_of_one_image_are_refused():
    with pytest.raises(ValueError, match="got 1 of 19"):
        FrechetInfinity().compute(feature_set(features(50)), feature_set(features(19)))
