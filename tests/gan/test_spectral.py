import copy
import json

import jsonargparse
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn.utils import parametrize

from lit_generative.gan.losses import Hinge
from lit_generative.gan.module import GAN
from lit_generative.gan.penalties import R1
from lit_generative.gan.spectral import SpectralNorm
from lit_generative.networks.dcgan import DCGANDiscriminator, DCGANGenerator
from lit_generative.networks.mlp import MLPDiscriminator
from lit_generative.tensor_ops import frozen
from tests import tiny

Y = torch.tensor([0, 2, 1, 0])


def perceptron(num_iterations: int = 1, factor: float = 5.0) -> SpectralNorm:
    torch.manual_seed(0)
    network = MLPDiscriminator(hidden_dim=6, num_layers=2)
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(factor)
    return SpectralNorm(network, num_iterations)


def convolutional(**options) -> SpectralNorm:
    torch.manual_seed(0)
    network = DCGANDiscriminator(image_size=16, channels=2, width=3, num_classes=3, batch_norm=False)
    return SpectralNorm(network, **options)


def images() -> torch.Tensor:
    return torch.randn(4, 2, 16, 16, generator=torch.Generator().manual_seed(0))


def normalized(network: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in network.named_modules() if parametrize.is_parametrized(m)}


def vectors(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in network.named_buffers()}


# ---- mathematics


def test_every_weight_has_a_largest_singular_value_of_one():
    network = convolutional()
    for _ in range(100):
        network(images(), Y)
    layers = normalized(network.eval())
    assert {type(m).__name__ for m in layers.values()} == {"ParametrizedConv2d", "ParametrizedEmbedding"}
    assert len(layers) == 4
    for layer in layers.values():
        norm = torch.linalg.matrix_norm(layer.weight.flatten(start_dim=1), 2)
        torch.testing.assert_close(norm, torch.tensor(1.0), rtol=1e-3, atol=0)


def test_a_diagonal_layer_by_hand():
    layer = nn.Linear(3, 3)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([2.0, -8.0, 4.0]).diag())
        layer.bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
    network = SpectralNorm(layer_then_sum(layer))
    for _ in range(30):
        network(torch.ones(1, 3))
    torch.testing.assert_close(network.eval()(torch.tensor([[1.0, 1.0, 2.0]])), torch.tensor([0.25 - 1 + 1 + 6.0]))


def layer_then_sum(layer: nn.Module) -> nn.Module:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
            return self.layer(x).sum(dim=1)

    return Sum()


def test_a_perceptron_becomes_one_lipschitz():
    network = perceptron()
    x = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    for _ in range(100):
        network(x)
    x.requires_grad_()
    (slope,) = torch.autograd.grad(network.eval()(x).sum(), x)
    assert slope.norm(dim=1).max() <= 1.001
    (steep,) = torch.autograd.grad(unwrapped(network)(x).sum(), x)
    assert steep.norm(dim=1).max() > 2


def unwrapped(network: SpectralNorm) -> nn.Module:
    plain = copy.deepcopy(network.discriminator)
    for layer in normalized(plain).values():
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    return plain


def test_verdicts_do_not_depend_on_the_size_of_the_weights():
    for one, other in zip(perceptron().modules(), perceptron(factor=40.0).modules(), strict=True):
        if parametrize.is_parametrized(one):
            torch.testing.assert_close(one.eval().weight, other.eval().weight)


# ---- power iteration


def test_a_training_pass_iterates_once_and_an_evaluation_pass_never():
    network = convolutional()
    with torch.no_grad():  # vectors that have not settled
        for layer in normalized(network).values():
            layer.parametrizations.weight.original.normal_(generator=torch.Generator().manual_seed(1))
    reference = copy.deepcopy(network)
    for layer in normalized(reference).values():
        _ = layer.weight  # torch's own: one iteration at each look
    network(images(), Y)
    after = vectors(network)
    tiny.assert_same(after, vectors(reference))
    network.eval()(images(), Y)
    tiny.assert_same(vectors(network), after)
    network.train()(images(), Y)
    assert any(not torch.equal(value, after[name]) for name, value in vectors(network).items())


