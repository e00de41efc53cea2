from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins import MixedPrecision as Plugin
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader

from lit_generative.callbacks.ema import EMA, averaged_weights
from lit_generative.loading import load_module
from lit_generative.networks.conv_kl import ConvMapEncoder
from lit_generative.networks.conv_vae import ConvDecoder, ConvEncoder
from lit_generative.networks.conv_vq import ConvFeatureDecoder
from lit_generative.networks.dcgan import DCGANDiscriminator
from lit_generative.networks.patch_discriminator import PatchDiscriminator
from lit_generative.recipe import Recorded
from lit_generative.tensor_ops import derive_seed, sample_generators
from lit_generative.training.checkpoint_io import SafeCheckpointIO, load_checkpoint
from lit_generative.training.run import global_seed
from lit_generative.types import (
    LatentCodec,
    SupportsAveraging,
    SupportsCapacity,
    SupportsKLSchedule,
    SupportsLatents,
    SupportsLikelihood,
    SupportsReconstruction,
    SupportsSampling,
)
from lit_generative.vae.adversarial_module import AdversarialVAE
from lit_generative.vae.discretized import DiscretizedLogistic
from lit_generative.vae.gaussians import LearnedGaussian
from lit_generative.vae.likelihoods import Bernoulli, Gaussian
from tests import families, processes, tiny
from tests.gan.test_training_step import Waits
from tests.test_resume import assert_same
from tests.vae import adversarial_process

IMAGES = {"image_size": 8, "channels": 1, "width": 4}
ALWAYS = {"reconstruction", "kl"}
JUDGED = {"generator_loss", "discriminator_loss", "real_logits", "fake_logits"}


def model(latent: str = "maps", seed: int = 0, **options) -> AdversarialVAE:
    """On 1x8x8 images: vectors judged by one logit, or maps judged by four."""
    torch.manual_seed(seed)
    if latent == "maps":
        shape = IMAGES | {"num_stages": 1}
        networks = {
            "encoder": ConvMapEncoder(dim=2, num_blocks=1, **shape),
            "decoder": ConvFeatureDecoder(dim=2, num_blocks=1, **shape),
            "discriminator": PatchDiscriminator(batch_norm=False, **shape),
        }
    else:
        networks = {
            "encoder": ConvEncoder(latent_dim=3, **IMAGES),
            "decoder": ConvDecoder(latent_dim=3, **IMAGES),
            "discriminator": DCGANDiscriminator(batch_norm=False, **IMAGES),
        }
    defaults = {
        "likelihood": Gaussian(sigma=0.5),
        "optimizer": partial(Adam, lr=1e-3),
        "discriminator_optimizer": partial(Adam, lr=2e-3),
        "kl_weight": 0.1,
    }
    for parameter in networks["discriminator"].parameters():
        nn.init.normal_(parameter, std=0.5)  # so that verdicts lie on both sides of the hinge
    return AdversarialVAE(**(networks | defaults | options))


def batches(*sizes: int) -> list[dict[str, torch.Tensor]]:
    source = torch.Generator().manual_seed(1)
    return [{"image": torch.rand(n, 1, 8, 8, generator=source) * 2 - 1, "label": torch.zeros(n).long()} for n in sizes]


def fit(tmp_path, module: AdversarialVAE, *sizes: int, dtype: torch.dtype = torch.float32, **options):
    run = tiny.trainer(tmp_path, max_steps=len(sizes), limit_val_batches=0, **options)
    data = [batch | {"image": batch["image"].to(dtype)} for batch in batches(*sizes)]
    run.fit(module, DataLoader(data, batch_size=None))
    return run


def moved(before: dict[str, torch.Tensor], module: AdversarialVAE) -> set[str]:
    """Networks of which a weight changed."""
    after = module.state_dict()
    return {name.partition(".")[0] for name, value in before.items() if not torch.equal(value, after[name])}


# ---- one update


