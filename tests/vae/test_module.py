from functools import partial

import lightning as L
import pytest
import torch
from torch.distributions import MultivariateNormal
from torch.optim import Adam
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader

from lit_generative.callbacks.likelihood_evaluation import LikelihoodEvaluation
from lit_generative.networks.conv_vae import ConvDecoder, ConvEncoder
from lit_generative.networks.conv_vq import ConvFeatureDecoder
from lit_generative.networks.mlp import MLPDecoder, MLPEncoder
from lit_generative.recipe import Recorded
from lit_generative.tensor_ops import derive_seed, sample_generators
from lit_generative.training.run import global_seed
from lit_generative.vae.flows import InverseAutoregressiveFlow
from lit_generative.vae.likelihoods import Bernoulli, Gaussian
from lit_generative.vae.module import VAE
from lit_generative.vae.objectives import Elbo

SHAPE = (2, 3, 4)
SIGMA = 0.6


class LinearDecoder(Recorded, torch.nn.Module):
    """Two latents to six pixels, by a matrix with orthogonal columns: the true posterior is diagonal."""

    latent_dim = 2

    def __init__(self) -> None:
        super().__init__()
        basis, _ = torch.linalg.qr(torch.randn(6, 2, generator=torch.Generator().manual_seed(0)))
        self.weight = torch.nn.Parameter(basis * torch.tensor([1.5, 0.4]))

    def forward(self, z):
        return (z @ self.weight.T).reshape(-1, 1, 2, 3)


class TruePosterior(Recorded, torch.nn.Module):
    """The posterior of a linear decoder and Gaussian noise of standard deviation 0.6; states no ``latent_dim``."""

    def __init__(self, decoder: LinearDecoder) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(decoder.weight.detach().clone())

    def forward(self, x):
        precision = 1 + self.weight.square().sum(dim=0) / SIGMA**2
        mean = x.flatten(start_dim=1) @ self.weight / SIGMA**2 / precision
        return mean, -precision.log().expand_as(mean)


def mlp_vae(**options) -> VAE:
    torch.manual_seed(0)
    defaults = {"likelihood": Bernoulli(), "objective": Elbo(), "optimizer": partial(Adam, lr=0.01)}
    return VAE(
        MLPEncoder(SHAPE, latent_dim=5, hidden_dim=8, num_layers=1),
        MLPDecoder(SHAPE, latent_dim=5, hidden_dim=6, num_layers=1),
        **{**defaults, **options},
    )


def images(*sizes: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {"image": 2 * torch.rand(n, *SHAPE, generator=generator) - 1, "label": torch.zeros(n, dtype=torch.int64)}
        for n in sizes
    ]


def loader(data: list[dict[str, torch.Tensor]]) -> DataLoader:
    return DataLoader(data, batch_size=None)


def trainer(**options) -> L.Trainer:
    silent = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return L.Trainer(accelerator="cpu", max_epochs=1, log_every_n_steps=1, **silent, **options)


def fit(module: VAE, data: list[dict[str, torch.Tensor]], **options) -> L.Trainer:
    run = trainer(max_steps=len(data), **options)
    run.fit(module, loader(data))
    return run


# ---- the bound


@pytest.mark.parametrize("num_draws", [1, 3])
def test_draws_from_the_true_posterior_give_the_evidence(num_draws):
    torch.manual_seed(0)
    decoder = LinearDecoder()
    module = VAE(TruePosterior(decoder), decoder, Gaussian(sigma=SIGMA), Elbo(), Adam)
    x = torch.randn(4, 1, 2, 3, generator=torch.Generator().manual_seed(1))
    covariance = decoder.weight @ decoder.weight.T + SIGMA**2 * torch.eye(6)
    log_evidence = MultivariateNormal(torch.zeros(6), covariance).log_prob(x.flatten(start_dim=1))
    draws = module.draw(x, num_draws)
    evidence = draws.log_likelihood + draws.log_prior - draws.log_posterior  # Bayes' rule
    torch.testing.assert_close(evidence, log_evidence.expand(num_draws, 4))


def test_kl_is_what_the_draws_say_on_average():
    torch.manual_seed(0)
    draws = mlp_vae().draw(images(3)[0]["image"], num_draws=20_000)
    assert draws.log_likelihood.shape == draws.log_prior.shape == draws.log_posterior.shape == (20_000, 3)
    torch.testing.assert_close(draws.kl, (draws.log_posterior - draws.log_prior).mean(dim=0), rtol=0, atol=0.03)