def test_the_number_of_iterations_counts_those_of_a_pass():
    once, thrice = perceptron(), perceptron(num_iterations=3)
    thrice.load_state_dict(once.state_dict())
    for network in (once, thrice):
        for i, layer in enumerate(normalized(network).values()):
            layer.parametrizations.weight.original.data.normal_(generator=torch.Generator().manual_seed(i))
    x = torch.randn(4, 2)
    for _ in range(3):
        once(x)
    thrice(x)
    tiny.assert_same(vectors(thrice), vectors(once))


def test_two_forward_passes_before_a_backward_pass_are_right():
    network = convolutional().double()
    loss = network(images().double(), Y).sum() - 2 * network(-images().double(), Y).sum()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


# ---- precision, frozen weights, second order


def test_the_norm_is_taken_in_float32_under_autocast():
    results = []
    for autocast in (False, True):
        network, weights = convolutional(), []
        network.discriminator.layers[2].register_forward_hook(lambda layer, *_, seen=weights: seen.append(layer.weight))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            assert network(images(), Y).isfinite().all()
        results.append([weights[0].detach(), vectors(network)])
    tiny.assert_same(*results)


def test_autocast_is_off_while_the_norm_is_taken():
    """On a CPU that norm is float32 anyway, so the weights cannot tell; on a GPU torch fails at it."""
    network, on = convolutional(), []
    for layer in normalized(network).values():
        layer.parametrizations.weight[0].register_forward_hook(lambda *_: on.append(torch.is_autocast_enabled("cpu")))
    with torch.autocast("cpu", torch.bfloat16):
        network(images(), Y)
    assert on == [False] * 4


