import json

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, LlamaForCausalLM

from lit_generative.finetune.lm_loading import load_causal_lm, positions_of


def refused(message, pretrained, dtype="float32", quantization=None):
    with pytest.raises(ValueError, match=message):
        load_causal_lm("CausalLM", str(pretrained), None, dtype, quantization)


@pytest.fixture
def folder(tmp_path, tiny_llama):
    """One that may be damaged."""
    LlamaForCausalLM.from_pretrained(tiny_llama).save_pretrained(tmp_path / "copy")
    return tmp_path / "copy"


def test_a_folder_is_loaded_as_it_was_saved_ready_to_train(tiny_llama):
    model = load_causal_lm("CausalLM", tiny_llama, None, "float32", None)
    torch.testing.assert_close(model.state_dict(), LlamaForCausalLM.from_pretrained(tiny_llama).state_dict())
    assert all(part.training for part in model.modules())
    assert positions_of(model) == 128


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_get_the_dtype_that_is_asked_for_whatever_the_folders(folder, dtype):
    LlamaForCausalLM.from_pretrained(folder).half().save_pretrained(folder)
    model = load_causal_lm("CausalLM", str(folder), None, dtype, None)
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}


def test_a_folder_that_is_not_there_is_refused():
    refused("CausalLM: there is no folder '/no/such', and names on the hub read owner/name", "/no/such")


def test_a_name_on_the_hub_without_a_network_is_refused(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused(r"'nobody/nothing' could not be loaded .*Without a network only folders work", "nobody/nothing")


def test_a_folder_of_stable_diffusion_is_refused_by_name(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    refused(
        "must hold a causal language model, and holds a StableDiffusionPipeline of diffusers.*TextToImage", tmp_path
    )


def test_an_adapters_folder_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    refused("holds an adapter alone. Give its base", tmp_path)


def test_another_kind_of_model_is_refused(tmp_path):
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    CLIPTextModel(CLIPTextConfig(**small, vocab_size=9)).save_pretrained(tmp_path)
    refused("could not be loaded as a causal language model: .*CLIPTextConfig", tmp_path)


def test_weights_that_are_not_complete_are_refused(folder):
    state = load_file(folder / "model.safetensors")
    del state["lm_head.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    refused("must hold all weights of a LlamaForCausalLM, but 1 are missing, lm_head.weight among them", folder)


def test_pickled_weights_are_never_read(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    refused(r"could not be loaded .*pickled weights \(.bin\) are never read", folder)


def test_quantization_without_a_gpu_is_refused(tiny_llama, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused("quantization='4bit' needs a GPU of NVIDIA, and there is none here", tiny_llama, quantization="4bit")


def test_quantization_without_bitsandbytes_is_refused(tiny_llama, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "bitsandbytes" else name)
    refused("quantization='4bit' needs the package bitsandbytes. Install it", tiny_llama, quantization="4bit")


def test_another_quantization_is_refused(tiny_llama):
    refused("quantization must be '4bit' or None, got '8bit'", tiny_llama, quantization="8bit")


def test_four_bits_are_asked_for_as_qlora_does(tiny_llama, monkeypatch):
    from lit_generative.finetune import lm_loading

    asked = {}

    def load(pretrained, **options):
        asked.update(options)
        raise OSError("no GPU")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr(lm_loading, "BitsAndBytesConfig", dict)  # its own checks its package
    monkeypatch.setattr(lm_loading.AutoModelForCausalLM, "from_pretrained", load)
    refused("no GPU", tiny_llama, quantization="4bit")
    config = asked["quantization_config"]
    assert config["load_in_4bit"]
    assert config["bnb_4bit_use_double_quant"]
    assert (config["bnb_4bit_quant_type"], config["bnb_4bit_compute_dtype"]) == ("nf4", torch.bfloat16)
    assert asked["device_map"] == {"": 3}
