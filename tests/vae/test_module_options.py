"""Priors, flows, classes, learned likelihoods and objectives within the module: trained, saved, sampled, refused."""

from __future__ import annotations

import functools

import pytest
import torch

from lit_generative.callbacks.ema import EMA
from lit_generative.callbacks.latent_pictures import LatentPictures
from lit_generative.networks.conv_vae import ConvDecoder, ConvEncoder
from lit_generative.networks.mlp import MLPDecoder, MLPEncoder
from lit_generative.pictures import grid
from lit_generative.tensor_ops import sample_generators
from lit_generative.types import LatentCodec
from lit_generative.vae.flows import InverseAutoregressiveFlow
from lit_generative.vae.likelihoods import Bernoulli, Gaussian
from lit_generative.vae.module import VAE
from lit_generative.vae.objectives import Capacity, Elbo, ImportanceWeighted
from lit_generative.vae.priors import GaussianMixturePrior, VampPrior
from lit_generative.vae.regularizers import InfoVAE, TotalCorrelation
from tests import tiny


def conditional(**options) -> VAE:
    torch.manual_seed(0)
    encoder = MLPEncoder((1, 8, 8), latent_dim=3, hidden_dim=6, num_classes=10)
    return tiny.vae(encoder=encoder, decoder=MLPDecoder((1, 8, 8), 3, hidden_dim=6, num_classes=10), **options)


OPTIONS = {
    "free bits": {"objective": Elbo(free_bits=0.1)},
    "IWAE": {"objective": ImportanceWeighted(3)},
    "DReG": {"objective": ImportanceWeighted(3, doubly_reparameterized=True)},
    "capacity": {"objective": Capacity()},
    "total correlation": {"objective": TotalCorrelation(1400)},
    "InfoVAE": {"objective": InfoVAE()},
    "mixture": {"prior": GaussianMixturePrior(3, 4)},
    "VampPrior": {"prior": VampPrior((1, 8, 8), 4)},
    "IWAE with VampPrior": {"prior": VampPrior((1, 8, 8), 4), "objective": ImportanceWeighted(3, True)},
    "flow": {"flow": InverseAutoregressiveFlow(3, 4, 2)},
    "IWAE with flow and mixture": {
        "flow": InverseAutoregressiveFlow(3, 4, 2),
        "prior": GaussianMixturePrior(3, 4),
        "objective": ImportanceWeighted(3),
    },
}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("options", OPTIONS)
def test_each_trains_all_its_parameters_saves_and_comes_back(tmp_path, options, precision):
    module = tiny.vae(**OPTIONS[options])
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    trainer = tiny.train(tmp_path, module, tiny.digits(), max_steps=3, precision=precision)
    for name, p in module.named_parameters():
        assert p.isfinite().all()
        assert not torch.equal(p, before[name]), name
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = VAE.load_from_checkpoint(tmp_path / "a.ckpt")
    tiny.assert_same(tiny.weights(loaded), tiny.weights(module))
    samples = [m.sample(3, generator=sample_generators(1, 3)) for m in (module, loaded)]
    tiny.assert_same(*samples)
    assert type(loaded.objective) is type(module.objective)


@pytest.mark.parametrize("objective", [ImportanceWeighted(2), TotalCorrelation(1400), InfoVAE()])
def test_the_terms_of_an_objective_are_logged_apart(tmp_path, objective):
    run = tiny.train(tmp_path, tiny.vae(objective=objective), tiny.digits(), max_steps=1, limit_val_batches=1)
    names = {ImportanceWeighted: {"iwae"}, InfoVAE: {"mmd"}}.get(
        type(objective), {"mutual_information", "total_correlation", "dimension_kl"}
    )
    assert {f"train/{name}" for name in names} <= set(run.callback_metrics)


