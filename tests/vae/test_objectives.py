import itertools
import math
from dataclasses import replace

import pytest
import torch

from lit_generative.vae.objectives import Capacity, Draws, Elbo, ImportanceWeighted, Objective, importance_bound
from lit_generative.vae.priors import GaussianMixturePrior, VampPrior
from lit_generative.vae.regularizers import InfoVAE, TotalCorrelation, mean_discrepancy
from tests.vae.linear_gaussian import LinearGaussian, two_examples, two_examples_with_draws

BOUNDS = {
    "Elbo": Elbo(),
    "IWAE": ImportanceWeighted(num_draws=5),
    "DReG": ImportanceWeighted(num_draws=5, doubly_reparameterized=True),
}
every_bound = pytest.mark.parametrize("objective", BOUNDS.values(), ids=BOUNDS.keys())
EVERY = [*BOUNDS.values(), Elbo(free_bits=0.1), Capacity(), TotalCorrelation(dataset_size=50), InfoVAE()]


# ---- laws


@every_bound
def test_the_bound_is_below_the_evidence(objective):
    torch.manual_seed(0)
    model = LinearGaussian()
    mean, logvar = model.posterior()
    for wrong_mean, wrong_logvar in ((mean + 0.5, logvar), (mean, logvar + 1), (torch.zeros_like(mean), logvar - 1)):
        losses = [objective.loss(model.draws(wrong_mean, wrong_logvar, objective.num_draws)) for _ in range(2000)]
        assert losses[0].shape == (5,)
        error = torch.stack(losses).std(dim=0) / math.sqrt(2000)
        assert (-torch.stack(losses).mean(dim=0) < model.log_evidence - 2 * error).all()


@every_bound
def test_the_bound_is_the_evidence_at_the_true_posterior(objective):
    torch.manual_seed(0)
    model = LinearGaussian()
    loss = objective.loss(model.draws(*model.posterior(), num_draws=50_000))
    torch.testing.assert_close(-loss, model.log_evidence, rtol=0, atol=0.03)


def test_every_draw_from_the_true_posterior_gives_the_evidence():
    torch.manual_seed(0)
    model = LinearGaussian()
    draws = model.draws(*model.posterior(), num_draws=4)
    evidence = draws.log_likelihood + draws.log_prior - draws.log_posterior  # Bayes' rule
    torch.testing.assert_close(evidence, model.log_evidence.expand(4, 5))


def test_every_objective_is_among_the_examples():
    ours = {cls for cls in all_subclasses(Objective) if cls.__module__.startswith("lit_generative.")}
    assert ours == {type(objective) for objective in EVERY}


def all_subclasses(cls: type) -> set[type]:
    return {cls, *(leaf for child in cls.__subclasses__() for leaf in all_subclasses(child))} - {Objective}


@pytest.mark.parametrize("objective", EVERY, ids=lambda objective: type(objective).__name__)
def test_an_objective_and_its_terms_are_one_value_an_example_with_gradients_to_the_posterior(objective):
    model = LinearGaussian()
    mean, logvar = (value.clone().requires_grad_() for value in model.posterior())
    draws = model.draws(mean + 0.3, logvar, num_draws=3)
    loss = objective.loss(draws)
    assert all(value.shape == (5,) for value in (loss, *objective.terms(draws).values()))
    gradients = torch.autograd.grad(loss.mean(), [mean, logvar])
    assert all(gradient.isfinite().all() and gradient.abs().max() > 0 for gradient in gradients)


@pytest.mark.parametrize("objective", [o for o in EVERY if not isinstance(o, InfoVAE)], ids=lambda o: type(o).__name__)
def test_without_the_weight_of_the_kl_term_the_likelihood_is_left(objective):
    model = LinearGaussian()
    draws = replace(model.draws(*model.posterior(), num_draws=1), kl_weight=0.0)
    torch.testing.assert_close(objective.loss(draws), -draws.log_likelihood.mean(dim=0))


