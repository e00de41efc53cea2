import warnings

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from lit_generative.diffusion.noise import NoiseSource
from lit_generative.diffusion.weightings import MinSNR
from lit_generative.finetune.options import Memory, Sampling
from lit_generative.tensor_ops import sample_generators
from lit_generative.types import PromptOptions, SupportsAveraging, SupportsExport, SupportsPrompts, SupportsSampling
from tests.finetune.sd_models import batch, fit, shaken, text_to_image


@pytest.fixture(scope="module")
def sd(tiny_sd):
    return shaken(text_to_image(tiny_sd, sampling=Sampling(["a red circle", "a blue square"], num_steps=3)))


def test_it_is_what_callbacks_and_commands_ask_for(sd):
    for protocol in (SupportsSampling, SupportsPrompts, SupportsExport, SupportsAveraging):
        assert isinstance(sd, protocol)


# ---- samples


def test_a_sample_does_not_depend_on_those_beside_it(sd):
    prompts, generators = ["a red circle", "a cat", "a blue square"], sample_generators(0, 3)
    together = sd.sample_prompts(prompts, generator=generators)
    alone = sd.sample_prompts(prompts[2:], generator=sample_generators(0, 1, start=2))
    assert together.shape == (3, 3, 32, 32)
    torch.testing.assert_close(together[2:], alone, atol=1e-4, rtol=0)
    assert (together[0] - together[2]).abs().max() > 0.01


@pytest.mark.parametrize("options", [{"guidance_scale": 1.0}, {"num_steps": 2}, {"negative": "a cat"}])
def test_each_option_changes_the_picture(sd, options):
    plain = sd.sample_prompts(["a red circle"], generator=sample_generators(0, 1))
    other = sd.sample_prompts(["a red circle"], PromptOptions(**options), sample_generators(0, 1))
    assert (plain - other).abs().max() > 1e-3


def test_labels_choose_among_the_prompts(sd):
    assert sd.num_classes == 2
    found = sd.sample(2, torch.tensor([1, 0]), sample_generators(0, 2))
    expected = sd.sample_prompts(["a blue square", "a red circle"], generator=sample_generators(0, 2))
    torch.testing.assert_close(found, expected)


def test_without_prompts_there_is_nothing_to_sample(tiny_sd):
    module = text_to_image(tiny_sd, sampling=None)
    assert module.num_classes is None
    with pytest.raises(ValueError, match=r"TextToImage: sample\(\) draws the prompts of `sampling`, which names none"):
        module.sample(1)


def test_pictures_may_have_another_size(tiny_sd):
    module = text_to_image(tiny_sd, sampling=Sampling(["a cat"], num_steps=1, image_size=16))
    assert module.sample(1).shape == (1, 3, 16, 16)
    assert module.sampling_settings()["image_size"] == 16


def test_sampling_leaves_modes_as_they_were(sd):
    sd.train()
    before = [m.training for m in sd.modules()]
    sd.sample(1)
    assert [m.training for m in sd.modules()] == before


# ---- the loss


@pytest.mark.parametrize("kind", ["tiny_sd", "tiny_sd_v"])
def test_min_snr_weights_are_those_of_diffusers(kind, request):
    module = text_to_image(request.getfixturevalue(kind), weighting=MinSNR(5.0))
    t = torch.tensor([0, 150, 400, 999])
    noisy = module.model.noised(torch.randn(4, 4, 8, 8), t, torch.randn(4, 4, 8, 8))
    prompts = module.encode(["a cat"] * 4)
    weighted = module.losses(noisy, prompts)
    plain = (module.model.predict(noisy.x_t, t, prompts) - module.model.target(noisy)).square().mean(dim=(1, 2, 3))
    snr = compute_snr(DDPMScheduler.from_config(module.model.scheduler.config), t)
    factor = snr.clamp(max=5) / (snr if kind == "tiny_sd" else snr + 1)
    torch.testing.assert_close(weighted, factor * plain, rtol=1e-4, atol=0)


