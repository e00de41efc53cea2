import diffusers
import pytest
import safetensors.torch
import torch

from lit_generative.finetune.options import Memory, Sampling
from lit_generative.loading import load_module
from lit_generative.tensor_ops import sample_generators
from tests.finetune.sd_models import batch, diffusers_draw, fit, shaken, textual_inversion
from tests.tiny import trainer

CAPTION = "a photo of {token} today"
PROMPTS = ["a red <it>", "a photo of a blue square"]


@pytest.fixture(scope="module")
def learned(tiny_sd):
    return shaken(textual_inversion(tiny_sd))


def test_only_new_rows_change_and_the_table_stays_to_the_last_bit(tiny_sdxl, tmp_path):
    module = textual_inversion(tiny_sdxl)
    before = {name: value.clone() for name, value in module.named_parameters()}
    fit(tmp_path, module, [batch(2, caption=CAPTION)] * 3)
    changed = {name for name, value in module.named_parameters() if not torch.equal(value, before[name])}
    assert len(changed) == 2
    assert all(name.endswith("token_embedding.learned") for name in changed)
    for tokens in module.embeddings.values():
        assert (tokens.learned[0] - tokens.learned[1]).abs().max() > 0
    assert module.state_dict().keys() == {*changed, "_extra_state"}


@pytest.mark.parametrize("caption", ["a {token} today", "a {} today", "a <it> today"])
def test_the_word_stands_where_the_caption_says(learned, caption):
    assert learned.texts_of([caption, "none"]) == ["a <it> <it>_1 today", "none"]


def test_captions_in_training_are_written_out(tiny_sd, tmp_path):
    losses = [
        fit(tmp_path, shaken(textual_inversion(tiny_sd)), [batch(2, caption=caption)])[1]
        for caption in ("a {token}", "a {}", "a <it>")
    ]
    assert losses[0] == losses[1] == losses[2]
    _, other = fit(tmp_path, shaken(textual_inversion(tiny_sd)), [batch(2, caption="no {token}")])
    assert other != losses[0]


def test_a_caption_without_the_word_is_refused(learned, tmp_path):
    with pytest.raises(ValueError, match=r"each caption must say where '<it>' stands, got 'a photo of a .*Write"):
        fit(tmp_path, learned, [batch(1)])


def test_a_negative_prompt_may_have_the_word(tiny_sd):
    module = shaken(textual_inversion(tiny_sd, sampling=Sampling(num_steps=2, negative="a {token}")))
    other = shaken(textual_inversion(tiny_sd, sampling=Sampling(num_steps=2, negative="a <it> <it>_1")))
    other.texts_of = list
    first, second = (m.sample_prompts(["a cat"], generator=sample_generators(0, 1)) for m in (module, other))
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize("num_vectors", [1, 2])
def test_diffusers_draws_with_the_word_what_the_model_draws(tiny_sd, tmp_path, num_vectors):
    module = shaken(textual_inversion(tiny_sd, num_vectors=num_vectors))
    images = module.sample_prompts(PROMPTS, generator=sample_generators(0, 2))
    told = module.export("textual-inversion", tmp_path)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tiny_sd)
    untouched = diffusers_draw(pipeline, PROMPTS)
    exec(told, {"pipeline": pipeline})
    torch.testing.assert_close(diffusers_draw(pipeline, PROMPTS), images, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(untouched[1], images[1], atol=1e-5, rtol=1e-4)
    assert (untouched[0] - images[0]).abs().max() > 0.01


@pytest.mark.parametrize("old_config", [False, True])
def test_sdxl_draws_with_the_word_what_the_model_draws(tiny_sdxl, tmp_path, old_config):
    folder = tiny_sdxl
    if old_config:
        pipeline = diffusers.DiffusionPipeline.from_pretrained(tiny_sdxl)
        pipeline.text_encoder_2.config.eos_token_id = 2
        folder = str(tmp_path / "old")
        pipeline.save_pretrained(folder)
    module = shaken(textual_inversion(folder))
    images = module.sample_prompts(PROMPTS, generator=sample_generators(0, 2))
    told = module.export("textual-inversion", tmp_path / "out")
    vectors = safetensors.torch.load_file(tmp_path / "out" / "learned_embeds.safetensors")
    assert {key: tuple(value.shape) for key, value in vectors.items()} == {"clip_l": (2, 32), "clip_g": (2, 32)}
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    exec(told, {"pipeline": pipeline, "safetensors": safetensors})
    torch.testing.assert_close(diffusers_draw(pipeline, PROMPTS), images, atol=1e-5, rtol=1e-4)
    assert ("eos_token_id" in told) == old_config


def test_another_format_is_refused(learned, tmp_path):
    assert learned.export_formats == ("textual-inversion",)
    with pytest.raises(ValueError, match=r"all that was trained is a word. Take textual-inversion"):
        learned.export("merged", tmp_path)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_vectors": 0}, "num_vectors must be at least 1, got 0"),
        ({"memory": Memory(cache="both")}, "would keep what the new word meant at first"),
        ({"token": "toy</w>"}, "token must be new"),
        ({"initializer": "toy dog"}, "initializer must be one token"),
    ],
)
def test_impossible_settings_are_refused(tiny_sd, wrong, message):
    with pytest.raises(ValueError, match=f"TextualInversion: .*{message}"):
        textual_inversion(tiny_sd, **wrong)


def test_frozen_weights_may_be_of_half_precision(tiny_sd, tmp_path):
    module = textual_inversion(tiny_sd, memory=Memory(frozen_dtype="bfloat16", cache="latents"))
    assert module.embeddings["text_encoder"].learned.dtype == torch.float32
    assert module.embeddings["text_encoder"].table.weight.dtype == torch.bfloat16
    _, (loss,) = fit(tmp_path, module, [batch(2, caption=CAPTION)])
    _, (expected,) = fit(tmp_path, textual_inversion(tiny_sd), [batch(2, caption=CAPTION)])
    assert loss == pytest.approx(expected, rel=2e-2)


def test_no_network_is_in_training_mode(learned):
    learned.train()
    assert not any(m.training for m in learned.model.modules())


def test_a_checkpoint_is_small_and_loaded_alone(learned, tmp_path):
    fitted = trainer(tmp_path)
    fitted.strategy.connect(learned)
    fitted.save_checkpoint(tmp_path / "one.ckpt")
    assert (tmp_path / "one.ckpt").stat().st_size < 50_000
    loaded = load_module(tmp_path / "one.ckpt", trust=("peft",))
    draws = [m.sample_prompts(PROMPTS, generator=sample_generators(0, 2)) for m in (loaded, learned)]
    torch.testing.assert_close(draws[0], draws[1], rtol=0, atol=0)


@pytest.mark.slow
def test_a_word_learns_what_the_pictures_show(tiny_sd, tmp_path):
    """On random weights the loss has little to fall: from 1.121 to 1.104."""
    module = textual_inversion(tiny_sd)
    given = batch(4, caption=CAPTION)
    loader = torch.utils.data.DataLoader([given], batch_size=None)
    (before,) = trainer(tmp_path).validate(module, loader, verbose=False)
    fit(tmp_path, module, [given] * 40)
    (after,) = trainer(tmp_path).validate(module, loader, verbose=False)
    assert after["val/loss"] < before["val/loss"] - 0.005