def test_the_bounds_rise_with_the_number_of_draws_to_the_evidence():
    torch.manual_seed(0)
    model = LinearGaussian()
    mean, logvar = model.posterior()
    wrong = mean + 0.4, logvar + 0.5
    elbo = -Elbo().loss(model.draws(*wrong, num_draws=20_000)).mean()
    bounds = []
    for num_draws in (1, 5, 10, 50, 100, 1000):  # each a mean over many estimates
        weights = model.draws(*wrong, num_draws=num_draws * 2000 if num_draws < 100 else num_draws * 200).log_weight
        bounds.append(importance_bound(weights.unflatten(0, (num_draws, -1)).flatten(1)).mean())
    evidence = model.log_evidence.mean()
    assert abs(float(bounds[0] - elbo)) < 0.05
    assert all(lower < higher for lower, higher in itertools.pairwise(bounds))
    assert all(bound < evidence + 0.002 for bound in bounds)
    assert float(evidence - bounds[-1]) < 0.01
    five_thousand = importance_bound(model.draws(*wrong, num_draws=5000).log_weight).mean()
    torch.testing.assert_close(five_thousand, evidence, rtol=0, atol=0.01)


def gradients(objective: Objective, num: int) -> list[torch.Tensor]:
    """The encoder's gradient, many times."""
    model, found = LinearGaussian(num=1), []
    mean, logvar = (value.clone().requires_grad_() for value in model.posterior())
    for _ in range(num):
        loss = objective.loss(model.draws(mean + 0.4, logvar + 0.5, objective.num_draws))
        found.append(torch.cat(torch.autograd.grad(loss.sum(), [mean, logvar]), dim=1))
    return found


def test_the_doubly_reparameterized_gradient_has_the_same_mean_and_less_variance():
    torch.manual_seed(0)
    plain, double = (torch.cat(gradients(ImportanceWeighted(20, way), 1500)) for way in (False, True))
    error = ((plain.var(dim=0) + double.var(dim=0)) / 1500).sqrt()
    assert ((plain.mean(dim=0) - double.mean(dim=0)).abs() < 4 * error).all()
    assert (plain.mean(dim=0).abs() > 5 * error).any()  # there is something to agree on
    assert (double.var(dim=0) < 0.5 * plain.var(dim=0)).all()


@pytest.mark.parametrize("way", [False, True])
def test_the_decoders_gradient_weighs_each_draw_by_its_share(way):
    log_likelihood = torch.tensor([[0.0], [1.0], [3.0]], dtype=torch.float64, requires_grad=True)
    zeros = torch.zeros(3, 1, 2, dtype=torch.float64)
    draws = Draws(log_likelihood, zeros, zeros[0], zeros[0])
    ImportanceWeighted(3, way).loss(draws).sum().backward()
    torch.testing.assert_close(-log_likelihood.grad, log_likelihood.detach().softmax(dim=0))


# ---- values


def test_terms_of_draws_by_hand():
    z, mean, logvar = torch.tensor([[[2.0]], [[0.0]]]), torch.tensor([[1.0]]), torch.tensor([[4.0]]).log()
    draws, constant = Draws(torch.zeros(2, 1), z, mean, logvar), 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(draws.log_prior, torch.tensor([[-2.0], [0.0]]) - constant)
    torch.testing.assert_close(draws.log_posterior, torch.full((2, 1), -0.125 - math.log(2) - constant))
    torch.testing.assert_close(draws.kl, torch.tensor([0.5 * (1 + 4 - 1) - math.log(2)]))


@pytest.mark.parametrize(("beta", "expected"), [(1.0, [3.5, 34.0]), (4.0, [5.0, 46.0]), (0.0, [3.0, 30.0])])
def test_elbo_by_hand(beta, expected):
    torch.testing.assert_close(Elbo(beta=beta).loss(two_examples()), torch.tensor(expected))


def test_elbo_is_the_bound_itself_with_one_draw_by_default():
    torch.testing.assert_close(Elbo().loss(two_examples()), Elbo(beta=1.0).loss(two_examples()))
    assert Elbo().num_draws == 1


def test_a_negative_beta_is_refused():
    with pytest.raises(ValueError, match="Elbo: beta must not be negative, got -1"):
        Elbo(beta=-1.0)


@pytest.mark.parametrize(("free_bits", "kl"), [(0.25, [0.5, 4.0]), (1.2, [0.5 + 1.2, 2.0 + 1.2]), (3.0, [6.0, 6.0])])
def test_free_bits_by_hand(free_bits, kl):
    # KL of the dimensions: 0.5, 0 and 2, 2; their means over the batch: 1.25 and 1.
    expected = torch.tensor(kl) + torch.tensor([3.0, 30.0])
    torch.testing.assert_close(Elbo(free_bits=free_bits).loss(two_examples()), expected)


