import copy
import functools

import diffusers
import pytest
import torch
from diffusers import DDPMScheduler
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig, PromptTuningConfig, inject_adapter_in_model

from lit_generative.callbacks.ema import EMA
from lit_generative.finetune.options import Memory
from lit_generative.finetune.prior import Prior
from lit_generative.loading import load_module
from lit_generative.tensor_ops import derive_seed, sample_generators
from tests.finetune.sd_models import LORA, TEXT_LORA, batch, fit, shaken, text_to_image
from tests.finetune.tiny_stable_diffusion import pictures
from tests.tiny import assert_same, trainer, weights

# ---- what is trained


def trained(module):
    return {name for name, p in module.named_parameters() if p.requires_grad}


def test_an_adapter_is_all_that_is_trained_and_kept(tiny_sd):
    module = text_to_image(tiny_sd)
    names = trained(module)
    assert names
    assert all(".lora_" in name and name.startswith("model.unet.") for name in names)
    assert module.state_dict().keys() == {*names, "_extra_state"}


def test_an_adapter_of_the_text_encoders_is_trained_too(tiny_sdxl):
    module = text_to_image(tiny_sdxl, text_adapter=TEXT_LORA)
    for part in ("model.unet.", "model.prompts.text_encoder.", "model.prompts.text_encoder_2."):
        assert any(name.startswith(part) for name in trained(module))
    assert list(module.adapters) == ["unet", "text_encoder", "text_encoder_2"]


def test_without_adapter_the_unet_itself_is_trained(tiny_sd):
    module = text_to_image(tiny_sd, adapter=None)
    assert trained(module) == {f"model.unet.{name}" for name, _ in module.model.unet.named_parameters()}


def test_patterns_choose_among_the_unets_weights(tiny_sd):
    module = text_to_image(tiny_sd, adapter=None, train=["mid_block", "conv_out"], freeze=["*.bias"])
    assert "model.unet.conv_out.weight" in trained(module)
    assert not any(name.endswith("bias") or "down_blocks" in name for name in trained(module))


def test_text_encoders_are_trained_at_a_rate_of_their_own(tiny_sd):
    module = text_to_image(tiny_sd, train_text_encoder=True, text_lr_scale=0.1)
    optimizer = module.configure_optimizers()["optimizer"]
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-2, 1e-3])
    assert len(optimizer.param_groups[1]["params"]) == len(list(module.model.prompts.parameters()))


