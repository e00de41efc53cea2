import warnings

import diffusers
import pytest
import torch

from lit_generative.finetune.prompts import DualClipPrompts, prompts_of

TEXTS = ["a photo of a red circle", "a blue square"]


@pytest.fixture(scope="module")
def sd(tiny_sd):
    return diffusers.DiffusionPipeline.from_pretrained(tiny_sd)


@pytest.fixture(scope="module")
def sdxl(tiny_sdxl):
    return diffusers.DiffusionPipeline.from_pretrained(tiny_sdxl)


def test_one_encoder_sees_what_the_pipeline_sees(sd):
    encoded = prompts_of(sd)(TEXTS)
    expected, _ = sd.encode_prompt(TEXTS, "cpu", 1, False)
    torch.testing.assert_close(encoded.hidden, expected)
    assert encoded.pooled is None


def test_two_encoders_see_what_the_pipeline_sees(sdxl):
    encoded = prompts_of(sdxl)(TEXTS)
    expected, _, pooled, _ = sdxl.encode_prompt(TEXTS, device="cpu", do_classifier_free_guidance=False)
    torch.testing.assert_close(encoded.hidden, expected)
    torch.testing.assert_close(encoded.pooled, pooled)


def test_no_prompt_is_the_empty_one_to_stable_diffusion(sd):
    hidden = prompts_of(sd)([None, ""]).hidden
    torch.testing.assert_close(hidden[0], hidden[1])
    assert hidden.abs().sum() > 0


def test_no_prompt_is_zeros_to_sdxl_if_its_pipeline_says_so(sdxl):
    encoded = prompts_of(sdxl)([TEXTS[0], None, ""])
    assert encoded.hidden[1].abs().sum() == encoded.pooled[1].abs().sum() == 0
    for i in (0, 2):
        assert encoded.hidden[i].abs().sum() > 0
        assert encoded.pooled[i].abs().sum() > 0
    other = DualClipPrompts(sdxl.tokenizer, sdxl.tokenizer_2, sdxl.text_encoder, sdxl.text_encoder_2, False)
    assert other([None]).hidden.abs().sum() > 0


def test_encoders_and_tokenizers_have_the_pipelines_names(sd, sdxl):
    for pipeline in (sd, sdxl):
        prompts = prompts_of(pipeline)
        for name, part in {**prompts.encoders, **prompts.tokenizers}.items():
            assert getattr(pipeline, name) is part


def test_tokens_are_padded_each_tokenizers_way(sdxl):
    first, second = prompts_of(sdxl).tokens(["red"])
    assert first.shape == second.shape == (1, 77)
    assert first[0, -1] == sdxl.tokenizer.eos_token_id
    assert second[0, -1] == sdxl.tokenizer_2.pad_token_id != sdxl.tokenizer.eos_token_id


def test_a_prompt_that_is_too_long_is_cut_and_the_warning_says_what_is_lost(sd):
    long = " ".join(["red"] * 75) + " blue square"
    with pytest.warns(UserWarning, match="sees 77 tokens.* does not see 'blue square'"):
        (ids,) = prompts_of(sd).tokens(["a circle", long, "a square"])
    expected = sd.tokenizer(["a circle", long, "a square"], padding="max_length", truncation=True, return_tensors="pt")
    assert torch.equal(ids, expected.input_ids)


def test_a_prompt_that_just_fits_is_not_warned_of(sd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prompts_of(sd).tokens([" ".join(["red"] * 75)])
