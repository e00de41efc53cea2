"""The likelihood of a linear Gaussian model by importance sampling is the exact one; units are counted."""

from __future__ import annotations

import csv
import json
import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal
from torch.utils.data import DataLoader

from lit_generative.callbacks.likelihood_evaluation import LikelihoodEvaluation
from lit_generative.networks.conv_kl import ConvMapEncoder
from lit_generative.networks.conv_vae import ConvDecoder
from lit_generative.networks.conv_vq import ConvFeatureDecoder
from lit_generative.recipe import Recorded
from lit_generative.tensor_ops import from_uint8
from lit_generative.training.csv_logger import CSVLogger
from lit_generative.vae.discretized import DiscretizedLogistic
from lit_generative.vae.likelihoods import Gaussian
from lit_generative.vae.module import VAE
from lit_generative.vae.objectives import Elbo
from lit_generative.vae.priors import GaussianMixturePrior
from tests import processes, tiny
from tests.vae.test_adversarial_module import IMAGES, model

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
        self.offset = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        precision = 1 + self.weight.square().sum(dim=0) / SIGMA**2
        mean = x.flatten(start_dim=1) @ self.weight / SIGMA**2 / precision
        return mean + self.offset, 0.3 - precision.log().expand_as(mean)


def linear_vae(**options) -> VAE:
    decoder = LinearDecoder()
    return VAE(NearPosterior(decoder), decoder, Gaussian(SIGMA), Elbo(), tiny.ADAM, **options)


def score(tmp_path, module: VAE, callback: LikelihoodEvaluation, batch_size: int = 90, **options) -> dict[str, float]:
    trainer = tiny.trainer(tmp_path, callbacks=[callback], **options)
    (scores,) = trainer.test(module, tiny.digits(eval_batch_size=batch_size), verbose=False)
    return scores


def held_out() -> Tensor:
    data = tiny.digits()
    data.setup("test")
    return from_uint8(data.splits.test.image)


def exact_elbo(module: VAE, x: Tensor) -> Tensor:
    """``E log p(x|z) - KL(q || p)`` in closed form, ``(N,)``."""
    (mean, logvar), weight = module.posterior(x), module.decoder.weight
    error = (x.flatten(start_dim=1) - mean @ weight.T).square().sum(dim=1) + logvar.exp() @ weight.square().sum(dim=0)
    reconstruction = 0.5 * error / SIGMA**2 + 32 * math.log(2 * math.pi * SIGMA**2)
    return -(reconstruction + module.kl_by_dimension(mean, logvar).sum(dim=1)).detach()


def exact_nll(module: VAE) -> float:
    x = held_out().flatten(start_dim=1).double()
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


def test_the_mean_elbo_is_the_exact_one_and_below_the_likelihood_for_each_image(tmp_path):
    module, x = linear_vae(), held_out()
    scores = score(tmp_path, module, LikelihoodEvaluation(num_draws=600, chunk_size=200))
    assert scores["test/mean_elbo"] == pytest.approx(float(exact_elbo(module, x).mean()), abs=0.02)
    assert scores["test/nll"] < -scores["test/mean_elbo"] - 0.02
    torch.manual_seed(0)
    module, x = module.double(), x[:20].double()
    nll, elbo = LikelihoodEvaluation(chunk_size=500).bounds(module, x, None, 2000)
    assert (nll <= -elbo).all()
    torch.testing.assert_close(elbo, exact_elbo(module, x), rtol=0, atol=0.2)  # its deviation is about 0.04
    nll, elbo = LikelihoodEvaluation().bounds(module, x, None, 1)
    torch.testing.assert_close(nll, -elbo)


class Table:
    """Gives log-weights that are written down, one after the other."""

    def __init__(self, log_weight: Tensor) -> None:
        self.left = log_weight

    def log_importance_weights(self, x: Tensor, num_draws: int, y: Tensor | None = None) -> Tensor:
        given, self.left = self.left.split([num_draws, len(self.left) - num_draws])
        return given