def test_the_learning_rate_follows_its_schedule(tiny_sd, tmp_path):
    schedule = functools.partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    module = text_to_image(tiny_sd, scheduler=schedule)
    fitted, _ = fit(tmp_path, module, [batch(1)] * 2)
    assert fitted.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-2 / 4)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"train": ["mid_block"]}, ValueError, "an adapter was given too"),
        ({"freeze": ["mid_block"]}, ValueError, "an adapter was given too"),
        ({"adapter": None, "train": ["nothing"]}, ValueError, "no parameter is named by the pattern 'nothing'"),
        ({"text_adapter": TEXT_LORA, "train_text_encoder": True}, ValueError, "both text_adapter and train_text"),
        ({"text_adapter": TEXT_LORA, "memory": Memory(cache="both")}, ValueError, "cache='both' would keep"),
        ({"train_text_encoder": True, "memory": Memory(cache="text")}, ValueError, "cache='text' would keep"),
        ({"adapter": None, "prior": Prior(source="teacher", prompt="a")}, ValueError, "a teacher is the model without"),
        ({"train_text_encoder": True, "prior": Prior(source="teacher", prompt="a")}, ValueError, "a teacher is the"),
        ({"caption_dropout": 1.0}, ValueError, r"caption_dropout must lie in \[0, 1\), got 1.0"),
        ({"text_lr_scale": 0.5}, ValueError, "text_lr_scale must be positive, and something of the text"),
        ({"text_lr_scale": 0.0, "train_text_encoder": True}, ValueError, "text_lr_scale must be positive"),
        ({"adapter": LoraConfig(target_modules=["to_x"])}, ValueError, "name no layer .* 'to_x'"),
        ({"text_adapter": LoraConfig(target_modules=["to_q"])}, ValueError, "CLIPTextModel.*'to_q'"),
        ({"adapter": PromptTuningConfig()}, TypeError, "adds words to a language model"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(tiny_sd, wrong, error, message):
    with pytest.raises(error, match=f"TextToImage: .*{message}|UNet2DConditionModel: {message}"):
        text_to_image(tiny_sd, **wrong)


# ---- the loss

GENTLE = functools.partial(torch.optim.AdamW, lr=1e-3)  # rounding errors do not grow then


def reference(module, batches, params, encode):
    """Losses of training written with diffusers' own parts, on copies of the module's networks."""
    unet, vae = module.model.unet, module.model.vae
    scheduler = DDPMScheduler.from_config(module.model.scheduler.config)
    optimizer, losses = GENTLE(params), []
    for step, given in enumerate(batches):
        torch.manual_seed(derive_seed("train", 0, step, 0))
        with torch.no_grad():
            z = vae.encode(given["image"]).latent_dist.sample() * vae.config.scaling_factor
            z = z.contiguous()
        eps = torch.randn_like(z)
        t = torch.randint(0, 1000, (len(z),))
        v = scheduler.config.prediction_type == "v_prediction"
        target = scheduler.get_velocity(z, eps, t) if v else eps
        hidden, added = encode(given["caption"])
        output = unet(scheduler.add_noise(z, eps, t), t, hidden, added_cond_kwargs=added).sample
        loss = torch.nn.functional.mse_loss(output, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def tokens(tokenizer, texts):
    return tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids


@pytest.mark.parametrize(("kind", "adapter"), [("tiny_sd", LORA), ("tiny_sd_v", None)])
def test_training_is_that_of_diffusers_parts(kind, adapter, request, tmp_path):
    module = text_to_image(request.getfixturevalue(kind), adapter=adapter, optimizer=GENTLE)
    other = copy.deepcopy(module)
    batches = [batch(2, seed=i % 4) for i in range(20)]
    _, losses = fit(tmp_path, module, batches)
    encoder, tokenizer = other.model.prompts.text_encoder, other.model.prompts.tokenizers["tokenizer"]
    params = [p for p in other.model.unet.parameters() if p.requires_grad]
    expected = reference(other, batches, params, lambda texts: (encoder(tokens(tokenizer, texts))[0], None))
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=0)


def test_training_sdxl_is_that_of_diffusers_parts(tiny_sdxl, tmp_path):
    """The other side is a pipeline of its own, with adapters that PEFT put in, started alike."""
    module = text_to_image(tiny_sdxl, text_adapter=TEXT_LORA, optimizer=GENTLE)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tiny_sdxl)
    other = text_to_image(tiny_sdxl, adapter=None)
    other.model.unet, other.model.vae = pipeline.unet, pipeline.vae
    parts = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder, "text_encoder_2": pipeline.text_encoder_2}
    own = {"unet": module.model.unet, **module.model.prompts.encoders}
    params = []
    for name, part in parts.items():
        inject_adapter_in_model(copy.deepcopy(LORA if name == "unet" else TEXT_LORA), part.requires_grad_(False))
        part.load_state_dict(own[name].state_dict())
        params += [p for p in part.parameters() if p.requires_grad]

    def encode(texts):
        first = pipeline.text_encoder(tokens(pipeline.tokenizer, texts), output_hidden_states=True)
        second = pipeline.text_encoder_2(tokens(pipeline.tokenizer_2, texts), output_hidden_states=True)
        sizes = torch.tensor([[32.0, 32, 0, 0, 32, 32]]).repeat(len(texts), 1)
        hidden = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        return hidden, {"text_embeds": second[0], "time_ids": sizes}

    batches = [batch(2, seed=i % 4) for i in range(20)]
    _, losses = fit(tmp_path, module, batches)
    torch.testing.assert_close(losses, reference(other, batches, params, encode), atol=1e-5, rtol=0)


