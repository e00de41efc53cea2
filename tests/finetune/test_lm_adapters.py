import copy

import pytest
import torch
from peft import (
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
)
from transformers import LlamaForCausalLM

from lit_generative.finetune.lm_adapters import adapt, check_adapter, virtual_tokens


def adapted(folder, adapter, dtype=torch.float32):
    model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
    return adapt("CausalLM", model, adapter, folder, "abc")


@pytest.mark.parametrize(
    ("adapter", "trained"),
    [
        (LoraConfig(r=2, target_modules=["q_proj"]), 3 * 2 * (64 + 64)),
        (LoraConfig(r=2, target_modules="all-linear", use_dora=True), None),
        (LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]), 3 * 2 * (64 + 64) + 512 * 64),
        (IA3Config(target_modules=["k_proj"], feedforward_modules=[]), 3 * 32),
        (PromptTuningConfig(num_virtual_tokens=5), 5 * 64),
        (PrefixTuningConfig(num_virtual_tokens=5), 5 * 3 * 2 * 32),
        (PromptEncoderConfig(num_virtual_tokens=5, encoder_hidden_size=7), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_nothing_but_the_adapter_is_trained_and_the_config_given_is_not_changed(tiny_llama, adapter, trained):
    given = copy.deepcopy(adapter)
    model, used = adapted(tiny_llama, adapter)
    assert adapter == given
    assert (used.task_type, used.base_model_name_or_path, used.revision) == ("CAUSAL_LM", tiny_llama, "abc")
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert 0 < count < 50_000
    assert trained is None or count == trained


@pytest.mark.parametrize("adapter", [LoraConfig(target_modules=["v_proj"]), PromptTuningConfig(num_virtual_tokens=2)])
def test_an_adapter_of_a_coarse_base_is_in_float32(tiny_llama, adapter):
    model, _ = adapted(tiny_llama, adapter, torch.bfloat16)
    kinds = {(p.requires_grad, p.dtype) for p in model.parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    logits = model(input_ids=torch.tensor([[1, 5, 6]])).logits
    logits.float().sum().backward()


def test_learned_words_take_positions():
    assert virtual_tokens(PromptTuningConfig(num_virtual_tokens=5)) == 5
    assert virtual_tokens(LoraConfig()) == virtual_tokens(None) == 0


def test_target_modules_that_name_nothing_are_refused(tiny_llama):
    with pytest.raises(ValueError, match=r"CausalLM: target_modules name no layer of the LlamaForCausalLM: 'to_q'"):
        adapted(tiny_llama, LoraConfig(target_modules=["to_q"]))
    with pytest.raises(ValueError, match=r"q_projj'. The nearest are: .*q_proj"):
        adapted(tiny_llama, LoraConfig(target_modules=["q_projj"]))


def test_a_prompt_that_does_not_fit_the_model_is_refused(tiny_llama):
    with pytest.raises(ValueError, match="CausalLM: PromptTuningConfig does not fit: "):
        adapted(tiny_llama, PromptTuningConfig())


def test_what_could_not_be_trained_so_is_refused():
    with pytest.raises(TypeError, match=r"task_type must be CAUSAL_LM, got .*SEQ_CLS. Leave it out"):
        check_adapter("CausalLM", LoraConfig(task_type=TaskType.SEQ_CLS), [], False)
    with pytest.raises(ValueError, match=r"train and freeze, here \['lm_head'\], choose among the base's weights"):
        check_adapter("CausalLM", LoraConfig(), ["lm_head"], False)
    with pytest.raises(ValueError, match=r"prefix tuning keeps its prefix in the cache.*gradient_checkpointing to fal"):
        check_adapter("CausalLM", PrefixTuningConfig(num_virtual_tokens=2), [], True)
    for fine in (None, LoraConfig(task_type="CAUSAL_LM"), PromptTuningConfig(num_virtual_tokens=2)):
        check_adapter("CausalLM", fine, [], True)
    check_adapter("CausalLM", None, ["lm_head"], True)
