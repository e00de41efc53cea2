import json
import shutil

import huggingface_hub.constants
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DModel

from lit_generative.diffusion.module import DDPM
from lit_generative.loading import load_module
from lit_generative.networks.diffusers_autoencoder import DiffusersAutoencoder
from lit_generative.networks.diffusers_unet import DiffusersUNet
from lit_generative.recipe import describe
from lit_generative.tensor_ops import sample_generators
from lit_generative.types import LatentCodec
from tests.tiny import ddpm, digits, train, weights

BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
NET = {"block_out_channels": (4, 8), "norm_num_groups": 2, "in_channels": 1, "out_channels": 1, "latent_channels": 3}


def net(**settings) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(**BLOCKS | NET | {"scaling_factor": 0.5} | settings)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("autoencoder")
    net().half().save_pretrained(folder / "vae")
    return folder


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "pipeline")


@pytest.fixture
def codec(folder):
    return DiffusersAutoencoder(8, str(folder), subfolder="vae")


def test_it_is_a_codec_that_says_its_shapes(codec):
    assert isinstance(codec, LatentCodec)
    assert codec.sample_shape == (1, 8, 8)
    assert codec.latent_shape == (3, 4, 4)
    assert codec.num_classes is None
    assert DiffusersAutoencoder(12, config=json.dumps(NET | BLOCKS)).latent_shape == (3, 6, 6)


def test_posterior_and_images_are_those_of_diffusers_unscaled(codec, folder):
    theirs = AutoencoderKL.from_pretrained(folder, subfolder="vae", torch_dtype=torch.float32)
    x = torch.rand(2, 1, 8, 8) * 2 - 1
    mean, logvar = codec.posterior(x)
    with torch.no_grad():
        posterior = theirs.encode(x).latent_dist
        torch.testing.assert_close((mean, logvar), (posterior.mean, posterior.logvar))
        torch.testing.assert_close(codec.decode(mean), theirs.decode(mean).sample.clamp(-1, 1))
    assert mean.shape == logvar.shape == (2, 3, 4, 4)
    assert codec.decode(mean).shape == x.shape


def test_images_stay_in_range(codec):
    codec.net.decoder.conv_out.weight.data *= 100
    images = codec.decode(torch.randn(2, 3, 4, 4))
    assert images.min() == -1
    assert images.max() == 1


def test_the_weights_are_float32_frozen_and_in_evaluation_mode(codec):
    assert {p.dtype for p in codec.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in codec.parameters())
    assert not any(module.training for module in codec.modules())


def dtype_inside(codec, autocast):
    seen = []
    convs = (codec.net.encoder.conv_in, codec.net.decoder.conv_in)
    hooks = [c.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype)) for c in convs]
    with autocast:
        codec.decode(codec.posterior(torch.zeros(1, 1, 8, 8))[0].float())
    for hook in hooks:
        hook.remove()
    return set(seen)


@pytest.mark.parametrize(
    ("force_upcast", "autocast", "expected"),
    [
        (True, torch.autocast("cpu", torch.float16), torch.float32),
        (False, torch.autocast("cpu", torch.float16), torch.float16),
        (True, torch.autocast("cpu", torch.bfloat16), torch.bfloat16),
        (True, torch.autocast("cpu", enabled=False), torch.float32),
    ],
)
def test_a_network_that_overflows_in_float16_is_kept_out_of_it(force_upcast, autocast, expected):
    codec = DiffusersAutoencoder(8, config=json.dumps(NET | BLOCKS | {"force_upcast": force_upcast}))
    assert dtype_inside(codec, autocast) == {expected}


# ---- with a diffusion model


def latent_ddpm(codec) -> DDPM:
    torch.manual_seed(1)
    network = DiffusersUNet(4, 3, widths=(8,), layers_per_block=1, attention_levels=())
    return ddpm(network=network, codec=codec)


def test_a_checkpoint_rebuilds_the_codec_when_the_folder_is_gone(codec, folder, tmp_path):
    module = latent_ddpm(codec)
    train(tmp_path, module, digits()).save_checkpoint(tmp_path / "latent.ckpt")
    shutil.rmtree(folder)
    for loaded in (load_module(tmp_path / "latent.ckpt"), DDPM.load_from_checkpoint(tmp_path / "latent.ckpt")):
        torch.testing.assert_close(weights(loaded), weights(module), rtol=0, atol=0)
        samples = [m.sample(2, generator=sample_generators(0, 2)) for m in (module, loaded)]
        torch.testing.assert_close(*samples, rtol=0, atol=0)
        assert samples[0].shape == (2, 1, 8, 8)


def test_a_network_from_a_folder_comes_back_without_it(tmp_path):
    settings = {"image_size": 8, "channels": 1, "widths": (8,), "layers_per_block": 1, "attention_levels": ()}
    DiffusersUNet(**settings).unet.save_pretrained(tmp_path / "unet")
    module = ddpm(network=DiffusersUNet(**settings, pretrained=str(tmp_path / "unet")))
    train(tmp_path, module, digits()).save_checkpoint(tmp_path / "image.ckpt")
    shutil.rmtree(tmp_path / "unet")
    torch.testing.assert_close(weights(load_module(tmp_path / "image.ckpt")), weights(module), rtol=0, atol=0)


def test_its_recipe_names_no_folder(codec):
    arguments = describe(codec)["init_args"]
    assert json.loads(arguments.pop("config"))["block_out_channels"] == [4, 8]
    assert arguments == {"image_size": 8, "pretrained": None, "subfolder": None, "revision": None}


# ---- refusals


def test_images_and_latents_of_another_shape_are_refused(codec):
    with pytest.raises(ValueError, match=r"needs a batch of shape \(N, 1, 8, 8\), got \(2, 3, 8, 8\)"):
        codec.posterior(torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"needs a batch of shape \(N, 3, 4, 4\), got \(2, 3, 8, 8\)"):
        codec.decode(torch.zeros(2, 3, 8, 8))


def test_a_size_that_cannot_be_halved_is_refused(folder):
    with pytest.raises(ValueError, match=r"image_size must be a positive multiple of 2 .*got 9"):
        DiffusersAutoencoder(9, str(folder), "vae")


@pytest.mark.parametrize("arguments", [{}, {"pretrained": "a/b", "config": "{}"}])
def test_neither_or_both_of_folder_and_config_are_refused(arguments):
    with pytest.raises(ValueError, match="DiffusersAutoencoder: give pretrained, a folder or a name on the hub"):
        DiffusersAutoencoder(8, **arguments)


def test_what_is_not_to_be_had_is_refused(folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="DiffusersAutoencoder: there is no folder '/no/such'"):
        DiffusersAutoencoder(8, "/no/such")
    with pytest.raises(ValueError, match=r"DiffusersAutoencoder: .* could not be loaded: .*subfolder if it is a pipe"):
        DiffusersAutoencoder(8, str(folder))
    with pytest.raises(ValueError, match="DiffusersAutoencoder: 'nobody/nothing' could not be loaded"):
        DiffusersAutoencoder(8, "nobody/nothing", revision="main")
    UNet2DModel(block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)).save_config(
        folder / "unet"
    )
    with pytest.raises(ValueError, match=r"must hold weights of AutoencoderKL, but its config\.json says UNet2DModel"):
        DiffusersAutoencoder(8, str(folder), "unet")