@pytest.mark.parametrize(("capacity", "kl"), [(None, [1.5, 2.0]), (3.0, [2.5, 1.0])])
def test_capacity_by_hand(capacity, kl):
    draws = replace(two_examples(), capacity=capacity)
    expected = 10 * torch.tensor(kl) + torch.tensor([3.0, 30.0])
    torch.testing.assert_close(Capacity(gamma=10.0, capacity=2.0).loss(draws), expected)


def test_importance_weighted_by_hand():
    zeros = torch.zeros(2, 1, 1)
    draws = Draws(torch.tensor([[math.log(0.2)], [math.log(0.6)]]), zeros, zeros[0], zeros[0])
    torch.testing.assert_close(ImportanceWeighted(2).loss(draws), torch.tensor([-math.log(0.4)]))
    torch.testing.assert_close(ImportanceWeighted(2).terms(draws)["iwae"], torch.tensor([math.log(0.4)]))


@pytest.mark.parametrize("prior", [GaussianMixturePrior(2, 3), VampPrior((2,), 3)], ids=lambda p: type(p).__name__)
def test_a_prior_without_a_closed_form_gives_the_kl_of_the_draws_and_refuses_what_needs_one(prior):
    draws = replace(two_examples_with_draws(), prior=prior, encoder=lambda x: (x, 0.1 * x))
    torch.testing.assert_close(draws.kl, (draws.log_posterior - draws.log_prior).mean(dim=0))
    with pytest.raises(ValueError, match=f"free_bits=0.5 needs the KL of each dimension, which {type(prior).__name__}"):
        Elbo(free_bits=0.5).loss(draws)
    with pytest.raises(ValueError, match=f"needs a prior of independent dimensions, got {type(prior).__name__}"):
        TotalCorrelation(10).loss(draws)


def test_draws_without_an_encoder_say_so():
    with pytest.raises(ValueError, match="this prior asks the encoder"):
        _ = replace(two_examples_with_draws(), prior=VampPrior((2,), 3)).kl


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Elbo(free_bits=-0.1), "Elbo: free_bits must not be negative, got -0.1"),
        (lambda: Elbo(beta=math.nan), "Elbo: beta must not be negative, got nan"),
        (lambda: Elbo(free_bits=math.inf), "Elbo: free_bits must not be negative, got inf"),
        (lambda: Capacity(gamma=math.nan), "Capacity: gamma must be positive"),
        (lambda: Capacity(capacity=math.nan), "Capacity: capacity must not be negative"),
        (lambda: TotalCorrelation(5, gamma=math.nan), "TotalCorrelation: gamma must not be negative"),
        (lambda: InfoVAE(alpha=math.nan), "InfoVAE: alpha must be at most 1"),
        (lambda: InfoVAE(lambda_=math.nan), "InfoVAE: alpha \\+ lambda_ must be at least 1"),
        (lambda: InfoVAE(bandwidth=math.nan), "InfoVAE: bandwidth must be positive"),
        (lambda: Elbo(num_draws=0), "Elbo: num_draws must be at least 1, got 0"),
        (lambda: ImportanceWeighted(0), "ImportanceWeighted: num_draws must be at least 1, got 0"),
        (lambda: Capacity(gamma=0.0), "Capacity: gamma must be positive"),
        (lambda: Capacity(capacity=-1.0), "Capacity: capacity must not be negative"),
        (lambda: TotalCorrelation(0), "TotalCorrelation: dataset_size must be at least 1"),
        (lambda: TotalCorrelation(5, beta=-1.0), "TotalCorrelation: beta must not be negative"),
        (lambda: InfoVAE(alpha=1.5), "InfoVAE: alpha must be at most 1"),
        (lambda: InfoVAE(alpha=0.0, lambda_=0.5), r"InfoVAE: alpha \+ lambda_ must be at least 1"),
        (lambda: InfoVAE(bandwidth=0.0), "InfoVAE: bandwidth must be positive"),
        (lambda: mean_discrepancy(torch.zeros(1, 2), torch.zeros(3, 2), 1.0), "at least two rows a side, got 1 and 3"),
    ],
)
def test_bad_numbers_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