def test_samples_come_from_the_prior_and_the_average_holds_it(tmp_path):
    module = tiny.vae(prior=GaussianMixturePrior(3, 4))
    assert module.sampling_modules == ["encoder", "decoder", "prior"]
    z = module.prior.sample(4, 3, module.encoder, torch.Generator().manual_seed(3))
    tiny.assert_same(module.sample(4, generator=torch.Generator().manual_seed(3)), module.decode(z))
    tiny.train(tmp_path, module, tiny.digits(), callbacks=[EMA(half_life=100)], max_steps=2)
    assert tiny.vae().sampling_modules == ["encoder", "decoder"]


# ---- flows


def with_flow(**options) -> VAE:
    """A VAE whose flow is far from the identity."""
    module = tiny.vae(flow=InverseAutoregressiveFlow(3, 4, 2), **options)
    for p in module.flow.parameters():
        p.data.add_(torch.randn_like(p))
    return module


def test_a_flow_that_is_the_identity_changes_nothing():
    x, (plain, flowed) = torch.rand(4, 1, 8, 8), (tiny.vae(), with_flow())
    for step in flowed.flow.steps:
        step.output.weight.data.zero_()
        step.output.bias.data[3:] = 100.0
    given = []
    for module in (plain, flowed):
        torch.manual_seed(1)
        draws = module.draw(x, num_draws=2)
        torch.manual_seed(1)
        weights = module.log_importance_weights(x, num_draws=2)
        bound = [draws.z, draws.log_likelihood, draws.log_prior, draws.log_posterior, draws.log_weight, weights]
        given.append([*bound, module.posterior(x), module.encode(x), module.reconstruct(x)])
    torch.testing.assert_close(*given)
    torch.testing.assert_close(draws.kl, (draws.log_posterior - draws.log_prior).mean(dim=0))
    assert draws.kl_by_dimension is None
    assert flowed.kl_by_dimension(*flowed.posterior(x)) is None
    assert plain.kl_by_dimension(*plain.posterior(x)).shape == (4, 3)


def test_draws_come_from_the_gaussian_through_the_flow():
    module, x = with_flow(), torch.rand(4, 1, 8, 8)
    torch.manual_seed(1)
    draws = module.draw(x, num_draws=2)
    torch.manual_seed(1)
    mean, logvar = module.encoder(x)
    z0 = mean + (0.5 * logvar).exp() * torch.randn(2, 4, 3)
    z, log_det = module.flow(z0)
    torch.testing.assert_close((draws.mean, draws.logvar), (mean, logvar))
    torch.testing.assert_close((draws.z, draws.base.z0, draws.base.log_det), (z, z0, log_det))
    log_likelihood = module.likelihood.log_prob(module.decoder(z[1]), x)
    torch.testing.assert_close(draws.log_likelihood[1], log_likelihood)
    assert draws.log_weight.shape == (2, 4)


def test_a_reconstruction_goes_through_the_flow_and_a_sample_does_not():
    module, x = with_flow(), torch.rand(4, 1, 8, 8)
    mean, logvar = module.encoder(x)
    code = module.flow(mean[None])[0][0]
    assert not torch.allclose(code, mean, atol=0.1)
    torch.testing.assert_close(module.posterior(x), (mean, logvar))
    torch.testing.assert_close(module.encode(x), code.detach())
    torch.testing.assert_close(module.reconstruct(x), (2 * module.decoder(code).sigmoid() - 1).detach())
    tiny.assert_same(module.reconstruct(x), module.decode(module.encode(x)))
    z = torch.randn(4, 3, generator=torch.Generator().manual_seed(3))
    expected = (2 * module.decoder(z).sigmoid() - 1).detach()
    torch.testing.assert_close(module.sample(4, generator=torch.Generator().manual_seed(3)), expected)
    assert not module.encode(x).requires_grad
    assert tiny.vae().encode(x).shape == (4, 3)


def test_pictures_of_latents_go_through_the_flow():
    module, x = with_flow(), 2 * torch.rand(4, 1, 8, 8) - 1
    pictures = LatentPictures(num_columns=3, num_units=2).draw(module, x, None)
    expected = module.likelihood.mean(module.decoder(module.flow(module.encoder(x)[0][None])[0][0])).detach()
    difference = pictures["reconstructions"].int() - grid(torch.cat([x, expected]), columns=4).int()
    assert difference.abs().max() <= 1  # of 255, by rounding
    before = grid(torch.cat([x, module.decode(module.posterior(x)[0])]), columns=4).int()
    assert (pictures["reconstructions"].int() - before).abs().max() > 5


