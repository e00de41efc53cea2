"""The likelihood of a linear Gaussian model by importance sampling is the exact one; units are counted."""

from __future__ import annotations

import csv
import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from lit_generative.callbacks.likelihood_evaluation import LikelihoodEvaluation
from lit_generative.networks.conv_vae import ConvDecoder
from lit_generative.recipe import Recorded
from lit_generative.tensor_ops import from_uint8
from lit_generative.training.csv_logger import CSVLogger
from lit_generative.vae.discretized import DiscretizedLogistic
from lit_generative.vae.likelihoods import Gaussian
from lit_generative.vae.module import VAE
from lit_generative.vae.objectives import Elbo
from lit_generative.vae.priors import GaussianMixturePrior
from tests import tiny

SIGMA = 0.5


class LinearDecoder(Recorded, nn.Module):
    """Three latents to 64 pixels; the third moves nothing."""

    latent_dim = 3

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        basis, _ = torch.linalg.qr(torch.randn(64, 3, generator=generator))
        self.weight = nn.Parameter(basis * torch.tensor([2.0, 1.0, 0.0]))

    def forward(self, z: Tensor) -> Tensor:
        return (z @ self.weight.T).reshape(-1, 1, 8, 8)


class NearPosterior(Recorded, nn.Module):
    """The posterior of the decoder and Gaussian noise, but a little too wide."""

    def __init__(self, decoder: LinearDecoder) -> None:
        super().__init__()
        self.weight = nn.Parameter(decoder.weight.detach().clone())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        precision = 1 + self.weight.square().sum(dim=0) / SIGMA**2
        mean = x.flatten(start_dim=1) @ self.weight / SIGMA**2 / precision
        return mean, 0.3 - precision.log().expand_as(mean)


def linear_vae(**options) -> VAE:
    decoder = LinearDecoder()
    return VAE(NearPosterior(decoder), decoder, Gaussian(SIGMA), Elbo(), tiny.ADAM, **options)


def score(tmp_path, module: VAE, callback: LikelihoodEvaluation, batch_size: int = 90, **options) -> dict[str, float]:
    trainer = tiny.trainer(tmp_path, callbacks=[callback], **options)
    (scores,) = trainer.test(module, tiny.digits(eval_batch_size=batch_size), verbose=False)
    return scores


def exact_nll(module: VAE) -> float:
    data = tiny.digits()
    data.setup("test")
    x = from_uint8(data.splits.test.image).flatten(start_dim=1).double()
    weight = module.decoder.weight.detach().double()
    covariance = weight @ weight.T + SIGMA**2 * torch.eye(64, dtype=torch.float64)
    return -float(MultivariateNormal(torch.zeros(64, dtype=torch.float64), covariance).log_prob(x).mean())


def test_the_estimate_is_the_exact_likelihood_and_above_it_with_few_draws(tmp_path):
    module = linear_vae()
    exact = exact_nll(module)
    many = score(tmp_path, module, LikelihoodEvaluation(num_draws=5000, chunk_size=500))
    assert many["test/nll"] == pytest.approx(exact, abs=0.01)
    few = score(tmp_path, module, LikelihoodEvaluation(num_draws=2))
    assert few["test/nll"] > exact + 0.02


def test_chunks_change_nothing_but_the_draws_and_the_same_seed_gives_the_same_number(tmp_path):
    module = linear_vae()
    first, again = (score(tmp_path, module, LikelihoodEvaluation(num_draws=50, chunk_size=7)) for _ in range(2))
    assert first == again
    other = score(tmp_path, module, LikelihoodEvaluation(num_draws=50, chunk_size=7, seed=1))
    assert other["test/nll"] != first["test/nll"]
    whole = score(tmp_path, module, LikelihoodEvaluation(num_draws=50, chunk_size=50))
    assert whole["test/nll"] == pytest.approx(first["test/nll"], abs=0.05)


