import pytest
import torch
import torch.nn.functional as F

from lit_generative.gan.losses import (
    AdversarialLoss,
    Hinge,
    LeastSquares,
    Minimax,
    NonSaturating,
    RelativisticAverage,
    RelativisticPairing,
    Wasserstein,
)

OPTIONS = [
    Minimax(real_label=0.9),
    NonSaturating(real_label=0.9, fake_label=0.1),
    LeastSquares(a=-1.0, b=1.0, c=2.0),
    Hinge(margin=2.0),
]
LOSSES = [cls() for cls in AdversarialLoss.__subclasses__() if cls.__module__.startswith("lit_generative.")] + OPTIONS
every_loss = pytest.mark.parametrize("loss", LOSSES, ids=[type(loss).__name__ for loss in LOSSES])


class Example(AdversarialLoss):
    """As the README writes one: its generator knows nothing of data."""

    def discriminator_loss(self, real_logits, fake_logits):
        return 0.5 * ((real_logits - 1).square() + fake_logits.square())

    def generator_loss(self, fake_logits):
        return 0.5 * (fake_logits - 1).square()


def generator_loss(loss: AdversarialLoss, fake: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """As the module calls it."""
    return loss.generator_loss(fake, real) if loss.needs_real else loss.generator_loss(fake)


def undecided_logits(num: int = 6) -> torch.Tensor:
    """Between 0 and 1, where every loss still asks for more: a hinge has not opened, no target is reached."""
    generator = torch.Generator().manual_seed(0)
    return (0.05 + 0.9 * torch.rand(num, generator=generator, dtype=torch.float64)).requires_grad_()


def logits(num: int = 7) -> torch.Tensor:
    """Real and fake ones, ``(2, num)``."""
    return torch.randn(2, num, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@every_loss
def test_losses_are_finite_with_one_value_per_example(loss):
    logits = torch.tensor([-1e4, -3.0, 0.0, 3.0, 1e4], dtype=torch.float64)
    for values in (loss.discriminator_loss(logits, logits.flip(0)), generator_loss(loss, logits, logits.flip(0))):
        assert values.shape == (5,)
        assert values.isfinite().all()


@every_loss
def test_higher_real_logits_lower_the_discriminator_loss(loss):
    real, fake = undecided_logits(), undecided_logits().flip(0)
    (slope,) = torch.autograd.grad(loss.discriminator_loss(real, fake).sum(), real)
    assert (slope < 0).all()


@every_loss
def test_lower_fake_logits_lower_the_discriminator_loss(loss):
    real, fake = undecided_logits(), undecided_logits()
    (slope,) = torch.autograd.grad(loss.discriminator_loss(real, fake).sum(), fake)
    assert (slope > 0).all()


@every_loss
def test_higher_fake_logits_lower_the_generator_loss(loss):
    fake = undecided_logits()
    (slope,) = torch.autograd.grad(generator_loss(loss, fake, undecided_logits().flip(0)).sum(), fake)
    assert (slope < 0).all()


@every_loss
def test_the_generator_looks_at_real_logits_only_if_it_says_so(loss):
    real, fake = logits()
    real.requires_grad_()
    if not loss.needs_real:
        torch.testing.assert_close(loss.generator_loss(fake, real), loss.generator_loss(fake))
        return
    (slope,) = torch.autograd.grad(loss.generator_loss(fake, real).sum(), real)
    assert (slope > 0).all()
    with pytest.raises(ValueError, match=rf"{type(loss).__name__}: .* the shape of fake_logits, \(7,\), got None"):
        loss.generator_loss(fake)
    with pytest.raises(ValueError, match=r"got \(6,\)\. Judge as many images as samples"):
        loss.generator_loss(fake, real[1:])


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss.needs_real], ids=lambda loss: type(loss).__name__)
def test_relativistic_losses_do_not_change_when_all_logits_rise(loss):
    real, fake = logits()
    for values in (loss.discriminator_loss, loss.generator_loss):
        torch.testing.assert_close(values(real + 3, fake + 3), values(real, fake))


def test_a_loss_may_leave_the_second_parameter_out():
    loss, (real, fake) = Example(), logits()
    assert not loss.needs_real
    torch.testing.assert_close(generator_loss(loss, fake, real), LeastSquares().generator_loss(fake))
    torch.testing.assert_close(loss.discriminator_loss(real, fake), LeastSquares().discriminator_loss(real, fake))


@pytest.mark.parametrize("cls", [Minimax, NonSaturating])
@pytest.mark.parametrize(("real_label", "fake_label"), [(1.0, 0.0), (0.9, 0.0), (0.8, 0.3)])
def test_the_discriminator_agrees_with_binary_cross_entropy(cls, real_label, fake_label):
    real, fake = logits()
    bce = F.binary_cross_entropy_with_logits
    expected = bce(real, torch.full_like(real, real_label), reduction="none")
    expected += bce(fake, torch.full_like(fake, fake_label), reduction="none")
    torch.testing.assert_close(cls(real_label, fake_label).discriminator_loss(real, fake), expected)


