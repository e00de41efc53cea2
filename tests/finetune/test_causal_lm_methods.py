"""Each way of fine-tuning on the tiny base: it learns, reloads equal through PEFT, and its texts are its own argmax."""

import functools

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig
from transformers import AutoModelForCausalLM

from lit_generative.data.toy_texts import ToyQuestions, ToyTexts, questions
from lit_generative.finetune.causal_lm import CausalLM
from tests import tiny

WORDS = {"num_virtual_tokens": 8}
METHODS = {
    "full": (None, 1e-3),
    "LoRA": (LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"), 5e-3),
    "DoRA": (LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", use_dora=True), 5e-3),
    "IA3": (IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]), 3e-2),
    "prompt": (PromptTuningConfig(**WORDS), 2e-2),
    "prefix": (PrefixTuningConfig(**WORDS), 2e-2),
    "prefix projected": (PrefixTuningConfig(**WORDS, prefix_projection=True, encoder_hidden_size=64), 5e-3),
    "p-tuning MLP": (PromptEncoderConfig(**WORDS, encoder_hidden_size=64), 5e-3),
    "p-tuning LSTM": (
        PromptEncoderConfig(**WORDS, encoder_hidden_size=64, encoder_reparameterization_type="LSTM"),
        5e-3,
    ),
}


def loss_of(model, batch) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).loss


def step_by_step(model, ids: list[int], end: int, most: int) -> list[int]:
    """The likeliest token again and again, each time of the whole text and without a cache."""
    drawn: list[int] = []
    while len(drawn) < most and end not in drawn:
        tokens = torch.tensor([ids + drawn])
        with torch.no_grad():
            logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
        drawn.append(int(logits[0, -1].argmax()))
    return drawn


@pytest.mark.slow  # one to three seconds each, and the base ten
@pytest.mark.filterwarnings("ignore:Position ids are not supported")
@pytest.mark.parametrize("method", METHODS)
def test_it_learns_reloads_equal_and_generates_its_own_argmax(taught_llama, tmp_path, method):
    adapter, rate = METHODS[method]
    learns_words = adapter is not None and adapter.is_prompt_learning
    torch.manual_seed(0)
    optimizer = functools.partial(torch.optim.AdamW, lr=rate, weight_decay=0.0)
    module = CausalLM(taught_llama, optimizer, adapter=adapter, temperature=0, max_new_tokens=6)
    data = (ToyQuestions if learns_words else ToyTexts)(pretrained=taught_llama, batch_size=8, eval_batch_size=64)
    trainer = tiny.trainer(tmp_path)
    before = trainer.validate(module, data, verbose=False)[0]["val/loss"]
    tiny.train(tmp_path, module, data, max_steps=60)
    after = trainer.validate(module, data, verbose=False)[0]["val/loss"]
    assert after < 0.9 * before

    module.eval()
    export = module.export_formats[0]
    module.export(export, tmp_path / "out")
    if export == "peft":
        base = AutoModelForCausalLM.from_pretrained(taught_llama)
        loaded = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    else:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    batch = next(iter(data.val_dataloader()[0]))
    torch.testing.assert_close(loss_of(loaded, batch), loss_of(module.model, batch), rtol=0, atol=1e-5)
    assert loss_of(loaded, batch).item() == pytest.approx(after, abs=1e-4)

    prompts = [prompt for prompt, _ in questions()[:3]] + ["Aspirin lowers", "Ben"]
    for prompt, text in zip(prompts, module.sample_prompts(prompts), strict=True):
        ids = step_by_step(loaded, module.tokenizer(prompt).input_ids, module.tokenizer.eos_token_id, 6)
        assert text == module.tokenizer.decode(ids, skip_special_tokens=True)
