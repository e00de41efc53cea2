"""The parts of a KL term, and the discrepancy of codes from the prior: by hand, and what they sum to."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from lit_generative.vae.objectives import Draws
from lit_generative.vae.regularizers import InfoVAE, TotalCorrelation, mean_discrepancy
from tests import families
from tests.vae.linear_gaussian import LinearGaussian, two_examples_with_draws


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (1.0, 6.0, 1.0), (0.0, 2.0, 0.5)])
def test_the_parts_of_the_kl_sum_to_it_and_are_weighed(weights):
    torch.manual_seed(0)
    model = LinearGaussian()
    draws = model.draws(*model.posterior(), num_draws=3)
    objective = TotalCorrelation(50, *weights)
    parts = objective.terms(draws)
    names = ["mutual_information", "total_correlation", "dimension_kl"]
    assert list(parts) == names
    torch.testing.assert_close(sum(parts.values()), (draws.log_posterior - draws.log_prior).mean(dim=0))
    weighed = sum(weight * parts[name] for weight, name in zip(weights, names, strict=True))
    torch.testing.assert_close(objective.loss(draws), weighed - draws.log_likelihood.mean(dim=0))


def test_total_correlation_by_hand():
    # Two examples, two dimensions, unit variances; one draw each, at the means.
    mean = torch.tensor([[0.0, 0.0], [2.0, 2.0]], dtype=torch.float64)
    draws = Draws(torch.zeros(1, 2, dtype=torch.float64), mean[None], mean, torch.zeros_like(mean))
    parts = TotalCorrelation(dataset_size=10).terms(draws)
    phi = 1 / math.sqrt(2 * math.pi)
    one = math.log(phi * (1 + math.exp(-2)) / 20)  # a dimension: the other example is two away
    both = math.log(phi**2 * (1 + math.exp(-4)) / 20)
    torch.testing.assert_close(parts["total_correlation"], torch.full((2,), both - 2 * one, dtype=torch.float64))
    expected = torch.full((2,), 2 * math.log(phi) - both, dtype=torch.float64)
    torch.testing.assert_close(parts["mutual_information"], expected)


def test_the_discrepancy_by_hand_and_its_weights():
    first = torch.tensor([[0.0], [1.0], [3.0]], dtype=torch.float64)
    second = torch.tensor([[0.0], [2.0]], dtype=torch.float64)
    k = lambda distance: math.exp(-(distance**2) / 2)  # noqa: E731
    expected = (k(1) + k(3) + k(2)) / 3 + k(2) - 2 * (k(0) + k(2) + k(1) + k(1) + k(3) + k(1)) / 6
    assert float(mean_discrepancy(first, second, scale=2.0)) == pytest.approx(expected)
    torch.manual_seed(0)
    draws = two_examples_with_draws()
    torch.manual_seed(1)
    mmd = InfoVAE().terms(draws)["mmd"]
    torch.manual_seed(1)
    loss = InfoVAE(alpha=0.5, lambda_=10.0).loss(draws)
    torch.testing.assert_close(loss, 0.5 * draws.kl + 9.5 * mmd - draws.log_likelihood.mean(dim=0))


def test_the_discrepancy_of_equal_distributions_is_zero_on_average_and_of_others_not():
    generator = torch.Generator().manual_seed(0)
    rows = lambda shift: torch.randn(40, 3, generator=generator) + shift  # noqa: E731
    same = torch.stack([mean_discrepancy(rows(0.0), rows(0.0), 3.0) for _ in range(300)])
    assert abs(float(same.mean())) < 4 * float(same.std()) / math.sqrt(300)
    assert float(mean_discrepancy(rows(0.0), rows(1.0), 3.0)) > 5 * float(same.std())


def test_a_last_batch_of_one_image_is_scored_without_the_discrepancy_and_not_trained_on(tmp_path):
    module, data = families.build("vae", objective=InfoVAE()), families.digits(eval_batch_size=179)  # of 180
    (found,) = families.trainer(tmp_path).test(module, data, verbose=False)
    assert math.isfinite(found["test/loss"])
    draws = two_examples_with_draws()
    single = dataclasses.replace(draws, mean=draws.mean[:1], z=draws.z[:1, :1])
    with torch.no_grad():
        assert InfoVAE().terms(single)["mmd"].tolist() == [0.0]
    with pytest.raises(ValueError, match="InfoVAE: the discrepancy needs at least two codes, got a batch of 1"):
        InfoVAE().terms(single)
