from functools import partial

import lightning as L
import pytest
import torch
from torch.optim import Adam
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader

from lit_generative.callbacks.checkpoint import Checkpoint
from lit_generative.callbacks.ema import EMA, averaged_weights
from lit_generative.data.digits import Digits
from lit_generative.loading import load_module
from lit_generative.networks.code_prior import PixelCNNPrior
from lit_generative.networks.conv_vq import ConvFeatureDecoder, ConvFeatureEncoder
from lit_generative.networks.quantizer import VectorQuantizer
from lit_generative.tensor_ops import derive_seed, sample_generators
from lit_generative.training.run import global_seed
from lit_generative.types import SupportsAveraging, SupportsReconstruction, SupportsSampling
from lit_generative.vae.likelihoods import Bernoulli, Gaussian, Likelihood
from lit_generative.vae.vq_module import VQVAE
from tests import tiny

TERMS = {"loss", "reconstruction", "commitment", "prior_nll", "perplexity"}


def vqvae(num_classes: int | None = 10, seed: int = 0, **options) -> VQVAE:
    """On 1x8x8 images: 7 codes of 3 numbers on a grid of 4x4."""
    torch.manual_seed(seed)
    shape = {"image_size": 8, "channels": 1, "dim": 3, "width": 4, "num_stages": 1, "num_blocks": 1}
    defaults = {
        "encoder": ConvFeatureEncoder(**shape),
        "quantizer": VectorQuantizer(7, dim=3, decay=0.8),
        "decoder": ConvFeatureDecoder(**shape),
        "prior": PixelCNNPrior(7, grid_size=4, width=5, num_layers=2, num_classes=num_classes),
        "likelihood": Gaussian(sigma=0.5),
        "optimizer": tiny.ADAM,
    }
    return VQVAE(**(defaults | options))


def trained(tmp_path, **options) -> VQVAE:
    module = vqvae(**options)
    tiny.train(tmp_path, module, tiny.digits())
    return module


def batch(num: int = 6) -> dict[str, torch.Tensor]:
    """The first training batch of ``tiny.digits(batch_size=num)``."""
    data = Digits(batch_size=num)
    data.setup("fit")
    return data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)


# ---- the loss


def test_an_update_equals_a_bare_pytorch_step(tmp_path):
    module, bare = vqvae(beta=0.3), vqvae()
    run = tiny.train(tmp_path, module, tiny.digits(), max_steps=1)

    x, y = batch().values()
    torch.manual_seed(derive_seed("train", global_seed(), 0, 0))
    optimizer = Adam(bare.parameters(), lr=1e-3)
    quantized = bare.quantizer(bare.encoder(x))
    density = torch.distributions.Normal(bare.decoder(quantized.z_q), 0.5)
    reconstruction = -density.log_prob(x).sum(dim=(1, 2, 3))
    log_probabilities = bare.prior(quantized.codes, y).log_softmax(dim=1)
    prior_nll = -log_probabilities.gather(1, quantized.codes[:, None]).sum(dim=(1, 2, 3))
    loss = reconstruction + 0.3 * quantized.commitment + prior_nll
    loss.mean().backward()
    optimizer.step()

    torch.testing.assert_close(module.state_dict(), bare.state_dict())
    expected = {"loss": loss, "reconstruction": reconstruction, "commitment": quantized.commitment}
    expected |= {"prior_nll": prior_nll, "perplexity": quantized.perplexity}
    means = {f"train/{name}": value.detach().mean() for name, value in expected.items()}
    torch.testing.assert_close(dict(run.callback_metrics), means)
    assert run.global_step == 1


def test_the_prior_learns_the_codes_and_changes_nothing_else():
    module, examples = vqvae().eval(), batch()
    module.prior_nll(module.quantizer(module.encoder(examples["image"])).codes, examples["label"]).mean().backward()
    assert all(p.grad is None for part in (module.encoder, module.decoder) for p in part.parameters())
    assert all(p.grad is not None for p in module.prior.parameters())


def test_gradients_reach_every_parameter():
    module = vqvae()
    module._terms("train", batch(20))[0]["loss"].mean().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_the_likelihood_is_the_one_given():
    module, examples = vqvae(likelihood=Bernoulli()).eval(), batch()
    terms, quantized = module._terms("val", examples)
    pixel, output = 0.5 * (examples["image"] + 1), module.decoder(quantized.z_q)
    expected = -(pixel * output.sigmoid().log() + (1 - pixel) * (-output).sigmoid().log()).sum(dim=(1, 2, 3))
    torch.testing.assert_close(terms["reconstruction"], expected)
    assert {value.shape for value in terms.values()} == {(6,)}


class Watched(Gaussian):
    """Remembers what it was asked to check."""

    def __init__(self) -> None:
        super().__init__()
        self.checked = []

    def check(self, x):
        self.checked.append(len(x))


def test_the_likelihood_sees_the_first_batch_of_each_stage_before_it_scores_any(tmp_path):
    module = vqvae(likelihood=Watched())
    tiny.train(tmp_path, module, tiny.digits())
    tiny.trainer(tmp_path).validate(module, tiny.digits(), verbose=False)
    assert module.likelihood.checked == [6, 90]


