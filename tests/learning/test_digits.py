"""Each family learns scikit-learn's digits, with the config we ship, in well under a minute.

The bounds are loose. Seeds 0 to 2 gave a distance ratio of 1.56 to 1.58 and 28 to 86 samples of each digit (GAN, after
300 updates); a test ELBO of -24.1 to -24.5 nats, and -27.2 without latents (VAE, 600); a perplexity of 49 to 53 codes,
an error of 0.089 to 0.099 and an agreement of 0.42 to 0.44 (VQ-VAE, 500); an agreement of 0.48 to 0.56 and a ratio of
2.3 to 2.4 (DDPM, 150; by chance 0.1). What they catch is a method that trains without an error and learns nothing.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from lit_generative.__main__ import main
from lit_generative.data.digits import Digits
from lit_generative.loading import load_module
from lit_generative.tensor_ops import from_uint8, perplexity
from lit_generative.training.module import GenerativeModule

pytestmark = pytest.mark.slow
CONFIGS = Path(__file__).parents[2] / "configs"
EVALUATION = [
    {"class_path": "lit_generative.callbacks.ema.EMA", "init_args": {"half_life": 10000}},
    {
        "class_path": "lit_generative.callbacks.likelihood_evaluation.LikelihoodEvaluation",
        "init_args": {"num_draws": 100},
    },
]
"""The config's callbacks at the test of the VAE, but with 100 draws of 5,000."""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def train(config: str, steps: int, *schedules: str) -> GenerativeModule:
    options = [f"--model.init_args.{name}.init_args.total_steps={steps}" for name in schedules]
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu", f"--trainer.max_steps={steps}"]
    assert main(["fit", "--config", str(CONFIGS / config), *quiet, *options]) == 0
    return load_module("runs")


def real(image_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Training images, their labels and test images, flattened."""
    data = Digits(image_size=image_size, resize="stretch")
    data.setup("fit")
    train, test = data.splits.train, data.splits.test
    return from_uint8(train.image).flatten(1), train.label, from_uint8(test.image).flatten(1)


def distance_ratio(samples: Tensor, train: Tensor, test: Tensor) -> float:
    """Mean distance to the nearest training image, in that of held-out images."""
    return float(torch.cdist(samples, train).amin(1).mean() / torch.cdist(test, train).amin(1).mean())


def test_the_gan_draws_every_digit_and_nothing_far_from_digits():
    module = train("gan/dcgan_digits.yaml", 300, "generator_scheduler", "discriminator_scheduler")
    images, labels, test = real(16)
    samples = module.sample(500, generator=torch.Generator().manual_seed(0)).flatten(1)
    assert distance_ratio(2 * torch.rand(500, 256) - 1, images, test) > 3  # what noise would give
    assert distance_ratio(samples, images, test) < 1.8
    counts = torch.bincount(torch.tensor(KNeighborsClassifier(3).fit(images, labels).predict(samples)), minlength=10)
    assert counts.min() >= 5
    assert counts.max() <= 200


def test_the_vae_beats_the_best_model_without_latents():
    train("vae/vae_digits.yaml", 600, "scheduler")
    config = ["--config", str(CONFIGS / "vae/vae_digits.yaml"), "--trainer.enable_progress_bar=false"]
    few = f"--trainer.callbacks={json.dumps(EVALUATION)}"
    assert main(["test", *config, "--ckpt_path", "last", "--trainer.accelerator=cpu", few]) == 0
    (row,) = csv.DictReader(next(Path("runs").rglob("test/metrics.csv")).open())
    images, _, test = real(8)
    mean = (0.5 * (images + 1)).mean(0).clamp(1e-3, 1 - 1e-3)
    pixels = torch.distributions.Bernoulli(mean, validate_args=False)
    independent = float(pixels.log_prob(0.5 * (test + 1)).sum(1).mean())
    assert float(row["test/elbo"]) > independent + 2
    assert independent + 2 < float(row["test/mean_elbo"]) < -float(row["test/nll"]) < 0


def test_the_vqvae_uses_its_codes_and_draws_the_digit_it_is_asked_for():
    module = train("vae/vqvae_digits.yaml", 500, "scheduler")
    images, labels, test = real(8)
    x = test.view(-1, 1, 8, 8)
    assert float(perplexity(module.encode(x).flatten().bincount(minlength=64))) > 30
    assert (module.reconstruct(x) - x).square().mean() < 0.15 * (images.mean(0) - test).square().mean()
    classes = torch.arange(200) % 10
    samples = module.sample(200, classes, torch.Generator().manual_seed(0)).flatten(1)
    judged = torch.tensor(KNeighborsClassifier(3).fit(images, labels).predict(samples))
    assert (judged == classes).float().mean() > 0.3


def test_the_ddpm_draws_the_digit_it_is_asked_for():
    module = train("diffusion/ddpm_digits.yaml", 150, "scheduler")
    module.sampler.num_steps = 20
    images, labels, test = real(16)
    classes = torch.arange(200) % 10
    samples = module.sample(200, classes, torch.Generator().manual_seed(0)).flatten(1)
    judged = torch.tensor(KNeighborsClassifier(3).fit(images, labels).predict(samples))
    assert (judged == classes).float().mean() > 0.3
    assert distance_ratio(samples, images, test) < 2.75
