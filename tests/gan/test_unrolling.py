"""The generator's gradient through the discriminator's next updates, by hand and by finite differences."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from lit_generative.gan.losses import NonSaturating, RelativisticPairing, Wasserstein
from lit_generative.gan.packing import Packing
from lit_generative.gan.unrolling import Unrolling
from lit_generative.networks.mlp import MLPDiscriminator
from tests import tiny


def test_one_step_of_a_linear_critic_by_hand():
    critic = nn.Linear(2, 1, bias=False).double()
    x, x_hat = torch.randn(2, 5, 2, dtype=torch.float64)
    x_hat.requires_grad_()
    verdict = lambda weights, points: functional_call(critic, weights, (points,)).squeeze(1)  # noqa: E731
    ahead = Unrolling(steps=1, lr=0.3).look_ahead(
        critic, lambda weights: (verdict(weights, x_hat) - verdict(weights, x)).mean()
    )
    moved = critic.weight[0] - 0.3 * (x_hat.mean(dim=0) - x.mean(dim=0))
    torch.testing.assert_close(ahead["weight"][0], moved)
    (gradient,) = torch.autograd.grad(-verdict(ahead, x_hat).mean(), x_hat)
    # Each sample moves the critic's answer, too.
    torch.testing.assert_close(gradient, (-moved + 0.3 * x_hat.mean(dim=0)).expand(5, 2) / 5)


@pytest.mark.parametrize("loss", [NonSaturating(), RelativisticPairing()], ids=lambda loss: type(loss).__name__)
@pytest.mark.parametrize("steps", [1, 3])
def test_the_slope_is_that_of_the_loss_after_real_updates(loss, steps):
    torch.manual_seed(0)
    discriminator = MLPDiscriminator(hidden_dim=6, num_layers=2).double()
    x, x_hat, direction = torch.randn(3, 4, 2, dtype=torch.float64)

    def generator_loss(fake: Tensor, real: Tensor) -> Tensor:
        return loss.generator_loss(fake, real).mean()

    def after_real_updates(points: Tensor) -> float:
        other = copy.deepcopy(discriminator)
        optimizer = torch.optim.SGD(other.parameters(), lr=0.2)
        for _ in range(steps):
            optimizer.zero_grad()
            loss.discriminator_loss(other(x), other(points)).mean().backward()
            optimizer.step()
        return float(generator_loss(other(points), other(x)).detach())

    def judge(weights, points):
        return functional_call(discriminator, weights, (points,))

    points = x_hat.clone().requires_grad_()
    ahead = Unrolling(steps, lr=0.2).look_ahead(
        discriminator, lambda weights: loss.discriminator_loss(judge(weights, x), judge(weights, points)).mean()
    )
    value = generator_loss(judge(ahead, points), judge(ahead, x))
    assert float(value.detach()) == pytest.approx(after_real_updates(x_hat), abs=1e-12)
    (slope,) = torch.autograd.grad(value, points)
    h = 1e-5
    expected = (after_real_updates(x_hat + h * direction) - after_real_updates(x_hat - h * direction)) / (2 * h)
    assert float((slope * direction).sum()) == pytest.approx(expected, rel=1e-6)
    assert all(p.grad is None for p in discriminator.parameters())


SGD = functools.partial(torch.optim.SGD, lr=0.1)


def changes(tmp_path, **options) -> dict[str, Tensor]:
    module = tiny.gan(generator_optimizer=SGD, discriminator_optimizer=SGD, **options)
    before = tiny.weights(module)
    tiny.train(tmp_path, module, tiny.ring(batch_size=12), max_steps=1)
    return {name: value - before[name] for name, value in tiny.weights(module).items()}


def test_in_training_it_changes_the_generators_update_and_not_the_discriminators(tmp_path):
    plain, unrolled = changes(tmp_path), changes(tmp_path, unrolling=Unrolling(steps=2, lr=1.0))
    for name, value in plain.items():
        if name.startswith("discriminator"):
            torch.testing.assert_close(unrolled[name], value, rtol=0, atol=0)
    assert any((unrolled[name] - value).abs().max() > 1e-3 * value.abs().max() for name, value in plain.items())


@pytest.mark.parametrize(
    "options",
    [
        {"loss": RelativisticPairing(), "accumulate_grad_batches": 2, "discriminator_steps": 2},
        {"loss": Wasserstein()},
        {"discriminator": Packing(MLPDiscriminator(hidden_dim=4, num_layers=1, input_dim=4), num_packed=2)},
    ],
)
def test_it_goes_with_what_else_an_update_may_hold(tmp_path, options):
    assert all(value.isfinite().all() for value in changes(tmp_path, unrolling=Unrolling(2), **options).values())


def test_a_checkpoint_keeps_it(tmp_path):
    module = tiny.gan(unrolling=Unrolling(steps=3, lr=0.5))
    tiny.train(tmp_path, module, tiny.ring(), max_steps=1).save_checkpoint(tmp_path / "a.ckpt")
    loaded = tiny.GAN.load_from_checkpoint(tmp_path / "a.ckpt").unrolling
    assert (loaded.steps, loaded.lr) == (3, 0.5)


@pytest.mark.parametrize(
    ("options", "message"), [({"steps": 0}, "steps must be at least 1, got 0"), ({"lr": 0.0}, "lr must be positive")]
)
def test_bad_numbers_are_refused(options, message):
    with pytest.raises(ValueError, match=f"Unrolling: {message}"):
        Unrolling(**options)
