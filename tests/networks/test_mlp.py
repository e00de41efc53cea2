import pytest
import torch
from torch import nn

from lit_generative.networks.mlp import MLPDecoder, MLPDenoiser, MLPDiscriminator, MLPEncoder, MLPGenerator
from lit_generative.networks.time_embedding import sinusoidal_embedding


class Case:
    """A way to build a network, and arguments to call it with."""

    def __init__(self, build, *arguments):
        self.build, self.arguments = build, arguments


X, Z, Y = torch.randn(4, 2), torch.randn(4, 5), torch.tensor([0, 1, 2, 0])
CASES = {
    "generator": Case(lambda: MLPGenerator(latent_dim=5, hidden_dim=6, num_layers=2), Z),
    "discriminator": Case(lambda: MLPDiscriminator(hidden_dim=6, num_layers=2), X),
    "denoiser": Case(lambda: MLPDenoiser(hidden_dim=6, num_layers=2), X, torch.tensor([0, 7, 400, 999])),
    "class denoiser": Case(lambda: MLPDenoiser(hidden_dim=6, num_classes=3), X, torch.rand(4), Y),
    "wide denoiser": Case(
        lambda: MLPDenoiser(6, 2, 3, (5,), extra_channels=1, learned_variance=True, num_waves=4),
        torch.randn(4, 6),
        torch.rand(4),
        Y + 1,
    ),
    "encoder": Case(lambda: MLPEncoder((1, 2, 3), latent_dim=5, hidden_dim=6), torch.randn(4, 1, 2, 3)),
    "decoder": Case(lambda: MLPDecoder((1, 2, 3), latent_dim=5, hidden_dim=6), Z),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request) -> Case:
    return request.param


def tensors(output):
    return output if isinstance(output, tuple) else (output,)


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("generator", [(4, 2)]),
        ("discriminator", [(4,)]),
        ("denoiser", [(4, 2)]),
        ("class denoiser", [(4, 2)]),
        ("wide denoiser", [(4, 10)]),
        ("encoder", [(4, 5), (4, 5)]),
        ("decoder", [(4, 1, 2, 3)]),
    ],
)
def test_outputs_have_the_promised_shapes(name, shapes):
    case = CASES[name]
    assert [tuple(output.shape) for output in tensors(case.build()(*case.arguments))] == shapes


def test_networks_state_what_they_take():
    networks = {name: case.build() for name, case in CASES.items()}
    assert {name: n.sample_shape for name, n in networks.items() if n.sample_shape != (2,)} == {
        "wide denoiser": (5,),
        "encoder": (1, 2, 3),
        "decoder": (1, 2, 3),
    }
    assert {name: n.num_classes for name, n in networks.items() if n.num_classes is not None} == {
        "class denoiser": 3,
        "wide denoiser": 3,
    }
    assert networks["generator"].latent_dim == networks["encoder"].latent_dim == networks["decoder"].latent_dim == 5


def test_gradients_reach_every_parameter(case):
    torch.manual_seed(0)  # a narrow ReLU network may be dead at birth
    network = case.build()
    sum(output.square().sum() for output in tensors(network(*case.arguments))).backward()
    for name, p in network.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().sum() > 0, name


def test_an_example_does_not_depend_on_its_batch(case):
    network = case.build().double()
    arguments = [a.double() if a.is_floating_point() else a for a in case.arguments]
    alone = tensors(network(*(a[1:2] for a in arguments)))
    for one, many in zip(alone, tensors(network(*arguments)), strict=True):
        torch.testing.assert_close(one, many[1:2])


def test_a_state_dict_round_trip_keeps_the_output(case):
    first, second = case.build(), case.build()
    second.load_state_dict(first.state_dict())
    for one, other in zip(tensors(first(*case.arguments)), tensors(second(*case.arguments)), strict=True):
        assert torch.equal(one, other)


def test_bfloat16_autocast_gives_finite_output(case):
    with torch.autocast("cpu", torch.bfloat16):
        outputs = tensors(case.build()(*case.arguments))
    assert all(output.isfinite().all() for output in outputs)


