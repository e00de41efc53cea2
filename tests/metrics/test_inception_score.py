import math

import pytest
import torch
from torch_fidelity.metric_isc import isc_features_to_metric

from lit_generative.metrics.feature_set import FeatureSet
from lit_generative.metrics.inception_score import InceptionScore, inception_score
from lit_generative.metrics.moments import moments_of

NO_IMAGES = FeatureSet(moments_of(torch.eye(3, 2)))


def logits(n: int, num_classes: int = 7) -> torch.Tensor:
    return 2 * torch.randn(n, num_classes, generator=torch.Generator().manual_seed(0))


def score(x: torch.Tensor, **options) -> dict[str, float]:
    return InceptionScore(**options).compute(NO_IMAGES, FeatureSet(NO_IMAGES.moments, logits=x))


@pytest.mark.parametrize("n", [100, 97, 13])
def test_score_and_spread_are_those_of_torch_fidelity(n):
    expected = isc_features_to_metric(logits(n), splits=10, shuffle=False)
    assert score(logits(n)) == pytest.approx(
        {"is": expected["inception_score_mean"], "is_std": expected["inception_score_std"]}, rel=1e-12
    )


def test_sure_and_even_predictions_score_the_number_of_classes():
    assert inception_score(1000.0 * torch.eye(7).repeat(3, 1)) == pytest.approx(7.0, rel=1e-12)


def test_equal_predictions_score_one():
    assert inception_score(logits(1).expand(9, 7)) == pytest.approx(1.0, rel=1e-12)


def test_two_images_by_hand():
    p = torch.tensor([[0.9, 0.1], [0.5, 0.5]], dtype=torch.float64)
    marginal = [0.7, 0.3]
    kl = [sum(q * math.log(q / m) for q, m in zip(row.tolist(), marginal, strict=True)) for row in p]
    assert inception_score(p.log()) == pytest.approx(math.exp(sum(kl) / 2), rel=1e-12)


def test_one_part_has_no_spread():
    assert score(logits(20), splits=1) == {"is": inception_score(logits(20)), "is_std": 0.0}


def test_parts_without_images_are_refused():
    with pytest.raises(ValueError, match="splits must be at least 1, got 0"):
        InceptionScore(splits=0)
    with pytest.raises(ValueError, match="at least 10 images, one for each part, got 9"):
        score(logits(9))