def bare_step(module: AdversarialVAE, optimizers: list[Adam], x: torch.Tensor, step: int) -> dict[str, torch.Tensor]:
    """An update after ``start_step``, in PyTorch alone."""
    torch.manual_seed(derive_seed("train", global_seed(), step, 0))
    mean, logvar = module.encoder(x)
    std = (0.5 * logvar).exp()
    output = module.decoder(mean + std * torch.randn(1, *mean.shape, dtype=mean.dtype)[0])
    x_hat = output.clamp(-1, 1)

    optimizers[1].zero_grad()
    real, fake = module.discriminator(x), module.discriminator(x_hat.detach())
    discriminator_loss = F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    discriminator_loss.backward()
    optimizers[1].step()

    optimizers[0].zero_grad()
    reconstruction = -Normal(output, 0.5).log_prob(x).sum(dim=(1, 2, 3)).mean()
    kl = kl_divergence(Normal(mean, std), Normal(0.0, 1.0)).flatten(1).sum(dim=1).mean()
    generator_loss = -module.discriminator(x_hat).mean()
    weight = module.decoder.layers[-1].weight
    (first,) = torch.autograd.grad(reconstruction, weight, retain_graph=True)
    (second,) = torch.autograd.grad(generator_loss, weight, retain_graph=True)
    adaptive = first.norm() / (second.norm() + 1e-4)
    loss = reconstruction + 0.1 * kl + 0.7 * adaptive * generator_loss
    loss.backward()
    optimizers[0].step()
    return {
        "reconstruction": reconstruction,
        "kl": kl,
        "autoencoder_loss": loss,
        "generator_loss": generator_loss,
        "discriminator_loss": discriminator_loss,
        "adaptive_weight": adaptive,
        "real_logits": real.mean(),
        "fake_logits": fake.mean(),
    }


@pytest.mark.parametrize("latent", ["vectors", "maps"])
def test_an_update_equals_a_bare_pytorch_step(tmp_path, latent):
    module, bare = (model(latent, adversarial_weight=0.7).double() for _ in range(2))
    run = fit(tmp_path, module, 5, 4, dtype=torch.float64)
    own = [p for network in (bare.encoder, bare.decoder) for p in network.parameters()]
    optimizers = [Adam(own, lr=1e-3), Adam(bare.discriminator.parameters(), lr=2e-3)]
    for step, batch in enumerate(batches(5, 4)):
        expected = bare_step(bare, optimizers, batch["image"].double(), step)
    torch.testing.assert_close(module.state_dict(), bare.state_dict())
    logged = {f"train/{name}": value.detach().float() for name, value in expected.items()}
    torch.testing.assert_close(dict(run.callback_metrics), logged)
    assert 1e-2 < logged["train/adaptive_weight"] < 1e4


def test_the_adaptive_weight_is_clamped(tmp_path):
    module = model(discriminator_optimizer=partial(SGD, lr=0.0))
    nn.init.zeros_(module.discriminator.layers[-1].weight)
    run = fit(tmp_path, module, 5)
    torch.testing.assert_close(run.callback_metrics["train/adaptive_weight"], torch.tensor(1e4))


def test_a_decoder_may_name_the_weight_that_gradients_are_compared_at(tmp_path):
    weights = []
    for named in (False, True):
        module = model()
        if named:
            module.decoder.last_weight = module.decoder.layers[0].weight
        weights.append(fit(tmp_path, module, 5).callback_metrics["train/adaptive_weight"])
    assert not torch.isclose(*weights)


def test_each_backward_reaches_its_own_network_only_and_one_pass_serves_both(tmp_path):
    module, reached, calls = model(), {}, []
    for name, parameter in module.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, n=name: reached.update({n: reached.get(n, 0) + 1}))
    for name in ("encoder", "decoder", "discriminator"):
        module.get_submodule(name).register_forward_hook(lambda *_, n=name: calls.append(n))
    fit(tmp_path, module, 5)
    assert reached == dict.fromkeys((name for name, _ in module.named_parameters()), 1)
    assert calls == ["encoder", "decoder", *["discriminator"] * 3]
    assert all(parameter.requires_grad for parameter in module.parameters())


# ---- before the discriminator joins


