import diffusers
import pytest
import torch

from lit_generative.finetune.stable_diffusion import StableDiffusion
from lit_generative.tensor_ops import randn, sample_generators
from tests.finetune.sd_models import diffusers_draw
from tests.finetune.tiny_stable_diffusion import pictures

PROMPTS = ["a red circle", "a photo of a blue square"]


@pytest.fixture(scope="module")
def sd(tiny_sd):
    return StableDiffusion("X", tiny_sd)


@pytest.fixture(scope="module")
def sdxl(tiny_sdxl):
    return StableDiffusion("X", tiny_sdxl)


def test_nothing_asks_for_a_gradient(sd):
    assert not any(p.requires_grad for p in sd.parameters())
    assert not any(m.training for m in sd.modules())


def test_the_image_size_is_the_pipelines(sd):
    assert sd.image_size == (32, 32)
    sd.unet.register_to_config(sample_size=(4, 6))
    assert sd.image_size == (16, 24)
    sd.unet.register_to_config(sample_size=8)


@pytest.mark.parametrize("shape", [(2, 1, 32, 32), (2, 3, 32, 30), (3, 32, 32)])
def test_images_that_do_not_fit_are_refused(sd, shape):
    with pytest.raises(ValueError, match=r"X: images must be \(N, 3, H, W\) with sides that 4 divides, got"):
        sd.check_images(torch.zeros(shape))


def test_latents_are_a_scaled_draw_from_diffusers_posterior(sd):
    images, _ = pictures(2)
    torch.manual_seed(3)
    z = sd.latents(sd.posterior(images[:, :, :, :24]))
    assert z.shape == (2, 4, 8, 6)
    torch.manual_seed(3)
    expected = sd.vae.encode(images[:, :, :, :24]).latent_dist.sample() * sd.vae.config.scaling_factor
    torch.testing.assert_close(z, expected)


def test_a_generator_of_its_own_decides_an_examples_draw(sd):
    posterior = sd.posterior(pictures(3)[0])
    all_three = sd.latents(posterior, sample_generators(0, 3))
    last = sd.latents(tuple(part[2:] for part in posterior), sample_generators(0, 1, start=2))
    torch.testing.assert_close(all_three[2:], last)


def test_decoding_undoes_the_scale_and_keeps_to_the_range(sd):
    z = 20 * torch.randn(2, 4, 8, 6)
    images = sd.decode(z)
    assert images.shape == (2, 3, 32, 24)
    torch.testing.assert_close(images, sd.vae.decode(z / sd.vae.config.scaling_factor).sample.clamp(-1, 1))


def test_the_autoencoder_stays_in_full_precision(sd):
    images = pictures(1)[0]
    with torch.autocast("cpu", torch.bfloat16):
        mean, _ = sd.posterior(images)
        decoded = sd.decode(mean)
    torch.testing.assert_close(mean, sd.posterior(images)[0], rtol=0, atol=0)
    torch.testing.assert_close(decoded, sd.decode(mean), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["tiny_sd", "tiny_sd_v"])
def test_noise_and_target_are_those_of_diffusers(kind, request):
    model = StableDiffusion("X", request.getfixturevalue(kind))
    scheduler = diffusers.DDPMScheduler.from_config(model.scheduler.config)
    z, eps, t = torch.randn(3, 4, 6, 8), torch.randn(3, 4, 6, 8), torch.tensor([0, 400, 999])
    noisy = model.noised(z, t, eps)
    torch.testing.assert_close(noisy.x_t, scheduler.add_noise(z, eps, t))
    expected = eps if kind == "tiny_sd" else scheduler.get_velocity(z, eps, t)
    torch.testing.assert_close(model.target(noisy), expected)


def test_what_is_shown_may_be_another_noise_than_what_is_sought(sd):
    z, eps, shown, t = torch.zeros(1, 4, 2, 2), torch.ones(1, 4, 2, 2), 2 * torch.ones(1, 4, 2, 2), torch.tensor([999])
    noisy = sd.noised(z, t, eps, shown)
    torch.testing.assert_close(noisy.x_t, sd.noised(z, t, shown).x_t)
    torch.testing.assert_close(sd.target(noisy), eps)


def test_sdxl_is_told_the_size_of_its_pictures(sdxl):
    x_t, t, prompts = torch.randn(2, 4, 8, 6), torch.tensor([3, 700]), sdxl.prompts(PROMPTS)
    sizes = torch.tensor([[32.0, 24.0, 0, 0, 32, 24]] * 2)
    added = {"text_embeds": prompts.pooled, "time_ids": sizes}
    expected = sdxl.unet(x_t, t, prompts.hidden, added_cond_kwargs=added).sample
    torch.testing.assert_close(sdxl.predict(x_t, t, prompts), expected)


@pytest.mark.parametrize("kind", ["tiny_sd", "tiny_sd_v", "tiny_sdxl"])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_pictures_are_those_that_diffusers_draws(kind, scale, request):
    folder = request.getfixturevalue(kind)
    model = StableDiffusion("X", folder)
    x_t = randn((2, 4, 8, 8), sample_generators(0, 2))
    away = model.prompts([None, None]) if scale > 1 else None
    images = model.decode(model.draw(x_t, model.prompts(PROMPTS), away, scale, 3))
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    torch.testing.assert_close(images, diffusers_draw(pipeline, PROMPTS, guidance_scale=scale), atol=1e-5, rtol=0)


def test_the_pipeline_is_made_of_the_very_modules_but_for_those_replaced(sdxl):
    other = diffusers.UNet2DConditionModel.from_config(sdxl.unet.config)
    pipeline = sdxl.pipeline(unet=other)
    assert pipeline.unet is other
    assert pipeline.vae is sdxl.vae
    assert pipeline.scheduler is sdxl.scheduler
    assert pipeline.tokenizer_2 is sdxl.prompts.tokenizers["tokenizer_2"]
