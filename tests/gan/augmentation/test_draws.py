import math

import pytest
import torch

from lit_generative.gan.augmentation.draws import Draws


@pytest.fixture
def draws():
    torch.manual_seed(0)
    return Draws(torch.zeros(40_000, 1, dtype=torch.float64), torch.tensor(0.3))


def test_each_draw_has_its_distribution(draws):
    uniform = draws.uniform(-1, 3)
    assert -1 <= float(uniform.min()) < -0.99
    assert 2.99 < float(uniform.max()) < 3
    assert float(draws.normal(0.2).std()) == pytest.approx(0.2, rel=0.02)
    assert float(draws.power_of_two(0.5).log().std()) == pytest.approx(0.5 * math.log(2), rel=0.02)
    shares = draws.integers(4).long().bincount() / 40_000
    torch.testing.assert_close(shares, torch.full((4,), 0.25), rtol=0, atol=0.01)


def test_an_operation_acts_with_the_probability_of_the_batch_or_its_own(draws):
    assert float(draws.acts().double().mean()) == pytest.approx(0.3, abs=0.01)
    assert float(draws.acts(torch.tensor(0.7)).double().mean()) == pytest.approx(0.7, abs=0.01)
    assert not draws.acts(torch.tensor(0.0)).any()
    assert draws.acts(torch.tensor(1.0)).all()


def test_draws_are_of_the_dtype_of_the_batch(draws):
    for values in (draws.uniform(0, 1), draws.normal(1.0), draws.power_of_two(1.0), draws.integers(2)):
        assert (values.dtype, values.shape) == (torch.float64, (40_000,))