def test_the_schedule_steps_once_an_update(tmp_path):
    module = vqvae(scheduler=partial(StepLR, step_size=1, gamma=0.5))
    run = tiny.train(tmp_path, module, tiny.digits(), max_steps=2)
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-3 / 4)
    assert run.optimizers[0].param_groups[0]["name"] == "vqvae"


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_run_gives_float32_samples_and_finite_weights(tmp_path, precision):
    module = vqvae()
    before = tiny.weights(module)
    run = tiny.train(tmp_path, module, tiny.digits(), precision=precision, limit_val_batches=1, val_check_interval=3)
    for name, value in module.state_dict().items():
        assert value.isfinite().all(), name
        assert value.dtype == before[name].dtype
        assert not torch.equal(value, before[name]), name
    assert {f"{stage}/{name}" for stage in ("train", "val") for name in TERMS} <= set(run.callback_metrics)
    assert all(value.isfinite() and value.dtype == torch.float32 for value in run.callback_metrics.values())
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        assert module.sample(3).dtype == torch.float32
        assert module.reconstruct(batch()["image"]).dtype == torch.float32


# ---- evaluation


@pytest.mark.parametrize("stage", ["val", "test"])
def test_held_out_terms_are_of_the_whole_set_and_leave_the_codebook_alone(tmp_path, stage):
    module = trained(tmp_path, beta=0.3)
    before, data, run = tiny.weights(module), tiny.digits(eval_batch_size=50), tiny.trainer(tmp_path)
    (run.validate if stage == "val" else run.test)(module, data, verbose=False)
    tiny.assert_same(tiny.weights(module), before)
    metrics = {name.removeprefix(f"{stage}/"): value for name, value in run.callback_metrics.items()}
    assert set(metrics) == TERMS
    loader = data.val_dataloader() if stage == "val" else data.test_dataloader()
    examples = data.on_after_batch_transfer({k: torch.cat([part[k] for part in loader]) for k in ("image", "label")}, 0)
    with torch.no_grad():
        terms, quantized = module.eval()._terms(stage, examples)
    expected = {name: value.mean() for name, value in terms.items()} | {"perplexity": quantized.perplexity}
    torch.testing.assert_close(metrics, expected)


def test_each_evaluation_counts_its_own_codes_alone(tmp_path):
    module, run = trained(tmp_path), tiny.trainer(tmp_path)
    first = run.validate(module, tiny.digits(), verbose=False)
    run.test(module, tiny.digits(), verbose=False)
    assert run.validate(module, tiny.digits(), verbose=False) == first


# ---- refusals


class Unlabelled(L.LightningDataModule):
    def train_dataloader(self):
        return DataLoader([{"image": batch()["image"]}], batch_size=None)


def test_a_model_with_classes_wants_labels(tmp_path):
    with pytest.raises(ValueError, match="VQVAE: a model of 10 classes needs labels"):
        tiny.train(tmp_path, vqvae(), Unlabelled())
    tiny.train(tmp_path, vqvae(num_classes=None), Unlabelled(), max_steps=1)


def test_another_number_of_classes_than_the_datas_is_refused(tmp_path):
    message = r"model \(VQVAE\) takes labels of 4 classes, but Digits has 10 classes"
    with pytest.raises(ValueError, match=message):
        tiny.train(tmp_path, vqvae(num_classes=4), tiny.digits())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantizer": VectorQuantizer(7, dim=4)}, r"same dim, got 3 \(encoder\), 4 \(quantizer\), 3 \(decoder\)"),
        ({"quantizer": VectorQuantizer(8, dim=3)}, r"same num_codes, got 8 \(quantizer\), 7 \(prior\)"),
        ({"prior": PixelCNNPrior(7, 2)}, r"same grid_size, got 4 \(encoder\), 4 \(decoder\), 2 \(prior\)"),
        ({"beta": -1.0}, r"beta must not be negative, got -1\.0"),
    ],
)
def test_parts_that_do_not_fit_each_other_are_refused(options, message):
    with pytest.raises(ValueError, match=f"VQVAE: .*{message}"):
        vqvae(**options)


def test_labels_are_refused_without_classes():
    with pytest.raises(ValueError, match="unconditional, so it takes no label"):
        vqvae(num_classes=None).sample(2, label=torch.tensor([0, 1]))


# ---- samples and reconstructions


def test_samples_are_the_expected_images_of_the_priors_codes(tmp_path):
    module, y = trained(tmp_path), torch.tensor([3, 1, 4])
    for parameter in module.decoder.parameters():
        parameter.data.mul_(10)  # beyond the range of images
    codes = module.prior.sample(3, y, sample_generators(7, 3))
    samples = module.sample(3, y, sample_generators(7, 3))
    with torch.no_grad():
        expected = module.decoder(module.quantizer.codebook[codes].movedim(-1, 1)).clamp(-1, 1)
    torch.testing.assert_close(samples, expected)
    assert (samples.min(), samples.max()) == (-1, 1)
    assert samples.shape == (3, *module.sample_shape) == (3, 1, 8, 8)
    assert not samples.requires_grad