def test_another_target_can_be_given(sd):
    noisy = sd.noisy(batch()["image"])
    prompts = sd.encode(["a cat"] * 3)
    output = sd.model.predict(noisy.x_t, noisy.t, prompts)
    torch.testing.assert_close(sd.losses(noisy, prompts, output), torch.zeros(3), atol=1e-9, rtol=0)


def test_the_noise_is_that_of_its_source(tiny_sd):
    module = text_to_image(tiny_sd, noise=NoiseSource(offset=5.0))
    eps = module.noisy(batch(2)["image"]).eps
    assert eps.mean(dim=(2, 3)).std() > 2
    module = text_to_image(tiny_sd, noise=NoiseSource(perturbation=1.0))
    noisy = module.noisy(batch(2)["image"])
    assert not torch.allclose(noisy.x_t, module.model.noised(*noisy[:1], noisy.t, noisy.eps).x_t)


@pytest.mark.parametrize("missing", ["image", "caption"])
def test_a_batch_without_captions_or_pictures_is_refused(sd, missing):
    given = {key: value for key, value in batch().items() if key != missing}
    with pytest.raises(ValueError, match=rf"TextToImage: a batch must hold '{missing}', but this one holds"):
        sd.training_step(given, 0)


def test_pictures_that_do_not_fit_are_refused(sd):
    with pytest.raises(ValueError, match=r"TextToImage: images must be \(N, 3, H, W\)"):
        sd.training_step({**batch(), "image": torch.zeros(3, 1, 32, 32)}, 0)


# ---- evaluation


def test_validation_is_the_same_each_time_whatever_the_batches_and_moves_no_random_numbers(sd, tmp_path):
    given = batch(4)
    halves = [{key: value[i : i + 2] for key, value in given.items()} for i in (2, 0)]
    runs = [
        fit(tmp_path, text_to_image(sd.hparams["pretrained"]), [batch(2)], val=val, max_steps=1)[0].callback_metrics
        for val in ([given], [given], halves)
    ]
    bins = ["val/loss_t0_250", "val/loss_t250_500", "val/loss_t500_750", "val/loss_t750_1000"]
    for name in ["val/loss", *bins]:
        assert runs[0][name] == runs[1][name]
        torch.testing.assert_close(runs[0][name], runs[2][name], rtol=1e-5, atol=0)
    torch.testing.assert_close(runs[0]["val/loss"], torch.stack([runs[0][name] for name in bins]).mean())
    assert len({float(runs[0][name]) for name in bins}) == 4


def test_each_quarter_of_the_times_is_looked_at_by_itself(tiny_sd, tmp_path):
    """The weight of min-SNR falls with the SNR above its bound, so the first quarter counts least."""
    metrics = []
    for weighting in (None, MinSNR(0.5)):
        module = text_to_image(tiny_sd, weighting=weighting)
        metrics.append(fit(tmp_path, module, [batch(2)], val=[batch(4)], max_steps=1)[0].callback_metrics)
    ratios = [float(metrics[1][f"val/loss_t{i}_{i + 250}"] / metrics[0][f"val/loss_t{i}_{i + 250}"]) for i in (0, 750)]
    assert ratios[0] < 0.6
    assert ratios[1] == pytest.approx(1, abs=1e-2)


def test_a_test_run_logs_the_same_losses(sd, tmp_path):
    from tests.tiny import trainer

    loader = torch.utils.data.DataLoader([batch()], batch_size=None)
    (metrics,) = trainer(tmp_path).test(sd, loader, verbose=False)
    assert {"test/loss", "test/loss_t0_250"} <= metrics.keys()


# ---- memory


def test_a_cache_of_latents_changes_nothing_and_encodes_each_picture_once(tiny_sd, tmp_path):
    losses, batches = {}, [batch(2), batch(2, seed=1)]
    for cache in (None, "latents", "both"):
        module = text_to_image(tiny_sd, memory=Memory(cache=cache))
        _, losses[cache] = fit(tmp_path, module, batches, max_epochs=2)
        if cache is not None:
            assert len(module._latents) == 4
        if cache == "both":
            assert len(module._texts) == len({c for b in batches for c in b["caption"]})
    torch.testing.assert_close(losses["latents"], losses[None], rtol=1e-5, atol=0)
    torch.testing.assert_close(losses["both"], losses[None], rtol=1e-5, atol=0)


