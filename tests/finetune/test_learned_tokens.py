import diffusers
import pytest
import torch
from torch import nn

from lit_generative.finetune.learned_tokens import LearnedTokens, add_tokens, token_names
from lit_generative.finetune.prompts import prompts_of


@pytest.fixture
def prompts(tiny_sd):
    return prompts_of(diffusers.DiffusionPipeline.from_pretrained(tiny_sd))


def test_new_ids_have_rows_of_their_own_and_others_those_of_the_table():
    table = nn.Embedding(5, 3)
    tokens = LearnedTokens(table, [7, 8], table.weight[2])
    with torch.no_grad():
        tokens.learned[1] += 1
    found = tokens(torch.tensor([[4, 8, 0], [7, 1, 2]]))
    torch.testing.assert_close(found[0, 0], table.weight[4])
    torch.testing.assert_close(found[0, 1], table.weight[2] + 1)
    torch.testing.assert_close(found[1, 0], table.weight[2])
    torch.testing.assert_close(found[1, 1:], table.weight[1:3])


def test_only_new_rows_get_a_gradient_and_in_float32():
    table = nn.Embedding(5, 3).requires_grad_(False).bfloat16()
    tokens = LearnedTokens(table, [5], table.weight[2])
    vectors = tokens(torch.tensor([[5, 1, 5]]))
    assert vectors.dtype == torch.bfloat16
    vectors.float().sum().backward()
    torch.testing.assert_close(tokens.learned.grad, torch.full((1, 3), 2.0))
    assert table.weight.grad is None


def test_the_names_are_those_of_diffusers():
    assert token_names("<it>", 3) == ["<it>", "<it>_1", "<it>_2"]


def test_a_new_word_starts_as_the_known_one(prompts):
    known = prompts(["a photo of a toy today", "toy"])
    add_tokens("X", prompts, "<it>", "toy", 1)
    torch.testing.assert_close(prompts(["a photo of a <it> today", "<it>"]).hidden, known.hidden)


def test_the_table_stays_as_it_was(prompts):
    before = prompts.text_encoder.get_input_embeddings().weight.clone()
    added = add_tokens("X", prompts, "<it>", "toy", 2)
    assert list(added) == ["text_encoder"]
    assert torch.equal(added["text_encoder"].table.weight, before)
    assert added["text_encoder"].learned.shape == (2, 32)


def test_two_encoders_get_rows_each(tiny_sdxl):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tiny_sdxl)
    prompts = prompts_of(pipeline)
    added = add_tokens("X", prompts, "<it>", "toy", 2)
    for name, tokens in added.items():
        assert prompts.encoders[name].get_input_embeddings() is tokens
        torch.testing.assert_close(
            tokens.learned[0], tokens.table.weight[pipeline.tokenizer.encode("toy", add_special_tokens=False)[0]]
        )
    assert list(added) == ["text_encoder", "text_encoder_2"]


def test_an_old_config_does_not_pool_at_the_new_word(tiny_sdxl):
    """With the id 2 the pooled vector is taken at the largest id, which is then the new word's, not the end's."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tiny_sdxl)
    pipeline.text_encoder_2.text_model.eos_token_id = 2
    prompts = prompts_of(pipeline)
    add_tokens("X", prompts, "<it>", "toy", 1)
    pooled = prompts(["<it> on white", "<it> on black"]).pooled
    assert (pooled[0] - pooled[1]).abs().max() > 1e-3


@pytest.mark.parametrize("token", ["toy</w>", "<|endoftext|>"])
def test_a_word_that_exists_is_refused(prompts, token):
    with pytest.raises(ValueError, match=r"X: token must be new, and .* is in the vocabulary"):
        add_tokens("X", prompts, token, "toy", 1)


def test_an_initializer_of_several_tokens_is_refused(prompts):
    with pytest.raises(ValueError, match=r"initializer must be one token .* 'toy dog' is 2"):
        add_tokens("X", prompts, "<it>", "toy dog", 1)