@pytest.mark.parametrize("latent", ["vectors", "maps"])
def test_before_start_step_nothing_is_adversarial(tmp_path, latent):
    asleep, unheard = model(latent, start_step=3), model(latent, adversarial_weight=0.0)
    before = tiny.weights(asleep)
    run = fit(tmp_path, asleep, 5, 4, 6)
    assert moved(before, asleep) == {"encoder", "decoder"}
    assert set(run.callback_metrics) == {f"train/{name}" for name in ALWAYS | {"autoencoder_loss"}}
    fit(tmp_path, unheard, 5, 4, 6)
    assert "discriminator" in moved(before, unheard)
    for name in ("encoder", "decoder"):
        tiny.assert_same(tiny.weights(getattr(asleep, name)), tiny.weights(getattr(unheard, name)))


def test_at_start_step_the_discriminator_trains_and_is_heard(tmp_path):
    awake, unheard = model(start_step=2), model(start_step=2, adversarial_weight=0.0)
    before = tiny.weights(awake)
    run = fit(tmp_path, awake, 5, 4, 6)
    fit(tmp_path, unheard, 5, 4, 6)
    assert moved(before, awake) == {"encoder", "decoder", "discriminator"}
    assert not torch.equal(awake.decoder.layers[0].weight, unheard.decoder.layers[0].weight)
    names = ALWAYS | JUDGED | {"autoencoder_loss", "adaptive_weight"}
    assert set(run.callback_metrics) == {f"train/{name}" for name in names}


def test_global_step_counts_the_autoencoders_updates_and_each_schedule_its_own(tmp_path, recwarn):
    halve = partial(StepLR, step_size=1, gamma=0.5)
    module = model(start_step=3, scheduler=halve, discriminator_scheduler=halve)
    run = fit(tmp_path, module, 5, 4, 6, 5, 5)
    updates = [{int(state["step"]) for state in optimizer.state.values()} for optimizer in run.optimizers]
    assert run.global_step == run.fit_loop.total_batch_idx + 1 == 5
    assert updates == [{5}, {2}]
    rates = [optimizer.param_groups[0]["lr"] for optimizer in run.optimizers]
    assert rates == pytest.approx([1e-3 / 2**5, 2e-3 / 2**2])
    assert [optimizer.param_groups[0]["name"] for optimizer in run.optimizers] == ["autoencoder", "discriminator"]
    own = [*module.encoder.parameters(), *module.decoder.parameters()], [*module.discriminator.parameters()]
    held = [optimizer.param_groups[0]["params"] for optimizer in run.optimizers]
    assert [[id(p) for p in group] for group in held] == [[id(p) for p in group] for group in own]
    assert not [w for w in recwarn if "lr_scheduler.step()" in str(w.message)]


# ---- precision and processes


