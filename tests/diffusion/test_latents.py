"""Diffusion on latents: the scale is measured on data, the codec does not learn, a checkpoint holds all of it."""

from functools import partial

import pytest
import torch
from torch import nn

from lit_generative.diffusion.latents import Latents
from lit_generative.diffusion.module import DDPM
from lit_generative.diffusion.parameterizations import Epsilon
from lit_generative.diffusion.samplers import DDIMSampler
from lit_generative.diffusion.schedules import CosineSchedule
from lit_generative.loading import load_module
from lit_generative.networks.conv_kl import ConvMapEncoder
from lit_generative.networks.conv_vq import ConvFeatureDecoder
from lit_generative.networks.diffusers_unet import DiffusersUNet
from lit_generative.networks.mlp import MLPDenoiser
from lit_generative.networks.patch_discriminator import PatchDiscriminator
from lit_generative.recipe import Recorded
from lit_generative.tensor_ops import from_uint8, sample_generators
from lit_generative.types import LatentCodec
from lit_generative.vae.adversarial_module import AdversarialVAE
from lit_generative.vae.likelihoods import Gaussian
from tests.tiny import ADAM, digits, train, trainer, vae, weights


class Scaled(Recorded, nn.Module):
    """Each of the four pixels of a 2 x 2 block is a channel, on a scale of its own; the posterior has a variance."""

    latent_shape = (4, 4, 4)
    num_classes = None

    def __init__(self, logvar: float = -30.0) -> None:
        super().__init__()
        self.logvar = logvar
        self.weight = nn.Parameter(torch.tensor([1.0, 10.0, 0.1, 3.0]).reshape(4, 1, 1))

    def posterior(self, x):
        mean = nn.functional.pixel_unshuffle(x, 2) * self.weight + 5
        return mean, torch.full_like(mean, self.logvar)

    def decode(self, z):
        return nn.functional.pixel_shuffle((z - 5) / self.weight, 2)


def adversarial_vae():
    torch.manual_seed(0)
    return AdversarialVAE(
        ConvMapEncoder(8, 1, dim=2, width=8, num_stages=1, num_blocks=1),
        ConvFeatureDecoder(8, 1, dim=2, width=8, num_stages=1, num_blocks=1),
        PatchDiscriminator(8, 1, width=8, num_stages=1),
        Gaussian(),
        ADAM,
        ADAM,
    )


def images(data):
    return from_uint8(data.examples("train", torch.arange(data.num_examples("train"))))


def latent_ddpm(codec, **options):
    torch.manual_seed(1)
    shape = tuple(getattr(codec, "loaded", codec).latent_shape)
    if len(shape) == 1:
        network = MLPDenoiser(hidden_dim=8, num_layers=1, sample_shape=shape)
    else:
        network = DiffusersUNet(shape[1], shape[0], widths=(8,), layers_per_block=1, attention_levels=())
    defaults = {"schedule": CosineSchedule(20), "parameterization": Epsilon(), "sampler": DDIMSampler(4)}
    return DDPM(
        **{"network": network, "optimizer": partial(torch.optim.Adam, lr=1e-3), "codec": codec} | defaults | options
    )


def test_latents_have_zero_mean_and_unit_variance_in_each_channel():
    latents, data = Latents(Scaled()), digits()
    data.setup("fit")
    latents.measure(images(data))
    x = images(data)
    z = latents.encode(x)
    assert z.shape == (len(x), 4, 4, 4)
    channels = z.transpose(0, 1).flatten(start_dim=1)
    torch.testing.assert_close(channels.mean(dim=1), torch.zeros(4), rtol=0, atol=1e-4)
    torch.testing.assert_close(channels.std(dim=1), torch.ones(4), rtol=1e-4, atol=0)
    torch.testing.assert_close(latents.decode(z), x, rtol=0, atol=1e-4)


def test_the_scale_is_that_of_draws_and_not_of_means():
    data = digits()
    data.setup("fit")
    scales = []
    for logvar in (-30.0, 4.0):
        latents = Latents(Scaled(logvar))
        latents.measure(images(data))
        scales.append(latents.std.flatten())
    torch.testing.assert_close(scales[1].square() - scales[0].square(), torch.full((4,), 4.0).exp(), rtol=0.1, atol=0)


def test_a_scale_is_measured_once(tmp_path):
    module = latent_ddpm(Scaled())
    module.latents.mean.fill_(1.0)
    module.latents.std.fill_(2.0)
    train(tmp_path, module, digits())
    assert module.latents.std.unique().tolist() == [2.0]


@pytest.mark.parametrize("make_codec", [vae, adversarial_vae, Scaled])
def test_training_on_latents_leaves_the_codec_alone_and_samples_are_images(make_codec, tmp_path):
    codec = make_codec()
    assert isinstance(codec, LatentCodec)
    before, module = weights(codec), latent_ddpm(codec)
    run = train(tmp_path, module, digits())
    torch.testing.assert_close(weights(codec), before, rtol=0, atol=0)
    assert run.global_step == 3
    optimized = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    assert optimized == {id(p) for p in module.network.parameters()}
    samples = module.sample(3, generator=sample_generators(0, 3))
    assert samples.shape == (3, 1, 8, 8)
    assert samples.abs().max() <= 1
    frames = list(module.trajectory(3, generator=sample_generators(0, 3)))
    assert len(frames) == 4
    assert all(x_t.shape == x0.shape == (3, 1, 8, 8) for x_t, x0 in frames)
    torch.testing.assert_close(frames[-1][0], samples, rtol=0, atol=0)
    trainer(tmp_path).test(module, digits(), verbose=False)


@pytest.mark.parametrize("make_codec", [vae, adversarial_vae])
def test_a_checkpoint_holds_the_codec_too(make_codec, tmp_path):
    module = latent_ddpm(make_codec())
    train(tmp_path, module, digits()).save_checkpoint(tmp_path / "latent.ckpt")
    for loaded in (load_module(tmp_path / "latent.ckpt"), DDPM.load_from_checkpoint(tmp_path / "latent.ckpt")):
        assert type(loaded.latents.codec) is type(module.latents.codec)
        torch.testing.assert_close(weights(loaded), weights(module), rtol=0, atol=0)
        samples = [m.sample(2, generator=sample_generators(0, 2)) for m in (module, loaded)]
        torch.testing.assert_close(*samples, rtol=0, atol=0)


# ---- refusals


def test_sampling_before_the_scale_is_measured_is_refused():
    with pytest.raises(RuntimeError, match="measured when training starts"):
        latent_ddpm(Scaled()).sample(2)


def test_what_is_no_codec_is_refused():
    with pytest.raises(TypeError, match=r"codec must have latent_shape, .* which Linear has not"):
        Latents(nn.Linear(2, 2))


def test_a_codec_with_classes_is_refused():
    codec = Scaled()
    codec.num_classes = 3
    with pytest.raises(ValueError, match="must work without labels"):
        Latents(codec)


def test_a_network_for_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"latents have shape \(4, 4, 4\), but the network takes \(2,\)"):
        latent_ddpm(Scaled(), network=MLPDenoiser(hidden_dim=8, num_layers=1))


def test_clipping_latents_is_refused():
    with pytest.raises(ValueError, match=r"latents do not lie in \[-1, 1\]"):
        latent_ddpm(vae(), clip_samples=True)


def test_a_channel_that_never_varies_is_refused():
    codec, data = Scaled(), digits()
    data.setup("fit")
    codec.weight.data[2] = 0
    with pytest.raises(ValueError, match=r"channels \[2\] of the latents never vary"):
        Latents(codec).measure(images(data))
