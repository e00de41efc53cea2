import json

import diffusers
import pytest
import torch
from peft import AdaLoraConfig, LoHaConfig, LoraConfig, PeftModel
from safetensors import safe_open

from lit_generative.finetune.exports import formats_of
from lit_generative.finetune.options import Memory
from lit_generative.tensor_ops import sample_generators
from tests.finetune.sd_models import LORA, TEXT_LORA, diffusers_draw, shaken, text_to_image

PROMPTS = ["a red circle", "a photo of a blue square"]
KINDS = ["tiny_sd", "tiny_sd_v", "tiny_sdxl"]


def tuned(folder, **kwargs):
    """All adapters moved, and what is drawn with them."""
    module = shaken(text_to_image(folder, **({"text_adapter": TEXT_LORA} | kwargs)))
    return module, module.sample_prompts(PROMPTS, generator=sample_generators(0, 2))


def base_of(folder):
    return diffusers.DiffusionPipeline.from_pretrained(folder)


@pytest.mark.parametrize(
    ("adapters", "whole", "expected"),
    [
        ({"unet": LORA}, False, ("diffusers", "merged", "diffusers-lora", "peft")),
        ({"unet": LORA, "text_encoder": LoHaConfig()}, False, ("diffusers", "merged", "peft")),
        ({"unet": AdaLoraConfig(total_step=9)}, False, ("diffusers", "merged", "peft")),
        ({"unet": LORA}, True, ("diffusers", "merged")),
        ({}, False, ("diffusers", "merged")),
    ],
)
def test_adapters_are_written_alone_only_if_they_are_all_there_is(adapters, whole, expected):
    assert formats_of(adapters, whole) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_pipeline_draws_what_the_model_draws(kind, request, tmp_path):
    module, images = tuned(request.getfixturevalue(kind))
    before = {name: value.clone() for name, value in module.model.named_parameters()}
    told = module.export("diffusers", tmp_path / "out")
    assert told == f"diffusers.DiffusionPipeline.from_pretrained({str(tmp_path / 'out')!r})"
    loaded = base_of(tmp_path / "out")
    assert type(loaded.scheduler) is type(module.model.scheduler)
    torch.testing.assert_close(diffusers_draw(loaded, PROMPTS), images, atol=1e-5, rtol=1e-4)
    for name, value in module.model.named_parameters():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_lora_file_draws_what_the_model_draws_though_alpha_is_not_the_rank(kind, request, tmp_path):
    folder = request.getfixturevalue(kind)
    module, images = tuned(folder)
    module.export("diffusers-lora", tmp_path)
    pipeline = base_of(folder)
    untouched = diffusers_draw(pipeline, PROMPTS)
    pipeline.load_lora_weights(str(tmp_path))
    torch.testing.assert_close(diffusers_draw(pipeline, PROMPTS), images, atol=1e-5, rtol=1e-4)
    assert (untouched - images).abs().max() > 0.01


def test_a_lora_file_has_old_names_of_the_text_encoder_and_both_alphas(tiny_sd, tmp_path):
    module, _ = tuned(tiny_sd)
    module.export("diffusers-lora", tmp_path)
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as file:
        names, metadata = list(file.keys()), json.loads(file.metadata()["lora_adapter_metadata"])
    of_text = [name for name in names if name.startswith("text_encoder.")]
    assert of_text
    assert all(name.startswith("text_encoder.text_model.encoder.layers.") for name in of_text)
    assert metadata["unet.lora_alpha"] == 6
    assert metadata["text_encoder.lora_alpha"] == 5
    assert metadata["unet.target_modules"] == sorted(LORA.target_modules)


def test_a_dora_file_draws_what_the_model_draws(tiny_sd, tmp_path):
    module, images = tuned(
        tiny_sd, adapter=LoraConfig(r=2, lora_alpha=3, use_dora=True, target_modules=["to_q", "to_v"])
    )
    module.export("diffusers-lora", tmp_path)
    pipeline = base_of(tiny_sd)
    pipeline.load_lora_weights(str(tmp_path))
    torch.testing.assert_close(diffusers_draw(pipeline, PROMPTS), images, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["tiny_sd", "tiny_sdxl"])
def test_adapters_are_read_by_peft(kind, request, tmp_path):
    folder = request.getfixturevalue(kind)
    module, images = tuned(folder)
    told = module.export("peft", tmp_path)
    assert f"PeftModel.from_pretrained(pipeline.unet, {str(tmp_path)!r})" in told
    pipeline = base_of(folder)
    PeftModel.from_pretrained(pipeline.unet, tmp_path)
    for name in module.model.prompts.encoders:
        assert repr(str(tmp_path / name)) in told
        PeftModel.from_pretrained(getattr(pipeline, name), tmp_path / name)
    torch.testing.assert_close(diffusers_draw(pipeline, PROMPTS), images, atol=1e-5, rtol=1e-4)


def test_another_adapter_is_refused_as_lora_and_written_whole(tiny_sd, tmp_path):
    module, images = tuned(tiny_sd, adapter=LoHaConfig(r=2, target_modules=["to_q", "to_v"]), text_adapter=None)
    with pytest.raises(ValueError, match=r"adapters of LoraConfig, not of LoHaConfig. Take peft, or diffusers"):
        module.export("diffusers-lora", tmp_path)
    module.export("merged", tmp_path)
    torch.testing.assert_close(diffusers_draw(base_of(tmp_path), PROMPTS), images, atol=1e-4, rtol=1e-3)


def test_trained_weights_without_adapter_are_refused_as_adapters(tiny_sd, tmp_path):
    module = text_to_image(tiny_sd, train_text_encoder=True)
    assert module.export_formats == ("diffusers", "merged")
    for form in ("diffusers-lora", "peft"):
        with pytest.raises(ValueError, match=r"belong to no adapter. Take diffusers"):
            module.export(form, tmp_path)
    with pytest.raises(ValueError, match=r"the forms are diffusers, merged, diffusers-lora, peft"):
        module.export("onnx", tmp_path)


def test_fully_trained_weights_are_in_the_pipeline(tiny_sd, tmp_path):
    module, images = tuned(tiny_sd, adapter=None, text_adapter=None, train_text_encoder=True)
    module.export("diffusers", tmp_path)
    torch.testing.assert_close(diffusers_draw(base_of(tmp_path), PROMPTS), images, atol=1e-5, rtol=1e-4)


def test_half_precision_is_not_written(tiny_sd, tmp_path):
    module, _ = tuned(tiny_sd, memory=Memory(frozen_dtype="bfloat16"))
    module.export("diffusers", tmp_path)
    loaded = base_of(tmp_path)
    assert {p.dtype for p in [*loaded.unet.parameters(), *loaded.text_encoder.parameters()]} == {torch.float32}
    assert any(p.dtype == torch.bfloat16 for p in module.model.unet.parameters())