@pytest.mark.parametrize("options", [{}, {"real_label": 0.9, "fake_label": 0.1}])
def test_labels_are_smoothed_for_the_discriminator_alone(options):
    _, fake = logits()
    probability = fake.sigmoid()
    torch.testing.assert_close(NonSaturating(**options).generator_loss(fake), -probability.log())
    torch.testing.assert_close(Minimax(**options).generator_loss(fake), (1 - probability).log())


def test_a_smoothed_discriminator_is_content_at_its_label():
    logit = torch.tensor([0.9], dtype=torch.float64).logit().requires_grad_()
    loss = NonSaturating(real_label=0.9).discriminator_loss(logit, torch.zeros(1, dtype=torch.float64))
    torch.testing.assert_close(*torch.autograd.grad(loss.sum(), logit), torch.zeros(1, dtype=torch.float64))


@pytest.mark.parametrize("cls", [Minimax, NonSaturating])
@pytest.mark.parametrize(("real_label", "fake_label"), [(1.1, 0.0), (0.9, -0.1), (0.4, 0.6), (0.5, 0.5)])
def test_labels_that_are_no_probabilities_in_order_are_refused(cls, real_label, fake_label):
    message = f"{cls.__name__}: .* 0 <= fake_label < real_label <= 1, got real_label={real_label}"
    with pytest.raises(ValueError, match=message):
        cls(real_label=real_label, fake_label=fake_label)


def test_minimax_is_flat_where_samples_are_worst_and_non_saturating_is_steep():
    fake = torch.tensor([-12.0], requires_grad=True)
    slopes = [torch.autograd.grad(loss.generator_loss(fake).sum(), fake)[0] for loss in (Minimax(), NonSaturating())]
    assert -1e-4 < slopes[0] < 0
    torch.testing.assert_close(slopes[1], torch.tensor([-1.0]), rtol=0, atol=1e-4)


def test_least_squares_by_hand():
    real, fake = torch.tensor([3.0, 0.5, -1.0]), torch.tensor([-2.0, 1.0, 0.0])
    torch.testing.assert_close(LeastSquares().discriminator_loss(real, fake), torch.tensor([4.0, 0.625, 2.0]))
    torch.testing.assert_close(LeastSquares().generator_loss(fake), torch.tensor([4.5, 0.0, 0.5]))


def test_least_squares_with_other_targets_by_hand():
    loss, real, fake = LeastSquares(a=-1.0, b=2.0, c=0.5), torch.tensor([3.0, 0.0]), torch.tensor([-2.0, 1.5])
    torch.testing.assert_close(loss.discriminator_loss(real, fake), torch.tensor([1.0, 5.125]))
    torch.testing.assert_close(loss.generator_loss(fake), torch.tensor([3.125, 0.5]))


@pytest.mark.parametrize("targets", [(1.0, 1.0, 2.0), (1.0, 0.0, 2.0), (0.0, 1.0, 0.0)])
def test_a_fake_target_that_is_not_the_lowest_is_refused(targets):
    with pytest.raises(ValueError, match="LeastSquares: the fake target a must be below b"):
        LeastSquares(*targets)


def test_hinge_by_hand():
    real, fake = torch.tensor([3.0, 0.5, -1.0]), torch.tensor([-2.0, 0.25, -0.5])
    torch.testing.assert_close(Hinge().discriminator_loss(real, fake), torch.tensor([0.0, 1.75, 2.5]))
    torch.testing.assert_close(Hinge().generator_loss(fake), torch.tensor([2.0, -0.25, 0.5]))


def test_hinge_opens_at_its_margin():
    real, fake = torch.tensor([1.5, 2.5]), torch.tensor([-2.5, -1.0])
    torch.testing.assert_close(Hinge(margin=2.0).discriminator_loss(real, fake), torch.tensor([0.5, 1.0]))


@pytest.mark.parametrize("margin", [0.0, -1.0])
def test_a_margin_that_is_not_positive_is_refused(margin):
    with pytest.raises(ValueError, match="Hinge: margin must be positive"):
        Hinge(margin=margin)


def test_wasserstein_by_hand():
    real, fake = torch.tensor([3.0, 0.5]), torch.tensor([-2.0, 0.75])
    torch.testing.assert_close(Wasserstein().discriminator_loss(real, fake), torch.tensor([-5.0, 0.25]))
    torch.testing.assert_close(Wasserstein().generator_loss(fake), torch.tensor([2.0, -0.75]))


def test_pairing_is_cross_entropy_of_the_difference():
    real, fake = logits()
    loss = RelativisticPairing()
    torch.testing.assert_close(loss.discriminator_loss(real, fake), -(real - fake).sigmoid().log())
    torch.testing.assert_close(loss.generator_loss(fake, real), -(fake - real).sigmoid().log())


def test_average_is_cross_entropy_of_differences_from_the_other_mean():
    real, fake = logits()
    more_real, more_fake = (real - fake.mean()).sigmoid(), (fake - real.mean()).sigmoid()
    loss = RelativisticAverage()
    torch.testing.assert_close(loss.discriminator_loss(real, fake), -more_real.log() - (1 - more_fake).log())
    torch.testing.assert_close(loss.generator_loss(fake, real), -more_fake.log() - (1 - more_real).log())