def test_num_layers_counts_hidden_layers():
    linear = [m for m in MLPGenerator(hidden_dim=6, num_layers=4).modules() if isinstance(m, nn.Linear)]
    assert [m.out_features for m in linear] == [6, 6, 6, 6, 2]
    with pytest.raises(ValueError, match="at least 1 hidden layer, got 0"):
        MLPGenerator(num_layers=0)


def test_a_network_without_classes_refuses_labels():
    for network, arguments in (
        (MLPGenerator(5, 6), (Z, Y)),
        (MLPDiscriminator(6), (X, Y)),
        (MLPDenoiser(6), (X, X[:, 0], Y)),
    ):
        with pytest.raises(ValueError, match=rf"{type(network).__name__}: built without num_classes"):
            network(*arguments)


def test_a_denoiser_with_classes_asks_for_labels():
    with pytest.raises(ValueError, match="MLPDenoiser: built with num_classes=3, so it needs labels"):
        MLPDenoiser(6, num_classes=3)(X, torch.rand(4))


def test_the_denoiser_depends_on_time_and_label():
    network = MLPDenoiser(hidden_dim=6, num_classes=3)
    x_t = X[:1].expand(2, -1)
    by_time = network(x_t, torch.tensor([0.25, 0.75]), Y[:1].expand(2))
    by_label = network(x_t, torch.tensor([0.5, 0.5]), torch.tensor([0, 2]))
    assert not torch.allclose(by_time[0], by_time[1])
    assert not torch.allclose(by_label[0], by_label[1])


def test_a_float_time_is_read_like_the_step_a_thousand_times_as_large():
    network = MLPDenoiser(hidden_dim=6)
    steps = torch.tensor([0, 250, 500, 1000])
    torch.testing.assert_close(network(X, steps / 1000), network(X, steps))


def test_a_discriminator_with_waves_sees_sines_and_cosines_beside_the_point():
    torch.manual_seed(0)
    discriminator = MLPDiscriminator(hidden_dim=8, num_layers=1, num_waves=5, wave_number=3.0)
    assert discriminator.layers[0].in_features == 2 + 10
    assert "waves" in discriminator.state_dict()
    x = torch.randn(4, 2)
    phase = x @ discriminator.waves
    expected = discriminator.layers(torch.cat([x, phase.sin(), phase.cos()], dim=1)).squeeze(1)
    torch.testing.assert_close(discriminator(x), expected)
    wide = MLPDiscriminator(num_waves=20_000, wave_number=3.0).waves.std(dim=1)
    torch.testing.assert_close(wide, torch.full((2,), 3 * torch.pi), rtol=0.03, atol=0)


def test_a_denoiser_with_waves_sees_sines_and_cosines_of_all_it_is_shown():
    torch.manual_seed(0)
    denoiser = MLPDenoiser(hidden_dim=8, num_layers=1, extra_channels=1, num_waves=5, wave_number=3.0)
    assert denoiser.waves.shape == (3, 5)
    assert "waves" in denoiser.state_dict()
    x, t = torch.randn(4, 3), torch.rand(4)
    phase = x @ denoiser.waves
    time = sinusoidal_embedding(t * 1000, 64)
    torch.testing.assert_close(denoiser(x, t), denoiser.layers(torch.cat([x, phase.sin(), phase.cos(), time], dim=1)))
    wide = MLPDenoiser(num_waves=20_000, wave_number=3.0).waves.std(dim=1)
    torch.testing.assert_close(wide, torch.full((2,), 3 * torch.pi), rtol=0.03, atol=0)


def test_a_denoiser_of_images_flattens_them():
    network = MLPDenoiser(6, 1, sample_shape=(2, 3, 4), extra_channels=1, learned_variance=True)
    assert network.sample_shape == (2, 3, 4)
    output = network(torch.randn(5, 3, 3, 4), torch.rand(5))
    assert output.shape == (5, 4, 3, 4)