@pytest.mark.parametrize("num_classes", [None, 10])
def test_a_sample_does_not_depend_on_its_batch(num_classes):
    module = vqvae(num_classes)
    together = module.sample(8, generator=sample_generators(5, 8))
    apart = [module.sample(n, generator=sample_generators(5, n, start)) for n, start in ((3, 0), (5, 3))]
    torch.testing.assert_close(together, torch.cat(apart))
    assert len(together.unique(dim=0)) > 4


def test_reconstructions_go_through_the_codes(tmp_path):
    module, x = trained(tmp_path), batch()["image"]
    codes = module.encode(x)
    with torch.no_grad():
        nearest = torch.cdist(module.encoder(x).movedim(1, -1).reshape(-1, 3), module.quantizer.codebook)
    assert torch.equal(codes, nearest.argmin(dim=1).view(6, 4, 4))
    tiny.assert_same(module.reconstruct(x), module.decode(codes))
    assert not module.reconstruct(x).requires_grad


def test_sampling_and_reconstruction_are_in_evaluation_mode_and_leave_the_model_as_it_was():
    module, modes = vqvae().train(), []
    module.decoder.layers[0].eval()
    for part in (module.encoder, module.decoder, module.prior):
        part.register_forward_pre_hook(lambda net, _: modes.extend(m.training for m in net.modules()))
    before, flags = tiny.weights(module), [m.training for m in module.modules()]
    module.sample(2)
    module.reconstruct(batch()["image"])
    tiny.assert_same(tiny.weights(module), before)
    assert [m.training for m in module.modules()] == flags
    assert modes
    assert not any(modes)


def test_it_is_what_callbacks_ask_for():
    module = vqvae()
    for protocol in (SupportsSampling, SupportsReconstruction, SupportsAveraging):
        assert isinstance(module, protocol)
    assert module.sampling_modules == ["encoder", "quantizer", "decoder", "prior"]


class LearnedSigma(Likelihood, torch.nn.Module):
    """A likelihood with a parameter of its own."""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)
        self.log_sigma = torch.nn.Parameter(torch.zeros(()))

    def mean(self, output):
        return output

    def log_prob(self, output, x):
        return torch.distributions.Normal(output, self.log_sigma.exp()).log_prob(x).sum(dim=(1, 2, 3))


def test_a_likelihood_that_learns_is_trained_and_averaged(tmp_path):
    module = trained(tmp_path, likelihood=LearnedSigma())
    assert module.likelihood.log_sigma != 0
    assert module.sampling_modules[-1] == "likelihood"


# ---- checkpoints and averages


def test_a_reloaded_checkpoint_gives_the_same_codebook_samples_and_settings(tmp_path):
    module = vqvae(beta=0.7)
    tiny.train(tmp_path, module, tiny.digits()).save_checkpoint(tmp_path / "vqvae.ckpt")
    loaded = VQVAE.load_from_checkpoint(tmp_path / "vqvae.ckpt")
    assert (loaded.beta, loaded.likelihood.sigma, loaded.num_classes) == (0.7, 0.5, 10)
    assert loaded.quantizer.initialized
    assert loaded.configure_optimizers()["optimizer"].defaults["lr"] == 1e-3
    tiny.assert_same(tiny.weights(loaded), tiny.weights(module))
    tiny.assert_same(*[m.sample(4, generator=sample_generators(3, 4)) for m in (module, loaded)])


@pytest.mark.parametrize("buffers", ["copy", "average"])
def test_averaged_networks_sample_with_the_codebook_that_the_policy_says(tmp_path, buffers):
    module = vqvae(optimizer=partial(Adam, lr=0.05))
    ema = EMA(half_life=20, ramp_up=None, buffers=buffers)
    codebooks = [module.quantizer.codebook.double()]

    class History(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            codebooks.append(pl_module.quantizer.codebook.double())

    run = tiny.train(tmp_path, module, tiny.digits(), callbacks=[ema, History(), Checkpoint(dirpath=str(tmp_path))])
    live, average = tiny.weights(module), codebooks[0]
    for codebook in codebooks[1:]:
        average = torch.lerp(average, codebook, 1 - 0.5 ** (6 / 20))
    expected = live["quantizer.codebook"] if buffers == "copy" else average.float()
    with averaged_weights(run):
        torch.testing.assert_close(module.quantizer.codebook, expected)
        assert not torch.equal(module.encoder.layers[0].weight, live["encoder.layers.0.weight"])
        samples = module.sample(4, generator=sample_generators(3, 4))
    tiny.assert_same(tiny.weights(module), live)
    tiny.assert_same(load_module(tmp_path / "last.ckpt").sample(4, generator=sample_generators(3, 4)), samples)
    assert not torch.equal(module.sample(4, generator=sample_generators(3, 4)), samples)
