import pytest
import torch

from lit_generative.finetune.options import Memory, Sampling
from lit_generative.recipe import describe
from lit_generative.types import PromptOptions


def test_options_complete_each_other():
    sampling = Sampling(["a"], negative="bad", guidance_scale=3.0, num_steps=4)
    assert sampling.completed(PromptOptions())[:3] == ("bad", 3.0, 4)
    assert sampling.completed(PromptOptions("worse", 2.0, 7))[:3] == ("worse", 2.0, 7)
    assert sampling.completed(PromptOptions(negative="")).negative == ""


@pytest.mark.parametrize("options", [{"guidance_scale": 0.5}, {"num_steps": 0}])
def test_impossible_numbers_are_refused_wherever_they_come_from(options):
    with pytest.raises(ValueError, match=f"Sampling: {next(iter(options))} must be at least 1"):
        Sampling(**options)
    with pytest.raises(ValueError, match="must be at least 1"):
        Sampling().completed(PromptOptions(**options))


def test_a_single_text_is_no_list_of_prompts():
    with pytest.raises(ValueError, match="must be a list, got the text 'a dog'"):
        Sampling("a dog")


def test_the_settings_are_plain_data():
    settings = Sampling(("a", "b"), image_size=64).settings()
    assert settings == {
        "prompts": ["a", "b"],
        "negative": None,
        "guidance_scale": 7.5,
        "num_steps": 50,
        "image_size": 64,
    }
    assert describe(Sampling(("a",)))["init_args"]["prompts"] == ["a"]


@pytest.mark.parametrize(
    ("cache", "latents", "text"),
    [(None, False, False), ("latents", True, False), ("text", False, True), ("both", True, True)],
)
def test_caches_are_named(cache, latents, text):
    memory = Memory(cache=cache)
    assert (memory.caches_latents, memory.caches_text) == (latents, text)


def test_the_type_of_frozen_weights_is_named():
    assert Memory().dtype == torch.float32
    assert Memory(frozen_dtype="bfloat16").dtype == torch.bfloat16


@pytest.mark.parametrize("wrong", [{"cache": "all"}, {"frozen_dtype": "int8"}])
def test_unknown_names_are_refused(wrong):
    with pytest.raises(ValueError, match=f"Memory: {next(iter(wrong))} must be"):
        Memory(**wrong)