def test_a_denoiser_says_what_it_is_shown_and_says():
    network = MLPDenoiser(6, sample_shape=(5,), extra_channels=2, learned_variance=True)
    assert (network.extra_channels, network.learned_variance) == (2, True)
    assert (MLPDenoiser(6).extra_channels, MLPDenoiser(6).learned_variance) == (0, False)
    with pytest.raises(ValueError, match=r"MLPDenoiser: needs a batch of shape \(N, 7\), got \(4, 5\)"):
        network(torch.randn(4, 5), torch.rand(4))


def test_what_a_denoiser_is_shown_beside_matters():
    network = MLPDenoiser(6, extra_channels=2)
    x_t, t = torch.randn(4, 4), torch.rand(4)
    changed = torch.cat([x_t[:, :2], torch.randn(4, 2)], dim=1)
    assert not torch.allclose(network(x_t, t), network(changed, t))


def test_the_null_class_is_one_more_than_the_classes():
    network = MLPDenoiser(6, num_classes=3)
    assert network.embedding.weight.shape[0] == 4
    predictions = network(X[:1].expand(4, -1), torch.full((4,), 0.5), torch.arange(4))
    assert all(not torch.allclose(predictions[3], predictions[i]) for i in range(3))
    with pytest.raises(IndexError):
        network(X[:1], torch.rand(1), torch.tensor([4]))


@pytest.mark.parametrize("build", [MLPDiscriminator, MLPDenoiser])
def test_a_network_without_waves_has_the_state_it_always_had(build):
    assert set(build(num_layers=1).state_dict()) == {
        "layers.0.weight",
        "layers.0.bias",
        "layers.2.weight",
        "layers.2.bias",
    }


@pytest.mark.parametrize("build", [MLPDiscriminator, MLPDenoiser])
@pytest.mark.parametrize("options", [{"num_waves": -1}, {"wave_number": 0.0}])
def test_wrong_waves_are_refused(build, options):
    with pytest.raises(ValueError, match=f"{build.__name__}: num_waves must not be negative and wave_number positive"):
        build(**options)


@pytest.mark.parametrize(("name", "kind"), [("silu", nn.SiLU), ("relu", nn.ReLU), ("tanh", nn.Tanh)])
def test_the_perceptrons_of_a_vae_have_the_activation_they_are_given(name, kind):
    for network in (MLPEncoder((2, 3), 4, activation=name), MLPDecoder((2, 3), 4, activation=name)):
        between = [layer for layer in network.layers if not isinstance(layer, nn.Linear)]
        assert {type(layer) for layer in between} == {kind}


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match=r"activation: must be one of \['silu', 'relu', 'tanh'\], got 'elu'"):
        MLPEncoder((2, 3), 4, activation="elu")


def test_the_layers_of_burda_et_al_have_their_sizes():
    encoder = MLPEncoder((1, 28, 28), latent_dim=50, hidden_dim=200, num_layers=2, activation="tanh")
    decoder = MLPDecoder((1, 28, 28), latent_dim=50, hidden_dim=200, num_layers=2, activation="tanh")
    sizes = [[layer.out_features for layer in n.layers if isinstance(layer, nn.Linear)] for n in (encoder, decoder)]
    assert sizes == [[200, 200, 100], [200, 200, 784]]


def test_a_perceptron_gives_as_many_parameters_a_value_as_asked_and_reads_the_label():
    decoder = MLPDecoder((1, 4, 6), latent_dim=3, num_classes=2, parameters_per_value=3)
    z = torch.randn(1, 3).expand(2, -1)
    output = decoder(z, torch.tensor([0, 1]))
    assert output.shape == (2, 3, 4, 6)
    assert not torch.equal(output[0], output[1])
    encoder = MLPEncoder((1, 4, 6), latent_dim=3, num_classes=2)
    mean, logvar = encoder(torch.zeros(2, 1, 4, 6), torch.tensor([0, 1]))
    assert not torch.equal(mean[0], mean[1])
    assert not torch.equal(logvar[0], logvar[1])
    for network, value in ((encoder, torch.zeros(2, 1, 4, 6)), (decoder, z)):
        with pytest.raises(ValueError, match=f"{type(network).__name__}: built with num_classes=2, so it needs labels"):
            network(value)