def test_hidden_captions_are_those_that_guidance_leaves_out(tiny_sdxl):
    module = text_to_image(tiny_sdxl, caption_dropout=0.5)
    torch.manual_seed(0)
    dropped = module._dropped(["a cat"] * 200)
    assert 70 < dropped.count(None) < 130
    assert set(dropped) == {"a cat", None}
    assert text_to_image(tiny_sdxl)._dropped(["a cat"] * 9) == ["a cat"] * 9


# ---- the prior


def test_with_pictures_of_the_class_the_loss_is_the_sum_of_two(tiny_sd, tmp_path):
    given = batch(2, prior=3)
    module = text_to_image(tiny_sd, prior=Prior(weight=0.7))
    other = copy.deepcopy(module)
    fitted, (loss,) = fit(tmp_path, module, [given])
    torch.manual_seed(derive_seed("train", 0, 0, 0))
    instance = other.losses(other.noisy(given["image"]), other.encode(given["caption"]))
    prior = other.losses(other.noisy(given["class_image"]), other.encode(given["class_caption"]))
    assert (len(instance), len(prior)) == (2, 3)
    instance, prior = instance.detach(), prior.detach()
    assert loss == pytest.approx(float(instance.mean() + 0.7 * prior.mean()), rel=1e-5)
    logged = {name: float(value) for name, value in fitted.callback_metrics.items()}
    assert logged["train/loss"] == pytest.approx(loss)
    assert logged["train/instance_loss"] == pytest.approx(float(instance.mean()))
    assert logged["train/prior_loss"] == pytest.approx(float(prior.mean()))


def test_the_prompt_of_the_prior_stands_in_for_captions(tiny_sd, tmp_path):
    given = batch(2, prior=2)
    captions = given.pop("class_caption")
    cases = [
        (Prior(prompt="a circle"), given),
        (Prior(), {**given, "class_caption": ["a circle"] * 2}),
        (Prior(prompt="a circle"), {**given, "class_caption": captions}),
    ]
    found, expected, other = (fit(tmp_path, text_to_image(tiny_sd, prior=p), [b])[1] for p, b in cases)
    assert found == expected != other


@pytest.mark.parametrize("missing", ["class_image", "class_caption"])
def test_a_prior_without_pictures_or_captions_of_the_class_is_refused(tiny_sd, tmp_path, missing):
    given = batch(2, prior=2)
    del given[missing]
    with pytest.raises(ValueError, match=f"TextToImage: a batch must hold '{missing}'"):
        fit(tmp_path, text_to_image(tiny_sd, prior=Prior()), [given])


def test_a_teacher_is_the_model_without_adapters_in_both_networks(tiny_sd, tmp_path):
    prior = Prior(weight=2.0, source="teacher", prompt="a circle")
    module = shaken(text_to_image(tiny_sd, text_adapter=TEXT_LORA, prior=prior))
    live, base, given = copy.deepcopy(module), text_to_image(tiny_sd), batch(2)
    fitted, _ = fit(tmp_path, module, [given])
    torch.manual_seed(derive_seed("train", 0, 0, 0))
    noisy = live.noisy(given["image"])
    target = base.model.predict(noisy.x_t, noisy.t, base.encode(["a circle"] * 2))
    output = live.model.predict(noisy.x_t, noisy.t, live.encode(["a circle"] * 2))
    expected = (output - target).square().mean()
    assert expected > 1e-4
    logged = {name: float(value) for name, value in fitted.callback_metrics.items()}
    assert logged["train/prior_loss"] == pytest.approx(float(expected), rel=1e-4)
    assert logged["train/loss"] == pytest.approx(logged["train/instance_loss"] + 2 * float(expected), rel=1e-4)


