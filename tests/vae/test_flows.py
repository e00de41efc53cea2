"""Each flow's change of volume is its Jacobian's, and the bound stays below the evidence with a flow, too."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.autograd.functional import jacobian

from lit_generative.vae.distributions import normal_log_prob, reparameterize
from lit_generative.vae.flows import Flow, InverseAutoregressiveFlow
from lit_generative.vae.likelihoods import Gaussian
from lit_generative.vae.objectives import BaseDraws, Draws, Elbo, ImportanceWeighted, importance_bound
from lit_generative.vae.regularizers import InfoVAE, TotalCorrelation
from tests.vae.linear_gaussian import LinearGaussian, two_examples_with_draws


def iaf(latent_dim: int = 4, num_steps: int = 3, hidden_dim: int = 7) -> InverseAutoregressiveFlow:
    """One far from the identity, in float64."""
    torch.manual_seed(0)
    flow = InverseAutoregressiveFlow(latent_dim, hidden_dim, num_steps).double()
    for p in flow.parameters():
        p.data.add_(torch.randn_like(p))
    return flow


def draws(model: LinearGaussian, flow: Flow, mean: Tensor, logvar: Tensor, num_draws: int) -> Draws:
    """As ``LinearGaussian.draws``, behind a flow."""
    z0 = reparameterize(mean, logvar, num_draws)
    z, log_det = flow(z0)
    output = z @ model.weight.T + model.bias
    log_likelihood = Gaussian(model.sigma).log_prob(output.flatten(0, 1), model.x.expand_as(output).flatten(0, 1))
    return Draws(log_likelihood.unflatten(0, output.shape[:2]), z, mean, logvar, base=BaseDraws(z0, log_det))


def inverse(flow: InverseAutoregressiveFlow, z: Tensor) -> Tensor:
    """Dimension after dimension: a dimension of ``z`` is right once those before it are."""
    for step in reversed(flow.steps):
        z0 = torch.zeros_like(z)
        for _ in range(z.shape[-1]):
            m, s = step.output(torch.nn.functional.elu(step.hidden(z0))).chunk(2, dim=-1)
            z0 = m + (z - m) * (1 + (-s).exp())
        z = z0
    return z


# ---- laws


FLOWS = [iaf(), iaf(latent_dim=1), iaf(latent_dim=2, num_steps=1), iaf(latent_dim=5, num_steps=4, hidden_dim=4)]
every_flow = pytest.mark.parametrize("flow", FLOWS, ids=lambda flow: f"{type(flow).__name__}-{flow.latent_dim}")


def test_every_flow_is_among_the_examples():
    assert {type(flow) for flow in FLOWS} == set(Flow.__subclasses__())


@every_flow
def test_the_log_determinant_is_the_jacobians(flow):
    z0 = 2 * torch.randn(3, 6, flow.latent_dim, dtype=torch.float64)
    z, log_det = flow(z0)
    assert z.shape == z0.shape
    assert log_det.shape == (3, 6)
    each = [jacobian(lambda one: flow(one[None, None])[0][0, 0], one) for one in z0.flatten(0, 1)]
    expected = torch.linalg.slogdet(torch.stack(each)).logabsdet
    torch.testing.assert_close(log_det.flatten(), expected)
    assert flow.latent_dim == 1 or expected.std() > 0.1  # not the same everywhere


@every_flow
def test_a_draw_is_moved_alone(flow):
    z0 = torch.randn(3, 6, flow.latent_dim, dtype=torch.float64)
    z, log_det = flow(z0)
    alone, change = flow(z0[1:2, 4:5])
    torch.testing.assert_close((alone[0, 0], change[0, 0]), (z[1, 4], log_det[1, 4]))


@pytest.mark.parametrize("hidden_dim", [3, 9])
def test_each_step_reads_the_dimensions_before_and_the_next_step_those_after(hidden_dim):
    flow = iaf(latent_dim=4, num_steps=3, hidden_dim=hidden_dim)
    for i, step in enumerate(flow.steps):
        matrix = jacobian(lambda z, step=step: step(z)[0], torch.randn(4, dtype=torch.float64))
        read = torch.ones(4, 4).tril(-1).bool() if i % 2 == 0 else torch.ones(4, 4).triu(1).bool()
        assert ((matrix != 0) == (read | torch.eye(4).bool())).all(), (i, matrix)
        assert (matrix.diagonal() > 0).all()
        assert step.output.mask.any(dim=0).all()  # no unit in vain


@pytest.mark.parametrize("latent_dim", [1, 2])
def test_the_density_behind_a_flow_integrates_to_one(latent_dim):
    flow = iaf(latent_dim, num_steps=2)
    mean, logvar = torch.tensor([0.3, -0.5]).double()[:latent_dim], torch.tensor([-0.4, 0.2]).double()[:latent_dim]
    with torch.no_grad():
        cube = 2 * torch.rand(1, 20_000, latent_dim, dtype=torch.float64) - 1
        bulk = flow(mean + 6 * (0.5 * logvar).exp() * cube)[0][0]
        low, high = bulk.amin(dim=0) - 1, bulk.amax(dim=0) + 1
        axes = [torch.linspace(a, b, 501, dtype=torch.float64) for a, b in zip(low, high, strict=True)]
        z = torch.cartesian_prod(*axes).reshape(1, -1, latent_dim)
        z0 = inverse(flow, z)
        there, log_det = flow(z0)
        torch.testing.assert_close(there, z)
        density = (normal_log_prob(z0, mean, logvar) - log_det).exp()
    cell = math.prod(float(axis[1] - axis[0]) for axis in axes)
    assert float(density.sum() * cell) == pytest.approx(1, abs=2e-3)


def test_the_bounds_rise_with_the_number_of_draws_to_the_evidence():
    torch.manual_seed(0)
    model, flow = LinearGaussian(), InverseAutoregressiveFlow(2, 8, 2).double()
    posterior = model.posterior()
    with torch.no_grad():
        elbo = -Elbo().loss(draws(model, flow, *posterior, num_draws=60_000)).mean()
        bounds = []
        for num_draws in (5, 50, 3000):  # each a mean over many estimates
            weights = draws(model, flow, *posterior, num_draws=60_000).log_weight
            bounds.append(importance_bound(weights.unflatten(0, (num_draws, -1)).flatten(1)).mean())
    evidence = model.log_evidence.mean()
    assert elbo < bounds[0] < bounds[1] < bounds[2] < evidence + 0.002
    assert evidence - elbo > 0.1  # the flow has moved the posterior away
    torch.testing.assert_close(bounds[2], evidence, rtol=0, atol=0.01)


def test_a_flow_learns_what_a_wrong_gaussian_lacks():
    torch.manual_seed(0)
    model, flow = LinearGaussian(num=1), InverseAutoregressiveFlow(2, 8, 2).double()
    mean, logvar = torch.zeros(1, 2).double(), torch.zeros(1, 2).double()
    gap = lambda: float(model.log_evidence + Elbo().loss(draws(model, flow, mean, logvar, 2000)).detach())  # noqa: E731
    before, optimizer = gap(), torch.optim.Adam(flow.parameters(), lr=0.02)
    for _ in range(100):
        optimizer.zero_grad()
        Elbo().loss(draws(model, flow, mean, logvar, 32)).mean().backward()
        optimizer.step()
    assert 0 <= gap() < 0.1 * before


# ---- values


def test_a_step_by_hand():
    flow = InverseAutoregressiveFlow(latent_dim=2, hidden_dim=1, num_steps=2)
    for step in flow.steps:
        step.hidden.weight.data.fill_(2.0)
        step.hidden.bias.data.fill_(0.5)
        step.output.weight.data.copy_(
            torch.tensor([[9.0], [3.0], [9.0], [-1.0]] if step is flow.steps[0] else 4 * [[9.0]])
        )
        step.output.bias.data.copy_(torch.tensor([0.25, -0.5, 1.0, 2.0]))
    z, log_det = flow.steps[0](torch.tensor([[[0.5, 7.0]]]))
    h = 2 * 0.5 + 0.5  # of the first dimension; positive, where elu is the identity
    first, second = 1 / (1 + math.exp(-1.0)), 1 / (1 + math.exp(h - 2.0))
    expected = [first * 0.5 + (1 - first) * 0.25, second * 7.0 + (1 - second) * (3 * h - 0.5)]
    torch.testing.assert_close(z, torch.tensor([[expected]]))
    torch.testing.assert_close(log_det, torch.tensor([[math.log(first) + math.log(second)]]))


def test_a_new_flow_begins_near_the_identity():
    torch.manual_seed(0)
    z0 = torch.randn(3, 100, 6)
    z, _ = InverseAutoregressiveFlow(6, 32, num_steps=2)(z0)
    z.mean().backward()
    correlation = torch.corrcoef(torch.stack([z0.flatten(), z.detach().flatten()]))[0, 1]
    assert correlation > 0.95
    gates = torch.cat([step.output.bias[6:] for step in InverseAutoregressiveFlow(6, 32, num_steps=2).steps])
    torch.testing.assert_close(gates, torch.full((12,), 2.0))


def test_a_checkpoint_holds_weights_and_no_masks():
    flow = iaf()
    assert set(flow.state_dict()) == {name for name, _ in flow.named_parameters()}


def test_terms_of_draws_behind_a_flow_by_hand():
    z0, z, log_det = torch.tensor([[[2.0]], [[0.0]]]), torch.tensor([[[3.0]], [[1.0]]]), torch.tensor([[0.5], [-0.25]])
    mean, logvar = torch.tensor([[1.0]]), torch.tensor([[4.0]]).log()
    moved, constant = (
        Draws(torch.zeros(2, 1), z, mean, logvar, base=BaseDraws(z0, log_det)),
        0.5 * math.log(2 * math.pi),
    )
    torch.testing.assert_close(moved.log_prior, torch.tensor([[-4.5], [-0.5]]) - constant)
    posterior = torch.tensor([[-0.5], [0.25]]) - 0.125 - math.log(2) - constant
    torch.testing.assert_close(moved.log_posterior, posterior)
    assert moved.kl_by_dimension is None
    torch.testing.assert_close(moved.kl, torch.tensor([(4.0 + 0.75) / 2 - 0.125 - math.log(2)]))
    torch.testing.assert_close(Elbo(beta=2.0).loss(moved), 2 * moved.kl)


# ---- refusals


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (Elbo(free_bits=0.5), r"Elbo: free_bits=0.5 needs the KL of each dimension, which a posterior with a flow has"),
        (ImportanceWeighted(3, doubly_reparameterized=True), r"doubly_reparameterized=True needs log q\(z\|x\) as a"),
        (TotalCorrelation(10), "TotalCorrelation: needs each draw's density under the posterior of every example"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_objective_that_needs_a_gaussian_refuses_a_flow(objective, message):
    moved = behind_a_flow()
    for refuse in (objective.check_flow, lambda: objective.loss(moved)):
        with pytest.raises(ValueError, match=message):
            refuse()


@pytest.mark.parametrize("objective", [Elbo(), ImportanceWeighted(3), InfoVAE()], ids=lambda o: type(o).__name__)
def test_the_others_take_one_and_their_gradients_reach_it(objective):
    flow, given = iaf(latent_dim=2), LinearGaussian()
    objective.check_flow()
    loss = objective.loss(draws(given, flow, *given.posterior(), num_draws=3))
    assert loss.shape == (5,)
    loss.mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in flow.parameters())


def behind_a_flow() -> Draws:
    given = two_examples_with_draws()
    z, log_det = iaf(latent_dim=2).float()(given.z)
    return Draws(given.log_likelihood, z, given.mean, given.logvar, base=BaseDraws(given.z, log_det))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4, 1), "InverseAutoregressiveFlow: latent_dim must be at least 1, got 0"),
        ((1, 0, 1), "InverseAutoregressiveFlow: hidden_dim must be at least 1, got 0"),
        ((2, 4, 0), "InverseAutoregressiveFlow: num_steps must be at least 1, got 0"),
        ((5, 3, 1), "hidden_dim must be at least latent_dim - 1 = 4, .* got 3"),
    ],
)
def test_bad_numbers_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        InverseAutoregressiveFlow(*arguments)
