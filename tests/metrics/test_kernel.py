import statistics

import pytest
import torch

from lit_generative.metrics import kernel
from lit_generative.metrics.feature_set import FeatureSet
from lit_generative.metrics.kernel import Kernel, kernel_distance
from lit_generative.metrics.measures import choose_rows
from lit_generative.metrics.moments import moments_of


def features(n: int, seed: int = 0, shift: float = 0.0, dim: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, dim, generator=generator, dtype=torch.float64) + shift


def feature_set(x: torch.Tensor) -> FeatureSet:
    return FeatureSet(moments_of(x), x.float())


def by_hand(x: torch.Tensor, y: torch.Tensor) -> float:
    """All pairs one by one, without an image and itself."""

    def k(a, b):
        return (float(a @ b) / len(a) + 1) ** 3

    n, m = len(x), len(y)
    xx = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j)
    yy = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j)
    xy = sum(k(a, b) for a in x for b in y)
    return xx / (n * (n - 1)) + yy / (m * (m - 1)) - 2 * xy / (n * m)


def jackknife(x: torch.Tensor, y: torch.Tensor) -> float:
    """Each image left out in turn."""
    variance = 0.0
    for size, without in (
        (len(x), [by_hand(torch.cat([x[:i], x[i + 1 :]]), y) for i in range(len(x))]),
        (len(y), [by_hand(x, torch.cat([y[:i], y[i + 1 :]])) for i in range(len(y))]),
    ):
        variance += (size - 1) * statistics.pvariance(without)
    return variance**0.5


@pytest.mark.parametrize("block", [3, 128])
def test_distance_and_error_are_those_of_all_pairs_by_hand(monkeypatch, block):
    monkeypatch.setattr(kernel, "BLOCK", block)
    x, y = features(8), features(10, seed=1, shift=0.4)
    value, error = kernel_distance(x, y)
    assert value == pytest.approx(by_hand(x, y), rel=1e-12)
    assert error == pytest.approx(jackknife(x, y), rel=1e-10)


def test_distance_of_orthogonal_points_by_hand():
    x, y = torch.eye(3, 4).double(), torch.eye(3, 4).double() * 3
    # within x: 1; within y: 1; between: 3 of 9 pairs are (3/4 + 1)^3, the others 1
    assert kernel_distance(x, y)[0] == pytest.approx(1 + 1 - 2 * (3 * 1.75**3 + 6) / 9)


def test_distance_is_symmetric():
    x, y = features(8), features(10, seed=1, shift=0.4)
    assert kernel_distance(x, y) == pytest.approx(kernel_distance(y, x), rel=1e-12)


def test_equal_distributions_score_zero_on_average_and_the_error_is_their_spread():
    pairs = [kernel_distance(features(60, 2 * k), features(40, 2 * k + 1)) for k in range(200)]
    scores, errors = zip(*pairs, strict=True)
    spread = statistics.stdev(scores)
    assert abs(statistics.mean(scores)) < 3 * spread / 200**0.5
    assert any(score < 0 for score in scores)
    assert spread < statistics.mean(e**2 for e in errors) ** 0.5 < 2 * spread


def test_the_error_is_the_spread_where_distributions_differ():
    pairs = [kernel_distance(features(60, 2 * k, shift=0.5), features(40, 2 * k + 1)) for k in range(200)]
    spread = statistics.stdev(score for score, _ in pairs)
    assert statistics.mean(error**2 for _, error in pairs) ** 0.5 == pytest.approx(spread, rel=0.2)


def test_fewer_images_do_not_raise_the_score_on_average():
    few = [kernel_distance(features(5, 2 * k, shift=0.5), features(5, 2 * k + 1))[0] for k in range(600)]
    many = [kernel_distance(features(100, 2 * k, shift=0.5), features(100, 2 * k + 1))[0] for k in range(60)]
    standard_error = statistics.stdev(few) / len(few) ** 0.5
    assert abs(statistics.mean(few) - statistics.mean(many)) < 3 * standard_error


def test_the_measure_scores_the_features():
    real, fake = feature_set(features(8)), feature_set(features(10, seed=1))
    value, error = kernel_distance(real.embedding.double(), fake.embedding.double())
    assert Kernel().compute(real, fake) == {"kid": value, "kid_se": error}


def test_more_images_than_allowed_are_drawn_from():
    real, fake = feature_set(features(8)), feature_set(features(10, seed=1))
    x, y = (choose_rows(data.embedding, 5).double() for data in (real, fake))
    assert Kernel(max_samples=5).compute(real, fake)["kid"] == kernel_distance(x, y)[0]


def test_fewer_than_three_images_are_refused():
    with pytest.raises(ValueError, match="max_samples must be at least 3, got 2"):
        Kernel(max_samples=2)
    with pytest.raises(ValueError, match="at least 3 images in each set, got 8 and 2"):
        Kernel().compute(feature_set(features(8)), feature_set(features(2)))