def test_a_cached_posterior_is_drawn_from_anew(tiny_sd):
    module = text_to_image(tiny_sd, memory=Memory(cache="latents"))
    images = batch(1)["image"]
    assert not torch.equal(module.noisy(images).z, module.noisy(images).z)


def test_text_of_two_encoders_is_cached_whole(tiny_sdxl):
    module = text_to_image(tiny_sdxl, memory=Memory(cache="text"))
    texts = ["a cat", None, "a cat"]
    for _ in range(2):
        for found, expected in zip(module.encode(texts), module.model.prompts(texts), strict=True):
            torch.testing.assert_close(found, expected)


def test_a_cache_that_no_picture_comes_back_to_is_given_up(tiny_sd, tmp_path):
    module = text_to_image(tiny_sd, memory=Memory(cache="latents"))

    class Changing(torch.utils.data.Dataset):
        count = 0

        def __len__(self):
            return 1

        def __getitem__(self, i):
            Changing.count += 1
            return batch(1, seed=Changing.count)

    with pytest.warns(UserWarning, match="no picture of this epoch was seen before"):
        fit(tmp_path, module, Changing(), max_epochs=3)
    assert module._latents is None


def test_frozen_weights_are_kept_in_half_precision_and_trained_ones_are_not(tiny_sd, tmp_path):
    module = text_to_image(tiny_sd, memory=Memory(frozen_dtype="bfloat16"))
    for name, p in module.model.named_parameters():
        full = p.requires_grad or name.startswith("vae.")
        assert p.dtype == (torch.float32 if full else torch.bfloat16), name
    _, losses = fit(tmp_path, module, [batch()])
    _, expected = fit(tmp_path, text_to_image(tiny_sd), [batch()])
    assert losses == pytest.approx(expected, rel=2e-2)
    _, mixed = fit(
        tmp_path, text_to_image(tiny_sd, memory=Memory(frozen_dtype="bfloat16")), [batch()], precision="bf16-mixed"
    )
    assert mixed == pytest.approx(expected, rel=2e-2)
    assert module.sample(1).dtype == torch.float32


def test_weights_that_are_trained_themselves_make_their_network_full_precision(tiny_sd, tmp_path):
    module = text_to_image(tiny_sd, adapter=None, train=["mid_block"], memory=Memory(frozen_dtype="bfloat16"))
    assert {p.dtype for p in module.model.unet.parameters()} == {torch.float32}
    assert {p.dtype for p in module.model.prompts.parameters()} == {torch.bfloat16}
    fit(tmp_path, module, [batch()])
    module.sample(1)


def test_checkpointing_changes_no_number(tiny_sd, tmp_path):
    from tests.finetune.sd_models import TEXT_LORA

    results = []
    for gradient_checkpointing in (False, True):
        module = text_to_image(
            tiny_sd, text_adapter=TEXT_LORA, memory=Memory(gradient_checkpointing=gradient_checkpointing)
        )
        assert module.model.unet.is_gradient_checkpointing == gradient_checkpointing
        assert module.model.prompts.text_encoder.is_gradient_checkpointing == gradient_checkpointing
        results.append(fit(tmp_path, module, [batch()] * 2)[1])
    torch.testing.assert_close(results[0], results[1])


# ---- modes


def test_frozen_networks_stay_in_evaluation_mode(tiny_sd):
    module = text_to_image(tiny_sd)
    for training in (True, False, True):
        module.train(training)
        assert module.model.unet.training == training
        assert not module.model.vae.training
        assert not module.model.prompts.text_encoder.training
    with_text = text_to_image(tiny_sd, train_text_encoder=True)
    assert with_text.model.prompts.text_encoder.training


def test_lightning_does_not_wonder_about_frozen_networks(tiny_sd, tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path, text_to_image(tiny_sd), [batch()])
    assert not [w for w in caught if "eval mode" in str(w.message)]
