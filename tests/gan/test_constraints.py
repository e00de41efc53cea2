import pytest
import torch
from torch import nn

from lit_generative.gan.constraints import Constraint, WeightClipping
from lit_generative.gan.losses import Wasserstein
from lit_generative.gan.spectral import SpectralNorm
from lit_generative.networks.dcgan import DCGANDiscriminator
from lit_generative.networks.mlp import MLPDiscriminator
from tests import tiny


class Small(nn.Module):
    """A parameter, one at rest, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.trained = nn.Parameter(torch.tensor([-2.0, -0.25, 0.0, 0.5, 3.0]))
        self.resting = nn.Parameter(torch.tensor([7.0]), requires_grad=False)
        self.register_buffer("seen", torch.tensor([9.0]))


def test_clipping_by_hand():
    network = Small()
    parameter = network.trained
    WeightClipping(limit=0.5).apply(network)
    assert network.trained is parameter
    assert parameter.requires_grad
    torch.testing.assert_close(parameter.detach(), torch.tensor([-0.5, -0.25, 0.0, 0.5, 0.5]))


def test_buffers_and_parameters_at_rest_are_not_clipped():
    network = Small()
    WeightClipping().apply(network)
    assert network.resting.item() == 7
    assert network.seen.item() == 9
    running = DCGANDiscriminator(image_size=16, width=2)
    WeightClipping().apply(running)
    assert all((p.abs() <= 0.01).all() for p in running.parameters())
    assert all((b == 1).all() for name, b in running.named_buffers() if name.endswith("running_var"))


def test_the_limit_is_the_papers_unless_another_is_given():
    for constraint, limit in ((WeightClipping(), 0.01), (WeightClipping(limit=0.2), 0.2)):
        network = Small()
        constraint.apply(network)
        assert network.trained.abs().max().item() == pytest.approx(limit)


def test_clipping_twice_is_clipping_once():
    network = MLPDiscriminator(hidden_dim=4)
    WeightClipping(0.05).apply(network)
    before = tiny.weights(network)
    WeightClipping(0.05).apply(network)
    tiny.assert_same(tiny.weights(network), before)


def test_clipping_keeps_no_graph_and_no_gradient_out():
    network = MLPDiscriminator(hidden_dim=4)
    network(torch.randn(3, 2)).sum().backward()
    gradients = [p.grad.clone() for p in network.parameters()]
    WeightClipping().apply(network)
    assert all(p.is_leaf for p in network.parameters())
    tiny.assert_same([p.grad for p in network.parameters()], gradients)


def test_a_network_without_trained_parameters_is_left_alone():
    WeightClipping().apply(nn.Flatten())


def test_weights_under_spectral_norm_are_clipped_too():
    network = SpectralNorm(MLPDiscriminator(hidden_dim=4))
    WeightClipping(0.05).apply(network)
    assert all((p.abs() <= 0.05).all() for p in network.parameters())
    assert network(torch.randn(3, 2)).isfinite().all()


@pytest.mark.parametrize("limit", [0.0, -0.01])
def test_a_limit_that_is_not_positive_is_refused(limit):
    with pytest.raises(ValueError, match=f"WeightClipping: limit must be positive, got {limit}"):
        WeightClipping(limit)


def test_in_training_the_critic_is_clipped_and_the_generator_is_not(tmp_path):
    constraint: Constraint = WeightClipping(0.03)
    module = tiny.gan(loss=Wasserstein(), constraints=[constraint], discriminator_steps=2)
    tiny.train(tmp_path, module, tiny.ring())
    largest = {name: max(p.abs().max().item() for p in net.parameters()) for name, net in module.named_children()}
    assert largest["discriminator"] == pytest.approx(0.03)
    assert largest["generator"] > 0.1