def test_each_chunk_is_no_larger_than_asked(tmp_path, monkeypatch):
    sizes = []
    weights = VAE.log_importance_weights
    monkeypatch.setattr(
        VAE, "log_importance_weights", lambda self, x, num, y=None: sizes.append(num) or weights(self, x, num, y)
    )
    score(tmp_path, linear_vae(), LikelihoodEvaluation(num_draws=10, chunk_size=4))
    assert sizes == [4, 4, 2] * 2


def test_units_that_follow_the_data_are_active_and_the_kl_of_each_is_logged(tmp_path):
    scores = score(tmp_path, linear_vae(), LikelihoodEvaluation(num_draws=1))
    assert scores["test/active_units"] == 2
    kl = [scores[f"test/kl_of_dimension/{i:03d}"] for i in range(3)]
    assert sum(kl) == pytest.approx(scores["test/kl"], rel=1e-5)
    assert kl[2] == pytest.approx(0.5 * (math.exp(0.3) - 0.3 - 1), rel=1e-4)
    mixed = score(tmp_path, linear_vae(prior=GaussianMixturePrior(3, 2)), LikelihoodEvaluation(num_draws=1))
    assert not [name for name in mixed if "kl_of_dimension" in name]


def test_a_collapsed_posterior_is_warned_of(tmp_path):
    module = linear_vae()
    torch.nn.init.zeros_(module.encoder.weight)
    with pytest.warns(UserWarning, match="none of 3 latent units is active: the posterior has collapsed"):
        scores = score(tmp_path, module, LikelihoodEvaluation(num_draws=1))
    assert scores["test/active_units"] == 0


def test_bits_per_dimension_are_logged_for_pixels_alone(tmp_path):
    callback = LikelihoodEvaluation(num_draws=3)
    assert "test/bits_per_dim" not in score(tmp_path, linear_vae(), callback)
    decoder = ConvDecoder(8, 1, latent_dim=3, width=8, parameters_per_value=2)
    module = tiny.vae(decoder=decoder, likelihood=DiscretizedLogistic())
    scores = score(tmp_path, module, callback)
    assert scores["test/bits_per_dim"] == pytest.approx(scores["test/nll"] / (64 * math.log(2)), rel=1e-5)


def test_validation_estimates_a_likelihood_if_asked_and_training_sees_the_same_numbers(tmp_path):
    options = {"max_steps": 2, "val_check_interval": 1, "limit_val_batches": 1}
    bare, with_it = tiny.vae(), tiny.vae()
    tiny.train(tmp_path, bare, tiny.digits(), **options)
    run = tiny.train(
        tmp_path, with_it, tiny.digits(), callbacks=[LikelihoodEvaluation(num_draws=9, val_draws=4)], **options
    )
    assert {"val/nll", "val/active_units"} <= set(run.callback_metrics)
    tiny.assert_same(tiny.weights(with_it), tiny.weights(bare))
    run = tiny.train(tmp_path, tiny.vae(), tiny.digits(), callbacks=[LikelihoodEvaluation()], **options)
    assert "val/active_units" in run.callback_metrics
    assert "val/nll" not in run.callback_metrics


def test_the_scores_are_in_the_csv_file(tmp_path):
    logger = CSVLogger(str(tmp_path), name="run", version="0")
    score(tmp_path, linear_vae(), LikelihoodEvaluation(num_draws=2), logger=logger)
    (row,) = csv.DictReader(next(tmp_path.rglob("metrics.csv")).open())
    assert {"test/nll", "test/elbo", "test/active_units"} <= set(row)


def test_a_module_without_a_posterior_is_refused(tmp_path):
    with pytest.raises(TypeError, match="LikelihoodEvaluation: GAN has no posterior"):
        tiny.train(tmp_path, tiny.gan(), tiny.ring(), callbacks=[LikelihoodEvaluation()])


@pytest.mark.parametrize("name", ["num_draws", "val_draws", "chunk_size"])
def test_numbers_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        LikelihoodEvaluation(**{name: 0})
