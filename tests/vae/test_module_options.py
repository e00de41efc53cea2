"""Priors, classes, learned likelihoods and objectives within the module: trained, saved, sampled, refused."""

from __future__ import annotations

import pytest
import torch

from lit_generative.callbacks.ema import EMA
from lit_generative.networks.conv_vae import ConvDecoder, ConvEncoder
from lit_generative.networks.mlp import MLPDecoder, MLPEncoder
from lit_generative.tensor_ops import sample_generators
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
