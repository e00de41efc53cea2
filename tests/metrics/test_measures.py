import pytest
import torch

from lit_generative.metrics.feature_set import FeatureSet
from lit_generative.metrics.frechet import Frechet
from lit_generative.metrics.kernel import Kernel
from lit_generative.metrics.measures import choose_rows, compute_scores, describe_measures, embedding_of, logits_of
from lit_generative.metrics.moments import moments_of

DATA = FeatureSet(moments_of(torch.eye(3, 2)))


def test_few_rows_are_all_chosen():
    x = torch.randn(5, 2)
    assert choose_rows(x, 5) is x


def test_chosen_rows_are_different_ones_and_always_the_same():
    x = torch.arange(100.0).unsqueeze(1)
    state = torch.get_rng_state()
    chosen = choose_rows(x, 30)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(chosen.unique()) == 30
    assert torch.equal(choose_rows(x, 30), chosen)
    assert not torch.equal(choose_rows(x, 30, seed=1), chosen)


def test_chosen_rows_come_from_all_parts():
    chosen = choose_rows(torch.arange(1000.0).unsqueeze(1), 100)
    assert float(chosen.mean()) == pytest.approx(500.0, abs=100.0)


def test_scores_of_all_measures_are_together():
    x = torch.randn(9, 2, generator=torch.Generator().manual_seed(0))
    data = FeatureSet(moments_of(x), x)
    scores = compute_scores([Frechet(), Kernel()], data, data)
    assert scores == {**Frechet().compute(data, data), **Kernel().compute(data, data)}


def test_measures_are_described_by_name_and_settings():
    described = describe_measures([Frechet(), Kernel(max_samples=7)])
    assert described == {"Frechet": {}, "Kernel": {"max_samples": 7}}


def test_what_was_not_kept_is_missed_with_the_name_of_the_measure():
    with pytest.raises(ValueError, match="Kernel: needs the single features"):
        embedding_of(DATA, "Kernel")
    with pytest.raises(ValueError, match="ModeCoverage: needs class logits"):
        logits_of(DATA, "ModeCoverage")