def test_layers_still_run_in_half_precision():
    network, dtypes = perceptron(), []
    network.discriminator.layers[0].register_forward_hook(lambda *args: dtypes.append(args[2].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        network(torch.randn(3, 2))
    assert dtypes == [torch.bfloat16]


def test_no_weight_is_kept_after_a_pass():
    network, x = perceptron(), torch.randn(3, 2)
    network.eval()
    before = network(x).detach()
    with torch.no_grad():
        network.discriminator.layers[0].parametrizations.weight.original[0].mul_(-1)
    assert not torch.equal(network(x), before)


def test_frozen_weights_pass_gradients_to_the_images_alone():
    network, x = convolutional(), images().requires_grad_()
    with frozen(network):
        network(x, Y).sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(p.grad is None for p in network.parameters())
    assert all(p.requires_grad for p in network.parameters())


def test_a_gradient_penalty_passes_through_the_norm():
    network = convolutional()
    R1(1.0).compute(lambda x: network(x, Y), images(), images()).sum().backward()
    reached = [p.grad for name, p in network.named_parameters() if "original" in name]
    assert len(reached) == 4
    assert all(grad.isfinite().all() and grad.any() for grad in reached)


# ---- state


def test_a_state_dict_loads_back():
    first, second = convolutional(), convolutional()
    for _ in range(3):
        first(images(), Y)
    with torch.no_grad():
        first.discriminator.head.bias.add_(1)
    assert not torch.equal(first.eval()(images(), Y), second.eval()(images(), Y))
    second.load_state_dict(first.state_dict())
    tiny.assert_same(second(images(), Y), first(images(), Y))


def test_copies_are_independent():
    network = convolutional()
    before = tiny.weights(network)
    copied = copy.deepcopy(network)
    tiny.assert_same(tiny.weights(copied), before)
    copied(images(), Y).sum().backward()
    with torch.no_grad():
        for p in copied.parameters():
            p.add_(1)
    tiny.assert_same(tiny.weights(network), before)
    assert all(p.grad is None for p in network.parameters())


def test_the_wrapper_states_what_the_discriminator_states():
    network = convolutional()
    assert (network.num_classes, network.num_packed, network.sample_shape) == (3, 1, (2, 16, 16))


def test_embeddings_may_stay_as_they_are():
    assert "discriminator.embedding" in normalized(convolutional())
    assert set(normalized(convolutional(embeddings=False))) == {
        f"discriminator.{n}" for n in ("layers.0", "layers.2", "head")
    }


def test_a_config_builds_it():
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--network", type=nn.Module)
    inner = {"class_path": "lit_generative.networks.mlp.MLPDiscriminator", "init_args": {"hidden_dim": 4}}
    arguments = {"discriminator": inner, "num_iterations": 2, "embeddings": False}
    config = {"class_path": "lit_generative.gan.spectral.SpectralNorm", "init_args": arguments}
    network = parser.instantiate_classes(parser.parse_args([f"--network={json.dumps(config)}"])).network
    assert isinstance(network, SpectralNorm)
    assert len(normalized(network)) == 4


# ---- refusals


def test_a_network_without_weights_to_scale_is_refused():
    with pytest.raises(ValueError, match="SpectralNorm: Flatten has no convolution, linear layer or embedding"):
        SpectralNorm(nn.Flatten())
    with pytest.raises(ValueError, match="SpectralNorm: Embedding has no"):
        SpectralNorm(nn.Embedding(3, 2), embeddings=False)


def test_wrapping_twice_is_refused():
    with pytest.raises(ValueError, match=r"the weight of 'discriminator\.layers\.0' is parametrized already"):
        SpectralNorm(perceptron())


def test_a_weight_of_zero_is_refused():
    network = MLPDiscriminator(hidden_dim=4, num_layers=1)
    nn.init.zeros_(network.layers[2].weight)
    with pytest.raises(ValueError, match=r"the weight of 'layers\.2' is zero"):
        SpectralNorm(network)


def test_a_number_of_iterations_below_one_is_refused():
    with pytest.raises(ValueError, match="SpectralNorm: num_iterations must be at least 1, got 0"):
        SpectralNorm(MLPDiscriminator(), num_iterations=0)


# ---- training


def gan(**options) -> GAN:
    torch.manual_seed(0)
    return tiny.gan(
        generator=DCGANGenerator(image_size=8, channels=1, latent_dim=3, width=4, num_classes=10),
        discriminator=SpectralNorm(DCGANDiscriminator(8, 1, width=4, num_classes=10, batch_norm=False)),
        loss=Hinge(),
        **options,
    )


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_gan_trains_with_it_and_a_checkpoint_builds_it_again(precision, tmp_path):
    module = gan(penalties=[R1(1.0)], discriminator_steps=2)
    before = tiny.weights(module.discriminator)
    run = tiny.train(tmp_path, module, tiny.digits(), precision=precision)
    after = tiny.weights(module.discriminator)
    assert all(value.isfinite().all() and value.dtype == torch.float32 for value in after.values())
    assert all(not torch.equal(value, before[name]) for name, value in after.items() if "original" in name)
    run.save_checkpoint(tmp_path / "gan.ckpt")
    tiny.assert_same(tiny.weights(GAN.load_from_checkpoint(tmp_path / "gan.ckpt")), tiny.weights(module))


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    whole, half, resumed = gan(), gan(), gan()
    tiny.train(tmp_path / "whole", whole, tiny.digits(), max_steps=6)
    saving = ModelCheckpoint(tmp_path / "half", every_n_train_steps=3, save_top_k=-1, filename="{step}")
    tiny.train(tmp_path / "half", half, tiny.digits(), max_steps=3, callbacks=[saving])
    (path,) = (tmp_path / "half").glob("*.ckpt")
    tiny.train(tmp_path / "resumed", resumed, tiny.digits(), max_steps=6, ckpt_path=path)
    tiny.assert_same(tiny.weights(resumed), tiny.weights(whole))
