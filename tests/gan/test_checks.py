import warnings

import pytest
from torch import nn

from lit_generative.gan.checks import check_discriminator, named_penalties
from lit_generative.gan.constraints import WeightClipping
from lit_generative.gan.losses import Wasserstein
from lit_generative.gan.penalties import R1, R2, GradientPenalty
from lit_generative.gan.spectral import SpectralNorm
from lit_generative.networks.dcgan import DCGANDiscriminator
from lit_generative.networks.mlp import MLPDiscriminator
from lit_generative.recipe import Recorded
from tests import tiny


class Probability(Recorded, nn.Sequential):
    """A discriminator as they were written before losses held the sigmoid."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(2, 1), nn.Sigmoid())


def test_a_discriminator_that_gives_probabilities_is_refused():
    with pytest.raises(ValueError, match="GAN: the discriminator must give logits, and Probability ends in a Sigmoid"):
        tiny.gan(discriminator=Probability())


def test_batch_norm_under_a_penalty_is_warned_of():
    with pytest.warns(UserWarning, match=r"GradientPenalty is a penalty for each example, and batch norm"):
        check_discriminator(DCGANDiscriminator(image_size=16, channels=1, width=4), [GradientPenalty()])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_discriminator(DCGANDiscriminator(image_size=16, channels=1, width=4), [])
        tiny.gan(penalties=[GradientPenalty()])


def test_penalties_are_logged_under_the_names_of_their_classes():
    first, second, third = GradientPenalty(), R1(gamma=1.0), R2(gamma=1.0)
    assert named_penalties([first, second, third]) == {"gradient_penalty": first, "r1": second, "r2": third}
    with pytest.raises(ValueError, match=r"must be of different kinds, got \['r1', 'r1'\]"):
        tiny.gan(penalties=[R1(gamma=1.0), R1(gamma=2.0)])


def test_a_critic_that_nothing_bounds_is_warned_of():
    with pytest.warns(UserWarning, match="has no bound unless the critic is kept Lipschitz .* Add the penalty"):
        tiny.gan(loss=Wasserstein())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny.gan()
        tiny.gan(loss=Wasserstein(), penalties=[GradientPenalty()])
        tiny.gan(loss=Wasserstein(), constraints=[WeightClipping()])
        tiny.gan(loss=Wasserstein(), discriminator=SpectralNorm(MLPDiscriminator(hidden_dim=4)))