def test_the_likelihood_estimated_behind_a_flow_is_the_evidence():
    torch.manual_seed(0)
    decoder, flow = LinearDecoder(), InverseAutoregressiveFlow(latent_dim=2, hidden_dim=6, num_steps=2)
    module = VAE(TruePosterior(decoder), decoder, Gaussian(sigma=SIGMA), Elbo(), Adam, flow=flow)
    x = torch.randn(4, 1, 2, 3, generator=torch.Generator().manual_seed(1))
    covariance = decoder.weight @ decoder.weight.T + SIGMA**2 * torch.eye(6)
    log_evidence = MultivariateNormal(torch.zeros(6), covariance).log_prob(x.flatten(start_dim=1))
    with torch.no_grad():
        nll, elbo = LikelihoodEvaluation(chunk_size=2000).bounds(module, x, None, 20_000)
    torch.testing.assert_close(-nll, log_evidence, rtol=0, atol=0.02)
    assert (elbo < log_evidence - 0.1).all()  # the flow has moved the true posterior away


def test_gradients_reach_encoder_and_decoder():
    torch.manual_seed(0)
    module = mlp_vae()
    module.objective.loss(module.draw(images(3)[0]["image"], 2)).mean().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


# ---- training


def test_an_update_equals_a_bare_pytorch_step():
    (batch,) = data = images(4)
    module, bare = mlp_vae(objective=Elbo(beta=3.0)), mlp_vae()
    run = fit(module, data)

    torch.manual_seed(derive_seed("train", global_seed(), 0, 0))
    optimizer = Adam([*bare.encoder.parameters(), *bare.decoder.parameters()], lr=0.01)
    mean, logvar = bare.encoder(batch["image"])
    posterior = torch.distributions.Normal(mean, logvar.exp().sqrt())
    output = bare.decoder(posterior.rsample())
    p = output.sigmoid()
    pixel = 0.5 * (batch["image"] + 1)
    reconstruction = -(pixel * p.log() + (1 - pixel) * (1 - p).log()).sum(dim=(1, 2, 3))
    kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum(dim=1)
    (reconstruction + 3 * kl).mean().backward()
    optimizer.step()

    torch.testing.assert_close(module.state_dict(), bare.state_dict())
    expected = {
        "train/loss": reconstruction + 3 * kl,
        "train/reconstruction": reconstruction,
        "train/kl": kl,
        "train/elbo": -(reconstruction + kl),
    }
    torch.testing.assert_close(dict(run.callback_metrics), {k: v.detach().mean() for k, v in expected.items()})
    assert run.global_step == 1


def test_an_objective_gets_the_draws_it_asks_for():
    module, seen = mlp_vae(objective=Elbo(num_draws=7)), []
    module.decoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    run = trainer(max_steps=1)
    run.fit(module, loader(images(4)))
    run.validate(module, loader(images(3)), verbose=False)
    assert seen == [(28, 5), (21, 5)]


def test_the_schedule_steps_once_an_update():
    run = fit(mlp_vae(scheduler=partial(StepLR, step_size=1, gamma=0.5)), images(4, 4))
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0025)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_run_gives_float32_samples_and_finite_weights(precision):
    torch.manual_seed(0)
    encoder, decoder = (cls(8, channels=2, latent_dim=5, width=4, num_stages=1) for cls in (ConvEncoder, ConvDecoder))
    module = VAE(encoder, decoder, Gaussian(sigma=0.5), Elbo(), partial(Adam, lr=0.01))
    before = {name: value.detach().clone() for name, value in module.named_parameters()}
    run = fit(module, [{"image": torch.rand(6, 2, 8, 8), "label": torch.zeros(6)}] * 2, precision=precision)
    for name, value in module.named_parameters():
        assert value.dtype == torch.float32
        assert value.isfinite().all()
        assert not torch.equal(value, before[name]), name
    assert all(value.dtype == torch.float32 for value in run.callback_metrics.values())
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        assert module.sample(3).dtype == torch.float32
        assert module.reconstruct(torch.rand(3, 2, 8, 8)).dtype == torch.float32


# ---- evaluation


@pytest.mark.parametrize("stage", ["val", "test"])
def test_held_out_terms_are_means_over_the_whole_set(stage):
    module, data, run = mlp_vae(objective=Elbo(beta=3.0)), images(2, 6), trainer()
    (run.validate if stage == "val" else run.test)(module, loader(data), verbose=False)
    metrics = {name.removeprefix(f"{stage}/"): value for name, value in run.callback_metrics.items()}
    assert set(metrics) == {"loss", "reconstruction", "kl", "elbo"}
    with torch.no_grad():
        kl = module.draw(torch.cat([batch["image"] for batch in data]), 1).kl  # the only term without a draw
    torch.testing.assert_close(metrics["kl"], kl.mean())
    torch.testing.assert_close(metrics["elbo"], -metrics["reconstruction"] - metrics["kl"])
    torch.testing.assert_close(metrics["loss"], metrics["reconstruction"] + 3 * metrics["kl"])


