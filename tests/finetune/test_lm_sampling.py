import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from lit_generative.finetune.lm_sampling import GumbelNoise, continue_tokens, end_tokens
from lit_generative.tensor_ops import sample_generators


@pytest.fixture(scope="module")
def model(tiny_llama):
    return LlamaForCausalLM.from_pretrained(tiny_llama).eval()


def test_the_largest_of_noisy_scores_is_a_draw_from_the_softmax():
    logits = torch.tensor([0.3, -1.0, 2.0, float("-inf")])
    noise = GumbelNoise(0.7, torch.Generator().manual_seed(0))
    drawn = noise(torch.zeros(0), logits.expand(40_000, 4)).argmax(dim=1)
    shares = torch.bincount(drawn, minlength=4) / len(drawn)
    torch.testing.assert_close(shares, torch.softmax(logits / 0.7, dim=0), rtol=0, atol=0.008)
    assert shares[3] == 0


def test_temperature_zero_takes_the_most_likely_token_each_time(model):
    ids = [1, 300, 301]
    drawn = continue_tokens(model, ids, [2], max_new_tokens=6, temperature=0)
    for _ in range(6):
        ids = [*ids, int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
    assert drawn == ids[3:]


def test_a_draw_is_a_function_of_its_generator_and_leaves_torchs_own_alone(model):
    before = torch.get_rng_state()
    one, two = sample_generators(0, 2)
    texts = [continue_tokens(model, [1, 300], [2], 9, 1.0, g) for g in (one, two, sample_generators(0, 1)[0])]
    assert texts[0] == texts[2]
    assert texts[0] != texts[1]
    torch.testing.assert_close(torch.get_rng_state(), before)


def test_without_a_generator_torchs_own_is_used(model):
    texts = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        texts.append(continue_tokens(model, [1, 300], [2], 9, 1.0))
    assert texts[0] == texts[1] != texts[2]


def test_any_end_token_ends_a_text_and_is_its_last(model):
    whole = continue_tokens(model, [1, 300], [2], 8, 0)
    assert len(whole) == 8
    assert continue_tokens(model, [1, 300], [2, whole[3]], 8, 0) == whole[: whole.index(whole[3]) + 1]


def test_the_ends_are_the_tokenizers_and_the_models(model, tiny_llama):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    assert end_tokens(model, tokenizer) == [2]
    model.generation_config.eos_token_id = [7, 2, 8]
    assert end_tokens(model, tokenizer) == [2, 7, 8]
    model.generation_config.eos_token_id = None
    assert end_tokens(model, tokenizer) == [2]
    model.generation_config.eos_token_id = 2