@pytest.mark.parametrize("latent", ["vectors", "maps"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_run_gives_float32_samples_and_finite_weights(tmp_path, latent, precision):
    module = model(latent, start_step=1)
    before = tiny.weights(module)
    options = {"max_steps": 4, "limit_val_batches": 1, "val_check_interval": 4}
    run = tiny.train(tmp_path, module, tiny.digits(), precision=precision, **options)
    for name, value in module.state_dict().items():
        assert value.isfinite().all(), name
        assert not torch.equal(value, before[name]), name
    assert {f"val/{name}" for name in ALWAYS | JUDGED} <= set(run.callback_metrics)
    assert all(value.isfinite() and value.dtype == torch.float32 for value in run.callback_metrics.values())
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        assert module.sample(3).dtype == torch.float32
        assert module.reconstruct(batches(2)[0]["image"]).dtype == torch.float32


def weak() -> AdversarialVAE:
    """Its adversarial gradient is about as small as what is added below the line of the adaptive weight."""
    module = model(likelihood=Gaussian(sigma=5.0), discriminator_optimizer=partial(SGD, lr=0.0))
    with torch.no_grad():
        module.discriminator.layers[-1].weight *= 1e-4
    return module


@pytest.mark.parametrize("scale", [2.0**6, 2.0**10])
def test_the_adaptive_weight_does_not_depend_on_the_loss_scale(tmp_path, scale):
    # float16 alone would lose the gradients of so large a batch's images
    exact = fit(tmp_path, weak(), 500).callback_metrics["train/adaptive_weight"]
    plugin = Plugin("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))
    run = fit(tmp_path, weak(), 500, plugins=[SafeCheckpointIO(), plugin])
    assert 1 < exact < 5e3
    torch.testing.assert_close(run.callback_metrics["train/adaptive_weight"], exact, rtol=0.05, atol=0)


def test_logits_are_float32_under_autocast():
    module, x = model(), batches(5)[0]["image"]
    with torch.autocast("cpu", torch.bfloat16):
        assert module.discriminator(x).dtype == torch.bfloat16
        assert module._judge(x).dtype == torch.float32
        assert {value.dtype for value in module._verdicts(x, x).values()} == {torch.float32}


def test_no_step_waits_for_the_device(tmp_path):
    module, counts = model(start_step=1), []
    step = module.training_step

    def watched(*args):
        with Waits() as waits:
            step(*args)
        counts.append(waits.count)

    module.training_step = watched
    plain = partial(SGD, lr=1e-3)
    module.optimizer = module.discriminator_optimizer = plain
    fit(tmp_path, module, 5, 5, 5, log_every_n_steps=100)
    assert counts == [0, 0, 0]


@pytest.mark.slow
def test_two_processes_make_the_updates_of_one(tmp_path):
    before = adversarial_process.module().state_dict()
    one = adversarial_process.train(1, tmp_path).state_dict()
    processes.run(Path(__file__).with_name("adversarial_process.py"), 2, tmp_path)
    two = [torch.load(tmp_path / f"weights_{rank}.pt", weights_only=True) for rank in (0, 1)]
    for name, value in one.items():
        assert torch.equal(two[0][name], two[1][name]), name
        torch.testing.assert_close(two[0][name], value, rtol=0, atol=1e-10)
        assert (value - before[name]).abs().max() > 1e-4, f"{name} did not learn, so equality says nothing"


# ---- evaluation


def test_validation_scores_the_same_quantities(tmp_path):
    module, data = model(), batches(6)
    (scores,) = tiny.trainer(tmp_path).validate(module, DataLoader(data, batch_size=None), verbose=False)
    x = data[0]["image"]
    torch.manual_seed(derive_seed("val", global_seed(), 0, 0))
    mean, logvar = module.encoder(x)
    output = module.decoder(mean + (0.5 * logvar).exp() * torch.randn(1, *mean.shape)[0])
    real, fake = module.discriminator(x), module.discriminator(output.clamp(-1, 1))
    expected = {
        "reconstruction": -Normal(output, 0.5).log_prob(x).sum() / 6,
        "kl": kl_divergence(Normal(mean, (0.5 * logvar).exp()), Normal(0.0, 1.0)).sum() / 6,
        "generator_loss": -fake.mean(),
        "discriminator_loss": F.relu(1 - real).mean() + F.relu(1 + fake).mean(),
        "real_logits": real.mean(),
        "fake_logits": fake.mean(),
    }
    expected["elbo"] = -expected["reconstruction"] - expected["kl"]
    assert scores == pytest.approx({f"val/{name}": value.item() for name, value in expected.items()}, rel=1e-5)
    (tested,) = tiny.trainer(tmp_path).test(module, DataLoader(data, batch_size=None), verbose=False)
    assert {name.partition("/")[2] for name in tested} == set(expected)


@pytest.mark.parametrize(("latent", "shape"), [("vectors", (3,)), ("maps", (2, 4, 4))])
def test_images_become_latents_and_images_again(latent, shape):
    module = model(latent, likelihood=Bernoulli())
    x, modes = batches(5)[0]["image"], []
    for network in (module.encoder, module.decoder):
        network.register_forward_hook(lambda net, *_: modes.append(net.training))
    z = module.encode(x)
    module.decode(z)
    assert modes == [False, False]
    assert z.shape == (5, *shape)
    torch.testing.assert_close(z, module.encoder(x)[0].detach())
    torch.testing.assert_close(module.decode(z), 2 * module.decoder(z).sigmoid().detach() - 1)
    tiny.assert_same(module.reconstruct(x), module.decode(z))
    noise = torch.randn(4, *shape, generator=torch.Generator().manual_seed(3))
    tiny.assert_same(module.sample(4, generator=torch.Generator().manual_seed(3)), module.decode(noise))
    assert module.training


def test_it_is_what_callbacks_ask_for():
    supported = (
        LatentCodec,
        SupportsAveraging,
        SupportsKLSchedule,
        SupportsLatents,
        SupportsLikelihood,
        SupportsReconstruction,
        SupportsSampling,
    )
    for protocol in supported:
        assert isinstance(model(), protocol), protocol
    assert not isinstance(model(), SupportsCapacity)


# ---- the bound


@pytest.mark.parametrize(("latent", "shape"), [("vectors", (3,)), ("maps", (2, 4, 4))])
def test_posterior_kl_and_importance_weights_are_those_of_torch(latent, shape):
    module, x = model(latent).double(), batches(5)[0]["image"].double()
    mean, logvar = module.posterior(x)
    assert mean.shape == logvar.shape == (5, *shape)
    q, p = Normal(mean, (0.5 * logvar).exp()), Normal(0.0, 1.0)
    torch.testing.assert_close(module.kl_by_dimension(mean, logvar), kl_divergence(q, p))
    torch.manual_seed(3)
    log_weight = module.log_importance_weights(x, 4)
    torch.manual_seed(3)
    z = mean + q.stddev * torch.randn(4, 5, *shape, dtype=torch.float64)
    for k in range(4):
        expected = Normal(module.decoder(z[k]), 0.5).log_prob(x).sum(dim=(1, 2, 3))
        expected = expected + (p.log_prob(z[k]) - q.log_prob(z[k])).flatten(start_dim=1).sum(dim=1)
        torch.testing.assert_close(log_weight[k], expected)


class Typed(Gaussian):
    """Remembers the type of what it was given."""

    def log_prob(self, output, x):
        self.dtype = output.dtype
        return super().log_prob(output, x)


def test_the_bound_is_float32_under_autocast():
    module, x = model(likelihood=Typed()), batches(5)[0]["image"]
    with torch.autocast("cpu", torch.bfloat16):
        assert {value.dtype for value in (*module.posterior(x), module.log_importance_weights(x, 2))} == {torch.float32}
    assert module.likelihood.dtype == torch.float32


def test_bits_are_defined_where_the_likelihood_is_of_pixels():
    assert not model().is_discrete
    assert model(likelihood=DiscretizedLogistic()).is_discrete


@pytest.mark.parametrize("latent", ["vectors", "maps"])
def test_a_sample_does_not_depend_on_the_batch_it_is_drawn_in(latent):
    module = model(latent)
    together = module.sample(4, generator=sample_generators(5, 4))
    alone = [module.sample(1, generator=sample_generators(5, 1, start=i)) for i in range(4)]
    torch.testing.assert_close(together, torch.cat(alone))
    assert not torch.isclose(together[0], together[1]).all()


def test_a_likelihood_that_learns_learns_with_the_autoencoder_and_belongs_to_the_model(tmp_path):
    module = model(likelihood=LearnedGaussian())
    before = tiny.weights(module)
    fit(tmp_path, module, 5)
    assert moved(before, module) == {"encoder", "decoder", "discriminator", "likelihood"}
    assert module.sampling_modules == ["encoder", "decoder", "likelihood"]
    assert model().sampling_modules == ["encoder", "decoder"]


# ---- checkpoints


def test_a_checkpoint_rebuilds_the_module_and_its_average(tmp_path):
    module = model(start_step=1, adversarial_weight=0.3)
    run = tiny.train(tmp_path, module, tiny.digits(), callbacks=[EMA(half_life=10)])
    run.save_checkpoint(tmp_path / "a.ckpt")
    loaded = AdversarialVAE.load_from_checkpoint(tmp_path / "a.ckpt")
    tiny.assert_same(tiny.weights(loaded), tiny.weights(module))
    assert (loaded.start_step, loaded.adversarial_weight, loaded.kl_weight) == (1, 0.3, 0.1)
    raw = module.sample(3, generator=sample_generators(0, 3))
    with averaged_weights(run):
        averaged = module.sample(3, generator=sample_generators(0, 3))
    assert not torch.equal(raw, averaged)
    tiny.assert_same(load_module(tmp_path / "a.ckpt").sample(3, generator=sample_generators(0, 3)), averaged)


def final_state(folder: Path, *stops: int) -> dict:
    """The checkpoint after 12 updates, the last 7 of them adversarial, of a run stopped and resumed at ``stops``."""
    ckpt_path = None
    for index, stop in enumerate((*stops, 12)):
        decay = families.schedule
        module = model(seed=index, start_step=5, scheduler=decay, discriminator_scheduler=decay)
        torch.manual_seed(stop)
        families.trainer(folder, max_steps=stop).fit(module, families.digits(), ckpt_path=ckpt_path)
        ckpt_path = folder / "last.ckpt"
    return load_checkpoint(ckpt_path)


def test_a_resumed_run_ends_bit_for_bit_like_an_uninterrupted_one(tmp_path, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    whole = final_state(tmp_path / "whole")
    for stops in ((3,), (5,), (6,), (4, 8)):  # before, at and after start_step, and across it twice
        parts = final_state(tmp_path / "-".join(map(str, stops)), *stops)
        for name in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
            assert_same(parts[name], whole[name], name)
        assert_same(parts["callbacks"]["EMA"], whole["callbacks"]["EMA"], "EMA")


# ---- refusals


class Packs(Recorded, nn.Module):
    """Judges two images by one logit."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(128, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.reshape(-1, 128)).squeeze(1)


class Probability(Recorded, nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, 1), nn.Sigmoid())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start_step": -1}, "AdversarialVAE: start_step must not be negative, got -1"),
        ({"kl_weight": -0.1}, "kl_weight must not be negative, got -0.1"),
        ({"adversarial_weight": -2.0}, "adversarial_weight must not be negative, got -2.0"),
        ({"kl_weight": float("nan")}, "kl_weight must not be negative, got nan"),
        ({"decoder": ConvDecoder(latent_dim=4, **IMAGES)}, r"latents of the same shape, got \(2, 4, 4\) and \(4,\)"),
        ({"discriminator": Probability()}, "must give logits, and Probability ends in a Sigmoid. Leave it out"),
        ({"discriminator": DCGANDiscriminator(num_classes=10, **IMAGES)}, "the discriminator must take no labels"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        model(**options)


def test_a_discriminator_that_does_not_judge_each_image_is_refused(tmp_path):
    module = model(discriminator=Packs())
    with pytest.raises(ValueError, match=r"each of 6 images logits of its own, .* got shape \(3,\)"):
        fit(tmp_path, module, 6)


@pytest.mark.parametrize(
    "ask",
    [
        lambda module, x, y: module.sample(2, y),
        lambda module, x, y: module.posterior(x, y),
        lambda module, x, y: module.log_importance_weights(x, 3, y),
        lambda module, x, y: module.encode(x, y),
        lambda module, x, y: module.decode(module.encode(x), y),
    ],
)
def test_an_unconditional_model_takes_no_label(ask):
    with pytest.raises(ValueError, match="AdversarialVAE: the model is unconditional, so it takes no label"):
        ask(model(), batches(2)[0]["image"], torch.zeros(2, dtype=torch.int64))


def test_images_that_the_likelihood_cannot_score_are_refused_at_the_first_batch(tmp_path):
    bright = {"image": torch.full((2, 1, 8, 8), 1.5)}
    with pytest.raises(ValueError, match="Bernoulli"):
        tiny.trainer(tmp_path, max_steps=1).fit(model(likelihood=Bernoulli()), DataLoader([bright], batch_size=None))