@pytest.mark.parametrize("chunk_size", [1, 4, 11, 30])
def test_the_bounds_of_given_draws_do_not_depend_on_the_chunks(chunk_size):
    log_weight = 20 * torch.randn(11, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 900
    x = torch.zeros(5, 1, 2, 3, dtype=torch.float64)
    nll, elbo = LikelihoodEvaluation(chunk_size=chunk_size).bounds(Table(log_weight), x, None, 11)
    most = log_weight.amax(dim=0)
    torch.testing.assert_close(nll, -(most + (log_weight - most).exp().mean(dim=0).log()))
    torch.testing.assert_close(elbo, log_weight.mean(dim=0))


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


def test_units_are_counted_about_their_mean_over_all_batches(tmp_path):
    module = linear_vae()
    nn.init.constant_(module.encoder.offset, 30.0)
    for batch_size in (7, 180):
        assert score(tmp_path, module, LikelihoodEvaluation(num_draws=1), batch_size)["test/active_units"] == 2


@pytest.mark.parametrize(("distance", "active"), [(0.139, 0), (0.143, 1)])
def test_two_images_make_a_unit_active_if_half_their_squared_distance_is_above_a_hundredth(tmp_path, distance, active):
    module = linear_vae()
    per_pixel = module.posterior(torch.eye(64).reshape(64, 1, 8, 8))[0].detach()  # the mean is linear in the image
    x = torch.linalg.lstsq(per_pixel.T, torch.tensor([[distance], [0.0], [0.0]])).solution.reshape(1, 1, 8, 8)
    batches = [{"image": x, "label": torch.zeros(1)}, {"image": 0 * x, "label": torch.zeros(1)}]
    trainer = tiny.trainer(tmp_path, callbacks=[LikelihoodEvaluation(num_draws=1)])
    (scores,) = trainer.test(module, DataLoader(batches, batch_size=None), verbose=False)
    assert scores["test/active_units"] == active
    with pytest.raises(ValueError, match="a variance needs at least two images, got 1"):
        trainer.test(module, DataLoader(batches[:1], batch_size=None), verbose=False)


@pytest.mark.parametrize(("dim", "logged"), [(2, 32), (16, 256), (17, 0)])
def test_a_code_of_maps_is_evaluated_like_a_vector_and_a_long_one_is_not_logged_number_by_number(tmp_path, dim, logged):
    shape = IMAGES | {"dim": dim, "num_stages": 1, "num_blocks": 1}
    module = model(encoder=ConvMapEncoder(**shape), decoder=ConvFeatureDecoder(**shape))
    with torch.no_grad():
        module.encoder.features.layers[-1].weight *= 3  # so that some units follow the data
    scores = score(tmp_path, module, LikelihoodEvaluation(num_draws=60))
    kl = [value for name, value in scores.items() if name.startswith("test/kl_of_dimension/")]
    assert len(kl) == logged
    if kl:
        assert sum(kl) == pytest.approx(scores["test/kl"], rel=1e-5)
        assert scores["test/kl_of_dimension/031"] == kl[31]
    with torch.no_grad():
        variance = module.posterior(held_out())[0].flatten(start_dim=1).var(dim=0)
    assert scores["test/active_units"] == (variance > 0.01).sum()
    assert scores["test/active_units"] > 0
    bound = scores["test/reconstruction"] + scores["test/kl"]
    assert -scores["test/mean_elbo"] == pytest.approx(bound, rel=0.01)
    assert scores["test/nll"] < -scores["test/mean_elbo"]


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
    assert {"val/nll", "val/mean_elbo", "val/active_units"} <= set(run.callback_metrics)
    assert not [name for name in run.callback_metrics if "kl_of_dimension" in name]
    tiny.assert_same(tiny.weights(with_it), tiny.weights(bare))
    run = tiny.train(tmp_path, tiny.vae(), tiny.digits(), callbacks=[LikelihoodEvaluation()], **options)
    assert "val/active_units" in run.callback_metrics
    assert not {"val/nll", "val/mean_elbo"} & set(run.callback_metrics)


def test_the_scores_are_in_the_csv_file(tmp_path):
    logger = CSVLogger(str(tmp_path), name="run", version="0")
    score(tmp_path, linear_vae(), LikelihoodEvaluation(num_draws=2), logger=logger)
    (row,) = csv.DictReader(next(tmp_path.rglob("metrics.csv")).open())
    assert {"test/nll", "test/elbo", "test/mean_elbo", "test/active_units"} <= set(row)


def test_a_module_without_a_posterior_is_refused(tmp_path):
    with pytest.raises(TypeError, match="LikelihoodEvaluation: GAN has no posterior"):
        tiny.train(tmp_path, tiny.gan(), tiny.ring(), callbacks=[LikelihoodEvaluation()])


@pytest.mark.parametrize("name", ["num_draws", "val_draws", "chunk_size"])
def test_numbers_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        LikelihoodEvaluation(**{name: 0})


PROCESSES = """
import json, os, torch
from lit_generative.callbacks.likelihood_evaluation import LikelihoodEvaluation
from tests import families

torch.set_num_threads(1)
ranks = 2 if "LOCAL_RANK" in os.environ else 1
options = {"devices": ranks, "strategy": "ddp" if ranks > 1 else "auto"}
trainer = families.trainer(".", callbacks=[LikelihoodEvaluation(4)], **options)
data = families.digits(test_fraction=9 / 1797, val_fraction=0.1)
(found,) = trainer.test(families.build("vae"), data, verbose=False)
if trainer.is_global_zero:
    with open(f"{ranks}.json", "w") as file:
        json.dump({name: value for name, value in found.items() if "kl" in name or "active" in name}, file)
"""


@pytest.mark.slow
def test_processes_with_unequal_shares_give_the_figures_of_one(tmp_path):
    (tmp_path / "script.py").write_text(PROCESSES)
    for ranks in (1, 2):
        processes.run(tmp_path / "script.py", cwd=tmp_path, ranks=ranks)
    one, two = (json.loads((tmp_path / f"{ranks}.json").read_text()) for ranks in (1, 2))
    assert one == pytest.approx(two, rel=1e-5)
    assert one["test/kl_of_dimension/000"] > 0
