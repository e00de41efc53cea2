import math

import pytest
import torch
from torch.nn import functional as F

from lit_generative.metrics.feature_set import FeatureSet
from lit_generative.metrics.mode_coverage import ModeCoverage, mixture_coverage, mode_counts
from lit_generative.metrics.moments import moments_of

MOMENTS = moments_of(torch.eye(3, 2))


def called(*labels: int) -> FeatureSet:
    return FeatureSet(MOMENTS, logits=F.one_hot(torch.tensor(labels), 4).float())


def test_images_are_counted_by_class():
    assert mode_counts(called(2, 0, 2, 2).logits).tolist() == [1, 0, 3, 0]


def test_modes_and_divergence_by_hand():
    scores = ModeCoverage().compute(called(0, 1, 2, 3), called(0, 0, 0, 1))
    assert scores == pytest.approx({"modes": 2.0, "mode_kl": 0.75 * math.log(3.0)})


def test_the_divergence_agrees_with_torch():
    real, fake = called(0, 0, 1, 2, 3, 3), called(0, 1, 1, 2, 3)
    p, q = (torch.distributions.Categorical(mode_counts(x.logits).double()) for x in (fake, real))
    expected = float(torch.distributions.kl_divergence(p, q))
    assert ModeCoverage().compute(real, fake)["mode_kl"] == pytest.approx(expected)


def test_equal_shares_diverge_by_nothing():
    assert ModeCoverage().compute(called(0, 1, 1), called(1, 0, 1, 0, 1, 1)) == {"modes": 2.0, "mode_kl": 0.0}


def test_a_collapsed_model_draws_one_mode():
    scores = ModeCoverage().compute(called(0, 1, 2, 3), called(2, 2, 2))
    assert scores == pytest.approx({"modes": 1.0, "mode_kl": math.log(4.0)})


def test_a_class_that_the_data_has_not_is_infinitely_far():
    assert ModeCoverage().compute(called(0, 1), called(0, 3))["mode_kl"] == math.inf


def test_a_class_counts_as_drawn_from_the_least_count_on():
    drawn = called(0, 0, 0, 1, 1, 2)
    assert [ModeCoverage(min_count=n).compute(drawn, drawn)["modes"] for n in (1, 2, 3, 4)] == [3.0, 2.0, 1.0, 0.0]


def test_a_least_count_below_one_is_refused():
    with pytest.raises(ValueError, match="min_count must be at least 1, got 0"):
        ModeCoverage(min_count=0)


def ring(num_modes: int = 8) -> torch.Tensor:
    angles = torch.arange(num_modes) * (2 * torch.pi / num_modes)
    return torch.stack([angles.cos(), angles.sin()], dim=1).double()


def test_points_of_the_mixture_itself_reach_its_ceiling():
    generator = torch.Generator().manual_seed(0)
    centers = ring()
    points = centers[torch.arange(200_000) % 8] + 0.01 * torch.randn(200_000, 2, generator=generator)
    found = mixture_coverage(points, centers, 0.01)
    assert found["modes"] == 8
    assert found["high_quality"] == pytest.approx(1 - math.exp(-4.5), abs=1e-3)
    assert found["reverse_kl"] == pytest.approx(0, abs=1e-12)


def test_coverage_by_hand():
    centers = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    # Three at the first mean, one just within its reach; one just outside the second's.
    points = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.29, 0.0], [1.0, 0.31]])
    found = mixture_coverage(points, centers, std=0.1)
    assert found["modes"] == 1
    assert found["high_quality"] == 0.75
    assert found["reverse_kl"] == pytest.approx(0.75 * math.log(3) + 0.25 * math.log(1))


def test_a_collapsed_generator_has_the_largest_divergence():
    found = mixture_coverage(ring()[:1].expand(100, 2), ring(), 0.01)
    assert (found["modes"], found["high_quality"]) == (1, 1)
    assert found["reverse_kl"] == pytest.approx(math.log(8))


def test_points_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="must be finite"):
        mixture_coverage(torch.tensor([[float("nan"), 0.0]]), ring(), 0.01)