# ---- refusals


def test_networks_with_different_latents_are_refused():
    with pytest.raises(ValueError, match="must have the same latent_dim, got 5 and 4"):
        VAE(MLPEncoder(SHAPE, latent_dim=5), MLPDecoder(SHAPE, latent_dim=4), Bernoulli(), Elbo(), Adam)


def test_latents_that_are_maps_are_refused():
    with pytest.raises(ValueError, match=r"decoder must have a latent_dim, .* ConvFeatureDecoder has none"):
        VAE(MLPEncoder(SHAPE, latent_dim=5), ConvFeatureDecoder(8, 1, dim=4, width=8), Bernoulli(), Elbo(), Adam)


def test_labels_are_refused():
    with pytest.raises(ValueError, match="unconditional, so it takes no label"):
        mlp_vae().sample(2, label=torch.tensor([0, 1]))


# ---- samples and reconstructions


def test_samples_are_the_expected_images_of_the_noise():
    module = mlp_vae()
    z = torch.randn(3, 5, generator=torch.Generator().manual_seed(7))
    samples = module.sample(3, generator=torch.Generator().manual_seed(7))
    assert samples.shape == (3, *SHAPE)
    assert not samples.requires_grad
    torch.testing.assert_close(samples, (2 * module.decoder(z).sigmoid() - 1).detach())


def test_a_sample_does_not_depend_on_its_batch():
    module = mlp_vae()
    together = module.sample(8, generator=sample_generators(5, 8))
    apart = [module.sample(n, generator=sample_generators(5, n, start)) for n, start in ((3, 0), (5, 3))]
    torch.testing.assert_close(together, torch.cat(apart))


def test_reconstructions_are_the_expected_images_at_the_mean_of_the_posterior():
    module, x = mlp_vae(), images(4)[0]["image"]
    expected = 2 * module.decoder(module.encoder(x)[0]).sigmoid() - 1
    torch.testing.assert_close(module.reconstruct(x), expected.detach())
    torch.testing.assert_close(module.reconstruct(x), module.reconstruct(x), rtol=0, atol=0)
    assert not module.reconstruct(x).requires_grad


def test_samples_and_reconstructions_stay_in_the_range_of_images():
    module = mlp_vae(likelihood=Gaussian())
    for parameter in module.decoder.parameters():
        parameter.data.mul_(100)
    for x in (module.sample(20), module.reconstruct(images(20)[0]["image"])):
        assert x.min() == -1
        assert x.max() == 1


def test_sampling_and_reconstruction_are_in_evaluation_mode_and_leave_the_model_as_it_was():
    module, modes = mlp_vae().train(), []
    module.decoder.layers[0].eval()
    for network in (module.encoder, module.decoder):
        network.register_forward_pre_hook(lambda net, _: modes.extend(m.training for m in net.modules()))
    flags = [m.training for m in module.modules()]
    module.sample(2)
    module.reconstruct(images(2)[0]["image"])
    assert modes
    assert not any(modes)
    assert [m.training for m in module.modules()] == flags


def test_both_networks_are_averaged():
    assert mlp_vae().sampling_modules == ["encoder", "decoder"]


# ---- checkpoints


def test_a_reloaded_checkpoint_gives_the_same_samples_and_settings(tmp_path):
    module = mlp_vae(likelihood=Gaussian(sigma=0.3), objective=Elbo(beta=2.0))
    fit(module, images(4, 4)).save_checkpoint(tmp_path / "vae.ckpt")
    loaded = VAE.load_from_checkpoint(tmp_path / "vae.ckpt")
    assert (loaded.likelihood.sigma, loaded.objective.beta, loaded.latent_dim) == (0.3, 2.0, 5)
    assert loaded.configure_optimizers()["optimizer"].defaults["lr"] == 0.01
    samples = [m.sample(4, generator=sample_generators(3, 4)) for m in (module, loaded)]
    torch.testing.assert_close(*samples, rtol=0, atol=0)
    x = images(3)[0]["image"]
    torch.testing.assert_close(module.reconstruct(x), loaded.reconstruct(x), rtol=0, atol=0)