def test_autocast_leaves_the_flow_in_full_precision():
    module, x = with_flow(), torch.rand(4, 1, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        draws, code = module.draw(x, num_draws=2), module.encode(x)
    tiny.assert_same((draws.z, draws.base.log_det), module.flow(draws.base.z0))
    assert {value.dtype for value in (code, draws.z, draws.log_weight, draws.kl)} == {torch.float32}


def test_the_average_holds_the_flow(tmp_path):
    module, ema = with_flow(prior=GaussianMixturePrior(3, 4)), EMA(half_life=100)
    assert module.sampling_modules == ["encoder", "decoder", "flow", "prior"]
    tiny.train(tmp_path, module, tiny.digits(), callbacks=[ema], max_steps=2)
    assert {f"flow.{name}" for name, _ in module.flow.named_parameters()} <= set(ema.state_dict()["weights"]["ema"])


def test_a_model_with_classes_may_have_a_flow():
    module, x, y = conditional(flow=InverseAutoregressiveFlow(3, 4, 2)), torch.rand(2, 1, 8, 8), torch.tensor([4, 2])
    code = module.flow(module.encoder(x, y)[0][None])[0][0]
    torch.testing.assert_close(module.encode(x, y), code.detach())
    tiny.assert_same(module.reconstruct(x, y), module.decode(module.encode(x, y), y))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prior": VampPrior((1, 8, 8), 2)}, "VAE: VampPrior is made of posteriors, whose density after Inverse"),
        ({"objective": Elbo(free_bits=0.1)}, "free_bits=0.1 needs the KL of each dimension"),
        ({"objective": ImportanceWeighted(3, True)}, "doubly_reparameterized=True needs log q"),
        ({"objective": TotalCorrelation(1400)}, "TotalCorrelation: needs each draw's density"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_have_a_flow_refuses_it_when_the_model_is_built(options, message):
    with pytest.raises(ValueError, match=message):
        with_flow(**options)


def test_a_prior_of_another_length_is_refused():
    message = "VAE: the decoder and GaussianMixturePrior must have the same latent_dim, got 3 and 7"
    with pytest.raises(ValueError, match=message):
        tiny.vae(prior=GaussianMixturePrior(7, 2))
    tiny.vae(prior=GaussianMixturePrior(3, 2))


def test_a_flow_of_another_length_is_refused():
    message = "VAE: the decoder and InverseAutoregressiveFlow must have the same latent_dim, got 3 and 4"
    with pytest.raises(ValueError, match=message):
        tiny.vae(flow=InverseAutoregressiveFlow(4, 4, 1))


def test_latents_behind_a_flow_are_no_codec_for_another_model():
    assert isinstance(tiny.vae(), LatentCodec)
    assert tiny.vae().latent_shape == (3,)
    assert not isinstance(with_flow(), LatentCodec)


# ---- classes


def test_a_conditional_model_draws_the_classes_it_is_asked_for(tmp_path):
    module = conditional()
    tiny.train(tmp_path, module, tiny.digits(), max_steps=2, limit_val_batches=1)
    assert module.num_classes == 10
    noise = lambda: torch.Generator().manual_seed(0)  # noqa: E731
    first, second = (module.sample(5, torch.full((5,), c), noise()) for c in (1, 7))
    assert not torch.equal(first, second)
    labels = torch.tensor([4, 2])
    z = module.prior.sample(2, 3, module.encoder, noise())
    tiny.assert_same(module.sample(2, labels, noise()), module.decode(z, labels))
    assert module.sample(3).shape == (3, 1, 8, 8)
    x = torch.rand(2, 1, 8, 8)
    assert not torch.equal(module.reconstruct(x, labels), module.reconstruct(x, labels.flip(0)))


def test_each_draw_is_decoded_with_the_label_of_its_own_example():
    module = conditional()
    x, y = torch.rand(3, 1, 8, 8), torch.tensor([5, 0, 9])
    torch.manual_seed(0)
    draws = module.draw(x, num_draws=4, y=y)
    for k in range(4):
        output = module.decoder(draws.z[k], y)
        torch.testing.assert_close(draws.log_likelihood[k], module.likelihood.log_prob(output, x))


# ---- refusals


@pytest.mark.parametrize(
    ("encoder", "decoder", "message"),
    [
        ({"num_classes": 10}, {}, "must have the same num_classes, got 10 and None"),
        ({}, {"latent_dim": 4}, "must have the same latent_dim, got 3 and 4"),
    ],
)
def test_networks_that_do_not_fit_are_refused(encoder, decoder, message):
    with pytest.raises(ValueError, match=message):
        VAE(
            ConvEncoder(**({"image_size": 8, "channels": 1, "latent_dim": 3, "width": 4} | encoder)),
            ConvDecoder(**({"image_size": 8, "channels": 1, "latent_dim": 3, "width": 4} | decoder)),
            Bernoulli(),
            Elbo(),
            tiny.ADAM,
        )


def test_pseudo_inputs_have_no_class():
    with pytest.raises(ValueError, match=r"VampPrior's pseudo-inputs have no class\. Leave num_classes out"):
        conditional(prior=VampPrior((1, 8, 8), 2))


def test_images_that_a_likelihood_cannot_score_are_refused_at_the_first_batch(tmp_path):
    module, seen = tiny.vae(), []
    bright = {"image": torch.full((2, 1, 8, 8), 1.5), "label": torch.zeros(2, dtype=torch.int64)}
    with pytest.raises(ValueError, match="Bernoulli"):
        tiny.trainer(tmp_path, max_steps=1).fit(module, torch.utils.data.DataLoader([bright], batch_size=None))
    checked = tiny.vae(likelihood=Gaussian())
    checked.likelihood.check = lambda x: seen.append(len(x))
    tiny.train(tmp_path, checked, tiny.digits(), max_steps=3)
    assert seen == [6]


def test_pseudo_inputs_begin_with_training_images_and_a_resumed_run_keeps_its_own(tmp_path):
    def model():
        return tiny.vae(
            prior=VampPrior((1, 8, 8), 5, from_data=True), optimizer=functools.partial(torch.optim.SGD, lr=0.0)
        )

    module, data = model(), tiny.digits()
    before = module.prior.pseudo_inputs.detach().clone()
    run = tiny.train(tmp_path, module, data)
    total = data.num_examples("train")
    first = data.examples("train", torch.tensor([0, total - 1])).float() / 127.5 - 1
    torch.testing.assert_close(module.prior.pseudo_inputs[[0, -1]].tanh(), 0.95 * first)
    with torch.no_grad():
        module.prior.pseudo_inputs.copy_(before)
    run.save_checkpoint(tmp_path / "a.ckpt")
    resumed = model()
    tiny.train(tmp_path, resumed, tiny.digits(), max_steps=5, ckpt_path=tmp_path / "a.ckpt")
    torch.testing.assert_close(resumed.prior.pseudo_inputs.detach(), before)


@pytest.mark.parametrize("prior", [GaussianMixturePrior(3, 2), VampPrior((1, 8, 8), 2)])
@pytest.mark.parametrize(
    ("objective", "message"),
    [(Elbo(free_bits=0.1), "free_bits=0.1 needs the KL of each"), (TotalCorrelation(9), "prior of independent dimen")],
)
def test_a_prior_that_the_objective_has_no_kl_of_is_refused_when_the_model_is_built(prior, objective, message):
    with pytest.raises(ValueError, match=f"{type(objective).__name__}: .*{message}.*{type(prior).__name__}"):
        tiny.vae(prior=prior, objective=objective)
    tiny.vae(objective=objective)
