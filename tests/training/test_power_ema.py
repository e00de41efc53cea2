import numpy as np
import pytest

from lit_generative.training.power_ema import Profile, combine, gamma_from_sigma_rel, inner_products, live_share

SIGMA_RELS = (0.02, 0.05, 0.1, 0.2, 0.28)


def _shares(profile: Profile, length: int) -> np.ndarray:
    """How much each update weighs, ``(length,)``, by running the average over unit vectors."""
    shares = np.zeros(length)
    for update in range(1, profile.update + 1):
        new = live_share(profile.gamma, update)
        shares *= 1 - new
        shares[update - 1] += new
    return shares


def _stored(length: int, every: int) -> list[Profile]:
    gammas = [gamma_from_sigma_rel(s) for s in (0.05, 0.1)]
    return [Profile(gamma, update) for update in range(every, length + 1, every) for gamma in gammas]


@pytest.mark.parametrize("sigma_rel", SIGMA_RELS)
def test_sigma_rel_is_the_standard_deviation_of_the_profile(sigma_rel):
    gamma, length = gamma_from_sigma_rel(sigma_rel), 20_000
    t = (np.arange(length) + 0.5) / length
    shares = (gamma + 1) * t**gamma / length
    mean = (shares * t).sum()
    np.testing.assert_allclose(np.sqrt((shares * (t - mean) ** 2).sum()), sigma_rel, rtol=1e-4)


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.97), (0.1, 6.94)])
def test_the_exponents_are_those_of_the_paper(sigma_rel, gamma):
    assert round(gamma_from_sigma_rel(sigma_rel), 2) == gamma


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.29, 1.0])
def test_a_width_out_of_range_is_refused(sigma_rel):
    with pytest.raises(ValueError, match=r"sigma_rel must lie between 0 and 0.2887, got"):
        gamma_from_sigma_rel(sigma_rel)


def test_the_first_average_is_the_weights_and_gamma_zero_is_the_mean():
    assert live_share(5.0, 1) == 1
    assert [live_share(0.0, t) for t in (2, 4)] == [1 / 2, 1 / 4]


def test_the_shares_are_the_powers_of_the_docstring():
    gamma, length = gamma_from_sigma_rel(0.1), 9
    t = np.arange(1, length + 1)
    expected = (t ** (gamma + 1) - (t - 1) ** (gamma + 1)) / length ** (gamma + 1)
    np.testing.assert_allclose(_shares(Profile(gamma, length), length), expected, rtol=1e-12)


def test_inner_products_are_those_of_the_shares():
    rows = _stored(12, 4)
    columns = [Profile(gamma_from_sigma_rel(0.15), 7), Profile(gamma_from_sigma_rel(0.05), 12)]
    expected = [[_shares(a, 12) @ _shares(b, 12) for b in columns] for a in rows]
    np.testing.assert_allclose(inner_products(rows, columns), expected, rtol=1e-12)


def test_inner_products_of_long_runs_are_the_papers_integrals():
    """For profiles ``(gamma + 1) * t**gamma / T**(gamma + 1)``, over ``t`` from 0 to the earlier end."""
    a, b = Profile(gamma_from_sigma_rel(0.05), 40_000), Profile(gamma_from_sigma_rel(0.1), 50_000)
    n, m = a.gamma + 1, b.gamma + 1
    expected = n * m / (n + m - 1) * 40_000 ** (n + m - 1.0) / (40_000.0**n * 50_000.0**m)
    np.testing.assert_allclose(inner_products([a], [b])[0, 0], expected, rtol=1e-4)


def test_inner_products_of_narrow_profiles_far_apart_do_not_overflow():
    gamma = gamma_from_sigma_rel(0.005)
    products = inner_products([Profile(gamma, 10), Profile(gamma, 1_000_000)], [Profile(gamma, 1_000_000)])
    assert np.isfinite(products).all()
    assert products[0, 0] < 1e-100 < products[1, 0]


def test_a_stored_profile_is_combined_exactly():
    stored = _stored(50, 10)
    weights, error = combine(stored, stored[3])
    assert error == 0
    np.testing.assert_array_equal(weights, np.eye(len(stored))[3])


@pytest.mark.parametrize("sigma_rel", [0.04, 0.07, 0.12, 0.2])
def test_the_error_is_that_of_the_combined_shares_and_no_other_weights_are_better(sigma_rel):
    stored, target = _stored(60, 5), Profile(gamma_from_sigma_rel(sigma_rel), 60)
    weights, error = combine(stored, target)
    wanted = _shares(target, 60)
    basis = np.stack([_shares(profile, 60) for profile in stored])

    def distance(w):
        return np.linalg.norm(w @ basis - wanted) / np.linalg.norm(wanted)

    assert error < 0.05
    np.testing.assert_allclose(error, distance(weights), rtol=1e-6)
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-12)
    rng = np.random.default_rng(0)
    for _ in range(20):
        change = rng.normal(size=len(weights)) * 1e-3
        assert distance(weights + change - change.mean()) > error


def test_more_snapshots_make_a_smaller_error():
    target = Profile(gamma_from_sigma_rel(0.08), 600)
    errors = [combine(_stored(600, every), target)[1] for every in (300, 100, 30, 10)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3 < errors[0]