def test_a_teacher_has_nothing_to_say_before_training(tiny_sd, tmp_path):
    module = text_to_image(tiny_sd, prior=Prior(source="teacher", prompt="a circle"))
    fitted, _ = fit(tmp_path, module, [batch(2)])
    assert float(fitted.callback_metrics["train/prior_loss"]) == pytest.approx(0, abs=1e-10)


# ---- checkpoints


def run(tmp_path, folder, epochs, **kwargs):
    module = text_to_image(folder, text_adapter=TEXT_LORA, caption_dropout=0.3)
    ema = EMA(half_life=4.0, ramp_up=None)
    saves = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    batches = [batch(2, seed=i) for i in range(3)]
    fitted, _ = fit(tmp_path, module, batches, max_epochs=epochs, callbacks=[ema, saves], **kwargs)
    return module, ema, fitted


def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit(tiny_sd, tmp_path):
    whole, whole_ema, _ = run(tmp_path / "a", tiny_sd, 2)
    resumed, ema, _ = run(tmp_path / "b", tiny_sd, 2, ckpt_path=tmp_path / "a" / "epoch=0.ckpt")
    assert_same(weights(resumed), weights(whole))
    assert_same(ema.state_dict()["weights"], whole_ema.state_dict()["weights"])


def test_a_checkpoint_holds_what_is_trained_and_is_loaded_alone(tiny_sd, tmp_path):
    module, ema, fitted = run(tmp_path, tiny_sd, 1)
    fitted.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == module.state_dict().keys()
    (average,) = ema.state_dict()["weights"].values()
    assert average.keys() == trained(module)
    loaded = load_module(tmp_path / "last.ckpt", ema=False, trust=("peft",))
    assert not any(m.training for m in loaded.modules())
    draws = [m.sample(2, generator=sample_generators(0, 2)) for m in (loaded, module)]
    torch.testing.assert_close(draws[0], draws[1], rtol=0, atol=0)
    averaged = load_module(tmp_path / "last.ckpt", trust=("peft",))
    assert (averaged.sample(2, generator=sample_generators(0, 2)) - draws[0]).abs().max() > 0


def test_a_checkpoint_on_another_base_is_refused(tiny_sd, tmp_path):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tiny_sd)
    with torch.no_grad():
        pipeline.unet.conv_out.weight.mul_(2)
    pipeline.save_pretrained(tmp_path)
    state = text_to_image(tiny_sd).state_dict()
    text_to_image(tiny_sd, seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match="trained on top of others than"):
        text_to_image(str(tmp_path)).load_state_dict(state)


def test_a_checkpoint_of_another_rank_is_refused(tiny_sd, tmp_path):
    module = text_to_image(tiny_sd)
    fitted, _ = fit(tmp_path, module, [batch(1)])
    fitted.save_checkpoint(tmp_path / "one.ckpt")
    other = text_to_image(tiny_sd, adapter=LoraConfig(r=4, lora_alpha=6, target_modules=LORA.target_modules))
    with pytest.raises(ValueError, match=r"do not fit this TextToImage.*Different settings: adapter"):
        fit(tmp_path, other, [batch(1)], ckpt_path=tmp_path / "one.ckpt")


# ---- learning


@pytest.mark.slow
def test_an_adapter_learns_a_picture_that_the_base_does_not_know(tiny_sd, tmp_path):
    """On random weights, measured at times and with noise that are always the same: 1.12 falls to 0.73."""
    images, _ = pictures(4, seed=3, colors=("blue",))
    given = {"image": images, "label": torch.zeros(4, dtype=torch.int64), "caption": ["a photo of a sks circle"] * 4}
    module = text_to_image(tiny_sd, adapter=LoraConfig(r=8, lora_alpha=16, target_modules=LORA.target_modules))
    loader = torch.utils.data.DataLoader([given], batch_size=None)
    (before,) = trainer(tmp_path).validate(module, loader, verbose=False)
    fit(tmp_path, module, [given] * 60)
    (after,) = trainer(tmp_path).validate(module, loader, verbose=False)
    assert after["val/loss"] < 0.75 * before["val/loss"]
