import inspect
from functools import partial

import pytest
import torch
from torch import nn

from lit_generative.gan.packing import Packing
from lit_generative.gan.penalties import DRAGAN, R1, R2, GradientPenalty, Penalty, has_batch_norm
from lit_generative.networks.dcgan import DCGANDiscriminator
from lit_generative.networks.mlp import MLPDiscriminator
from lit_generative.tensor_ops import full_precision
from tests import tiny

PENALTIES = [cls for cls in Penalty.__subclasses__() if cls.__module__ == Penalty.__module__]
every_penalty = pytest.mark.parametrize("cls", PENALTIES, ids=[cls.__name__ for cls in PENALTIES])


def strength_of(cls: type[Penalty]) -> str:
    return "gamma" if "gamma" in inspect.signature(cls).parameters else "weight"


def build(cls: type[Penalty], strength: float = 2.0, every_n_steps: int = 1) -> Penalty:
    return cls(**{strength_of(cls): strength, "every_n_steps": every_n_steps})


def points(num: int = 4, dim: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    x, x_hat = torch.randn(2, num, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x, x_hat


def computed(penalty: Penalty, discriminator, x: torch.Tensor, x_hat: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(3)
    return penalty.compute(discriminator, x, x_hat)


def linear(w: torch.Tensor):
    return lambda x: x @ w


def quadratic(x: torch.Tensor) -> torch.Tensor:
    """Its gradient is ``x``."""
    return 0.5 * x.square().sum(dim=1)


class Remembering:
    """A quadratic discriminator that keeps where it was asked."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.x = x.detach()
        return quadratic(x)


def images(num: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    x, x_hat = torch.randn(2, num, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    return x, x_hat


def convolutional() -> DCGANDiscriminator:
    torch.manual_seed(0)
    return DCGANDiscriminator(image_size=8, channels=2, width=3, batch_norm=False)


# ---- laws


@every_penalty
def test_a_penalty_is_one_value_for_each_verdict_and_never_negative(cls):
    values = computed(build(cls), MLPDiscriminator(hidden_dim=6, num_layers=1), *(p.float() for p in points(dim=2)))
    assert values.shape == (4,)
    assert values.dtype == torch.float32
    assert (values >= 0).all()


@every_penalty
def test_a_penalty_is_proportional_to_its_strength(cls):
    one, three = (computed(build(cls, strength), quadratic, *points()) for strength in (1.0, 3.0))
    assert (one > 0).all()
    torch.testing.assert_close(three, 3 * one)


@every_penalty
def test_the_mean_over_updates_does_not_depend_on_how_often_it_is_used(cls):
    always, lazy = build(cls), build(cls, every_n_steps=4)
    due = [step for step in range(12) if lazy.due(step)]
    assert due == [0, 4, 8]
    assert all(always.due(step) for step in range(12))
    total = sum(computed(lazy, quadratic, *points()) for _ in due)
    torch.testing.assert_close(total / 12, computed(always, quadratic, *points()))


@every_penalty
def test_its_gradient_reaches_the_weights_of_a_convolution_as_finite_differences_say(cls):
    network = convolutional().double()
    x, x_hat = (images.double() for images in images())
    weight = network.layers[0].weight
    with torch.no_grad():
        network.head.weight.mul_(20)  # a slope that is not almost zero
    (slope,) = torch.autograd.grad(computed(build(cls), network, x, x_hat).sum(), weight)
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sides = []
    for step in (1e-6, -1e-6):
        with torch.no_grad():
            weight.add_(direction, alpha=step)
        sides.append(computed(build(cls), network, x, x_hat).sum().detach())
        with torch.no_grad():
            weight.sub_(direction, alpha=step)
    torch.testing.assert_close((slope * direction).sum(), (sides[0] - sides[1]) / 2e-6, rtol=1e-4, atol=1e-7)


@every_penalty
def test_a_discriminator_without_slope_gets_a_finite_gradient(cls):
    network = convolutional()
    nn.init.zeros_(network.head.weight)
    values = computed(build(cls), network, *images())
    values.sum().backward()
    assert values.isfinite().all()
    assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)


@every_penalty
def test_within_full_precision_autocast_changes_nothing(cls):
    network, results = convolutional(), []
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), full_precision("cpu"):
            values = computed(build(cls), network, *images())
            slopes = torch.autograd.grad(values.mean(), network.layers[0].weight)
        results.append([values.detach(), *slopes])
    tiny.assert_same(*results)


@every_penalty
def test_a_penalty_leaves_its_inputs_and_their_graphs_alone(cls):
    x, x_hat = points()
    before = x.clone(), x_hat.clone()
    x_hat.requires_grad_()
    w = torch.ones(3, dtype=torch.float64, requires_grad=True)
    computed(build(cls), linear(w), x, x_hat * 1).sum().backward()
    assert not x.requires_grad
    assert x_hat.grad is None or not x_hat.grad.any()
    tiny.assert_same((x, x_hat.detach()), before)


@every_penalty
def test_a_pack_has_one_gradient(cls):
    """Of all its images together, as long as the images' own put end to end."""
    x, x_hat = points(num=6, dim=2)
    torch.manual_seed(0)
    inner = MLPDiscriminator(hidden_dim=5, num_layers=1, input_dim=6).double()
    packed = computed(build(cls), Packing(inner, 3), x, x_hat)
    assert packed.shape == (2,)
    if cls in (R1, R2):
        torch.testing.assert_close(
            packed, computed(build(cls), inner, x.reshape(2, 6), x_hat.reshape(2, 6)).detach(), check_stride=False
        )


@every_penalty
def test_random_draws_follow_the_global_seed(cls):
    torch.testing.assert_close(
        computed(build(cls), quadratic, *points()), computed(build(cls), quadratic, *points()), rtol=0, atol=0
    )


@every_penalty
@pytest.mark.parametrize("strength", [0.0, -1.0])
def test_a_strength_that_is_not_positive_is_refused(cls, strength):
    with pytest.raises(ValueError, match=f"{cls.__name__}: {strength_of(cls)} must be positive, got {strength}. Leave"):
        build(cls, strength)


@every_penalty
def test_a_period_below_one_is_refused(cls):
    with pytest.raises(ValueError, match=f"{cls.__name__}: every_n_steps must be at least 1, got 0"):
        build(cls, every_n_steps=0)


# ---- values


@pytest.mark.parametrize(
    ("penalty", "expected"),
    [
        (GradientPenalty(weight=10.0), 160.0),
        (GradientPenalty(weight=2.0, target=7.0), 8.0),
        (GradientPenalty(weight=2.0, target=7.0, one_sided=True), 0.0),
        (GradientPenalty(weight=2.0, target=3.0, one_sided=True), 8.0),
        (GradientPenalty(every_n_steps=2), 320.0),
        (DRAGAN(), 160.0),
        (DRAGAN(weight=2.0, target=7.0), 8.0),
        (R1(gamma=0.4), 5.0),
        (R1(gamma=0.4, every_n_steps=16), 80.0),
        (R2(gamma=2.0), 25.0),
    ],
)
def test_a_linear_discriminator_of_slope_five_by_hand(penalty, expected):
    w = torch.tensor([3.0, 4.0, 0.0], dtype=torch.float64, requires_grad=True)
    values = computed(penalty, linear(w), *points())
    torch.testing.assert_close(values.detach(), torch.full((4,), expected, dtype=torch.float64))


def test_defaults_are_those_of_the_papers():
    w = torch.tensor([3.0, 4.0, 0.0], dtype=torch.float64, requires_grad=True)
    values = computed(GradientPenalty(), linear(w), *points())
    torch.testing.assert_close(values.detach(), torch.full((4,), 10 * (5.0 - 1.0) ** 2, dtype=torch.float64))


def test_r1_looks_at_data_and_r2_at_samples():
    x, x_hat = points()
    torch.testing.assert_close(computed(R1(3.0), quadratic, x, x_hat).detach(), 1.5 * x.square().sum(dim=1))
    torch.testing.assert_close(computed(R2(3.0), quadratic, x, x_hat).detach(), 1.5 * x_hat.square().sum(dim=1))


def test_a_gradient_penalty_on_a_quadratic_by_hand():
    discriminator = Remembering()
    values = computed(GradientPenalty(weight=2.0), discriminator, *points())
    torch.testing.assert_close(values.detach(), 2 * (discriminator.x.norm(dim=1) - 1).square())


def test_interpolates_lie_between_an_image_and_its_sample_each_at_a_place_of_its_own():
    x, x_hat = points(num=2000)
    discriminator = Remembering()
    computed(GradientPenalty(), discriminator, x, x_hat)
    places = (discriminator.x - x) / (x_hat - x)
    torch.testing.assert_close(places, places[:, :1].expand_as(places), rtol=1e-6, atol=1e-6)
    t = places[:, 0]
    assert 0 <= t.min() < 0.01
    assert 0.99 < t.max() <= 1
    torch.testing.assert_close(t.mean(), torch.tensor(0.5, dtype=t.dtype), rtol=0, atol=0.03)
    torch.testing.assert_close(t.std(), torch.tensor(12**-0.5, dtype=t.dtype), rtol=0, atol=0.02)


@pytest.mark.parametrize("std_scale", [0.5, 2.0])
def test_dragan_looks_near_the_data_as_far_as_its_spread_says(std_scale):
    x, discriminator = 3 * points(num=4000)[0], Remembering()
    computed(DRAGAN(std_scale=std_scale), discriminator, x, x * torch.nan)
    noise = (discriminator.x - x) / (std_scale * x.std(correction=0))
    assert noise.min() >= 0
    assert 0.95 < noise.max() <= 1
    # The product of two uniform numbers has mean 1/4; one of them is shared by an image, so coordinates correlate.
    torch.testing.assert_close(noise.mean(), torch.tensor(0.25, dtype=x.dtype), rtol=0, atol=0.02)
    correlation = torch.corrcoef(noise.T)[0, 1]
    assert 0.3 < correlation < 0.6  # 3/7


def test_images_and_samples_of_different_numbers_are_refused():
    x, x_hat = points()
    with pytest.raises(ValueError, match=r"GradientPenalty: .* got \(4, 3\) and \(3, 3\)\. Draw as many"):
        GradientPenalty().compute(quadratic, x, x_hat[1:])


@pytest.mark.parametrize("cls", [GradientPenalty, DRAGAN])
def test_a_negative_target_is_refused(cls):
    with pytest.raises(ValueError, match=f"{cls.__name__}: target is a norm"):
        cls(target=-0.5)


def test_noise_without_reach_is_refused():
    with pytest.raises(ValueError, match="DRAGAN: std_scale must be positive, got 0"):
        DRAGAN(std_scale=0.0)


# ---- batch norm, training


@pytest.mark.parametrize("batch_norm", [True, False])
def test_batch_norm_is_found(batch_norm):
    assert has_batch_norm(DCGANDiscriminator(image_size=16, width=2, batch_norm=batch_norm)) == batch_norm
    assert not has_batch_norm(nn.Sequential(nn.InstanceNorm2d(3), nn.GroupNorm(1, 3)))


@every_penalty
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_penalty_lowers_the_slope_of_a_discriminator_in_training(cls, precision, tmp_path):
    slopes = []
    for penalties in ([], [cls(**{strength_of(cls): 2.0})]):
        module = tiny.gan(penalties=penalties, discriminator_optimizer=partial(torch.optim.SGD, lr=0.02))
        with torch.no_grad():
            for p in module.discriminator.parameters():
                p.mul_(3)
        tiny.train(tmp_path, module, tiny.ring(), max_steps=8, precision=precision)
        x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
        (slope,) = torch.autograd.grad(module.discriminator(x).sum(), x)
        slopes.append(slope.norm(dim=1).mean())
    assert slopes[1] < 0.9 * slopes[0]
