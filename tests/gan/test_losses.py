import pytest
import torch
import torch.nn.functional as F

from lit_generative.gan.losses import AdversarialLoss, Hinge, NonSaturating

LOSSES = [cls for cls in AdversarialLoss.__subclasses__() if cls.__module__.startswith("lit_generative.")]
every_loss = pytest.mark.parametrize("loss", [cls() for cls in LOSSES], ids=[cls.__name__ for cls in LOSSES])


def undecided_logits(num: int = 6) -> torch.Tensor:
    """Between 0 and 1, where every loss still asks for more: a hinge has not opened, no target is reached."""
    generator = torch.Generator().manual_seed(0)
    return (0.05 + 0.9 * torch.rand(num, generator=generator, dtype=torch.float64)).requires_grad_()


@every_loss
def test_losses_are_finite_with_one_value_per_example(loss):
    logits = torch.tensor([-1e4, -3.0, 0.0, 3.0, 1e4], dtype=torch.float64)
    for values in (loss.discriminator_loss(logits, logits.flip(0)), loss.generator_loss(logits)):
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
    (slope,) = torch.autograd.grad(loss.generator_loss(fake).sum(), fake)
    assert (slope < 0).all()


def test_non_saturating_agrees_with_binary_cross_entropy():
    real, fake = torch.randn(2, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ones, zeros = torch.ones_like(real), torch.zeros_like(real)
    bce = F.binary_cross_entropy_with_logits
    torch.testing.assert_close(
        NonSaturating().discriminator_loss(real, fake),
        bce(real, ones, reduction="none") + bce(fake, zeros, reduction="none"),
    )
    torch.testing.assert_close(NonSaturating().generator_loss(fake), bce(fake, ones, reduction="none"))


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
