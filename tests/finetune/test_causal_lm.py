import functools
import math

import lightning as L
import pytest
import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from lit_generative.callbacks.checkpoint import Checkpoint
from lit_generative.callbacks.ema import EMA
from lit_generative.callbacks.sample_grid import SampleGrid
from lit_generative.data.texts import TextData
from lit_generative.data.toy_texts import ToyQuestions, ToyTexts, questions
from lit_generative.finetune import causal_lm
from lit_generative.finetune.causal_lm import CausalLM
from lit_generative.loading import load_module
from lit_generative.tensor_ops import sample_generators
from lit_generative.training.lr_schedules import WarmupPlateau
from lit_generative.types import PromptOptions, SupportsAveraging, SupportsExport, SupportsPrompts
from tests import tiny
from tests.finetune import tiny_llama as llama

ADAMW = functools.partial(torch.optim.AdamW, lr=5e-3)
LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
PROMPT = PromptTuningConfig(num_virtual_tokens=5)


def lm(folder, seed=0, **kwargs) -> CausalLM:
    torch.manual_seed(seed)
    return CausalLM(folder, **({"optimizer": ADAMW} | kwargs))


def toy(folder, **kwargs) -> ToyTexts:
    """15 batches an epoch."""
    options = {"num_sentences": 120, "block_size": 24, "batch_size": 4, "general": None} | kwargs
    return ToyTexts(pretrained=folder, **options)


def moved(module) -> CausalLM:
    """With trained parts that are no longer the ones of the beginning."""
    torch.manual_seed(1)
    for p in module.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn_like(p)
    return module.eval()


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[1, 300, 311, 270], [1, 290, 400, 2]])).logits


# training


@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
def test_the_loss_curve_is_that_of_a_plain_loop(tiny_llama, tmp_path, adapter):
    losses = []

    class Records(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            losses.append(outputs["loss"].detach())

    tiny.train(tmp_path, lm(tiny_llama, adapter=adapter), toy(tiny_llama), max_steps=20, callbacks=[Records()])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).train()
    model = model if adapter is None else get_peft_model(model, LoraConfig(**adapter.to_dict() | {"peft_type": None}))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    data, expected = toy(tiny_llama), []
    data.setup("fit")
    loader = data.train_dataloader()
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            loss = model(**batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            expected.append(loss.detach())
    torch.testing.assert_close(torch.stack(losses), torch.stack(expected[:20]), rtol=0, atol=1e-5)
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("adapter", [PROMPT, PrefixTuningConfig(num_virtual_tokens=3)], ids=["prompt", "prefix"])
def test_the_loss_beside_learned_words_is_pefts_own(tiny_llama, adapter):
    module, data = lm(tiny_llama, adapter=adapter), ToyQuestions(pretrained=tiny_llama, batch_size=5)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    total, count = module.loss_sum(batch)
    assert count == (batch["labels"] != -100).sum()
    torch.testing.assert_close(total / count, module.model(**batch).loss)


def test_train_patterns_choose_the_weights(tiny_llama, tmp_path):
    module = lm(tiny_llama, train=["model.layers.2", "lm_head"], freeze=["*.mlp"])
    before = tiny.weights(module.model)
    tiny.train(tmp_path, module, toy(tiny_llama))
    changed = {name for name, value in module.model.state_dict().items() if not torch.equal(value, before[name])}
    expected = {name for name in before if name.startswith("model.layers.2.") and ".mlp." not in name}
    assert changed == expected | {"lm_head.weight"}
    assert {key for key in module.state_dict() if key != "_extra_state"} == {f"model.{name}" for name in changed}


def test_gradient_checkpointing_changes_no_gradient(tiny_llama):
    data = toy(tiny_llama)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    gradients = []
    for checkpointing in (False, True):
        module = lm(tiny_llama, adapter=LORA, gradient_checkpointing=checkpointing)
        assert module.model.is_activation_checkpointing == checkpointing
        module.loss_sum(batch)[0].backward()
        gradients.append([p.grad for p in module.parameters() if p.requires_grad])
    torch.testing.assert_close(*gradients)
    assert max(g.abs().max() for g in gradients[0]) > 0.01


def test_a_coarse_frozen_base_trains_its_adapter_in_float32(tiny_llama, tmp_path):
    module = lm(tiny_llama, adapter=LORA, frozen_dtype="bfloat16")
    trained = tiny.train(tmp_path, module, toy(tiny_llama), precision="bf16-mixed")
    assert {p.dtype for p in module.parameters() if p.requires_grad} == {torch.float32}
    assert math.isfinite(trained.callback_metrics["train/loss"])


# evaluation


def test_perplexity_is_that_of_the_mean_over_all_tokens_of_a_set(tiny_llama, tmp_path):
    module = moved(lm(tiny_llama))
    data = toy(tiny_llama, general="everyday:2", eval_batch_size=4, val_fraction=0.3, test="medical:5")
    trainer = tiny.trainer(tmp_path)
    logged = {**trainer.validate(module, data, verbose=False)[0], **trainer.validate(module, data, verbose=False)[1]}
    for rows, prefix in ((data.splits.val, "val"), (data._general, "val_general")):
        losses = []
        for tokens, n in zip(rows.tokens.long(), rows.length, strict=True):
            with torch.no_grad():
                logits = module.model(input_ids=tokens[None, :n]).logits[0, :-1]
            losses.append(F.cross_entropy(logits, tokens[1:n], reduction="none"))
        mean = torch.cat(losses).mean().item()
        assert len(rows) > 8
        assert rows.length[-1] != rows.length[0]
        assert logged[f"{prefix}/loss"] == pytest.approx(mean, rel=1e-5)
        assert logged[f"{prefix}/perplexity"] == pytest.approx(math.exp(mean), rel=1e-4)
        assert abs(torch.stack([part.mean() for part in losses]).mean().item() - mean) > 1e-4  # what it is not
    tested = trainer.test(module, data, verbose=False)
    assert sorted({key for part in tested for key in part}) == [
        "test/loss",
        "test/perplexity",
        "test_general/loss",
        "test_general/perplexity",
    ]


def test_without_a_data_module_sets_are_numbered(tiny_llama, tmp_path):
    data = toy(tiny_llama)
    data.setup()
    loaders = [data.val_dataloader()[0], data.val_dataloader()[0]]
    logged = tiny.trainer(tmp_path).validate(lm(tiny_llama), dataloaders=loaders, verbose=False)
    keys = {key for part in logged for key in part}
    assert keys == {"val/loss", "val/perplexity", "val_1/loss", "val_1/perplexity"}


def test_a_batch_without_labels_counts_nothing(tiny_llama, tmp_path):
    data = toy(tiny_llama, val_fraction=0.3)
    data.setup()
    batches = list(data.val_dataloader()[0])
    silent = {**batches[0], "labels": torch.full_like(batches[0]["labels"], -100)}
    results = []
    for given in (batches, [silent, *batches]):
        loader = DataLoader(given, batch_size=None)
        results += tiny.trainer(tmp_path).validate(lm(tiny_llama), dataloaders=loader, verbose=False)
    assert results[0]["val/loss"] == pytest.approx(results[1]["val/loss"], rel=1e-6)


def test_a_schedule_may_watch_the_perplexity(tiny_llama, tmp_path):
    scheduler = functools.partial(WarmupPlateau, monitor="val/perplexity", patience=0, threshold=1e9)
    options = {"max_steps": 6, "val_check_interval": 2, "limit_val_batches": 1}
    trained = tiny.train(tmp_path, lm(tiny_llama, scheduler=scheduler), toy(tiny_llama), **options)
    assert trained.optimizers[0].param_groups[0]["lr"] == pytest.approx(5e-3 / 4)  # the first of three has no best yet


# checkpoints


def test_a_checkpoint_holds_what_is_trained_alone_and_builds_the_module_again(tiny_llama, tmp_path):
    module = lm(tiny_llama, adapter=LORA, temperature=0, max_new_tokens=5)
    trained = tiny.train(tmp_path, module, toy(tiny_llama))
    trained.save_checkpoint(tmp_path / "a.ckpt")
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert all("lora" in key for key in state if key != "_extra_state")
    loaded = load_module(tmp_path / "a.ckpt", trust=["peft"])
    tiny.assert_same(logits_of(loaded.model), logits_of(module.eval().model))
    assert loaded.sampling_settings() == {"max_new_tokens": 5, "temperature": 0}
    assert loaded.adapter.r == 4


def test_a_checkpoint_on_another_base_is_refused(tiny_llama, tmp_path):
    llama.write(tmp_path / "other", seed=5)
    for adapter in (LORA, PROMPT):
        trained = tiny.train(tmp_path, lm(tiny_llama, adapter=adapter), toy(tiny_llama))
        trained.save_checkpoint(tmp_path / "a.ckpt")
        with pytest.raises(ValueError, match=r"CausalLM: these weights .* on top of others than .*other hold"):
            tiny.train(
                tmp_path,
                lm(str(tmp_path / "other"), adapter=adapter),
                toy(tiny_llama),
                ckpt_path=tmp_path / "a.ckpt",
                max_steps=4,
            )


def test_a_checkpoint_of_a_packed_base_leaves_out_how_it_is_packed(tiny_llama, monkeypatch):
    def packed(*args):
        model = LlamaForCausalLM.from_pretrained(tiny_llama)
        for part in model.modules():  # bitsandbytes writes such values beside each weight
            if isinstance(part, torch.nn.Linear):
                part.register_state_dict_post_hook(lambda m, state, prefix, _: state.update({f"{prefix}weight.a.b": 0}))
        return model

    monkeypatch.setattr(causal_lm, "load_causal_lm", packed)
    module = lm(tiny_llama, adapter=LORA, quantization="4bit")
    assert "q_proj.base_layer.weight.a.b" in module.model.model.layers[0].self_attn.state_dict()
    assert module.export_formats == ("peft",)
    state = module.state_dict()
    assert all("lora" in key for key in state if key != "_extra_state")
    module.load_state_dict(state)


@pytest.mark.parametrize("step", [15, 21], ids=["epoch's end", "mid-epoch"])
@pytest.mark.parametrize("adapter", [LORA, PROMPT], ids=["lora", "prompt"])
def test_a_resumed_run_ends_bit_for_bit_as_the_whole_one_with_its_average(tiny_llama, tmp_path, step, adapter):
    def run(folder, **kwargs):
        module = lm(tiny_llama, adapter=adapter)
        ema = EMA(half_life=50)
        callbacks = [ema, Checkpoint(every_n_steps=step, dirpath=str(tmp_path / folder))]
        options = {"max_steps": 26, "callbacks": callbacks} | kwargs
        tiny.train(tmp_path / folder, module, toy(tiny_llama, replay="everyday:3"), **options)
        return tiny.weights(module), ema.state_dict()["weights"]["ema"], ema.images

    whole = run("whole")
    run("begun", max_steps=step)
    resumed = run("resumed", ckpt_path=tmp_path / "begun" / "last.ckpt")
    tiny.assert_same(resumed, whole)
    assert set(whole[1]) == set(whole[0]) - {"_extra_state"}  # the base is not averaged
    assert any(not torch.equal(whole[0][key], value) for key, value in whole[1].items())


# sampling


def test_it_is_what_the_protocols_ask_for(tiny_llama, tmp_path):
    module = lm(tiny_llama)
    for protocol in (SupportsPrompts, SupportsExport, SupportsAveraging):
        assert isinstance(module, protocol)
    with pytest.raises(TypeError, match=r"draws texts, of prompts. Call sample_prompts\(prompts\)"):
        module.sample(3)
    with pytest.raises(TypeError, match="sample_prompts"):
        tiny.train(tmp_path, module, toy(tiny_llama), callbacks=[SampleGrid()])


def test_a_text_depends_on_its_own_generator_alone(tiny_llama):
    module, prompts = lm(tiny_llama, max_new_tokens=6), ["Anna reads", "Ben", "Anna reads"]
    texts = module.sample_prompts(prompts, generator=sample_generators(0, 3))
    assert texts[0] != texts[2]
    assert texts[2:] == module.sample_prompts(prompts[2:], generator=sample_generators(0, 1, start=2))
    shared = [module.sample_prompts(prompts, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert shared[0] == shared[1] != shared[2]
    assert shared[0][0] != shared[0][2]
    assert module.training
    assert module.model.training


def test_dropout_is_off_in_sampling_alone(tiny_llama):
    adapter = LoraConfig(r=8, lora_alpha=64, target_modules="all-linear", lora_dropout=0.5)
    module = moved(lm(tiny_llama, adapter=adapter, max_new_tokens=30))
    expected = module.sample_prompts(["Anna"], generator=sample_generators(0, 1))
    module.train()
    assert module.sample_prompts(["Anna"], generator=sample_generators(0, 1)) == expected
    assert all(part.training for part in module.modules())


def test_options_replace_the_modules_own(tiny_llama):
    module, tokenizer = lm(tiny_llama, max_new_tokens=3), AutoTokenizer.from_pretrained(tiny_llama)
    ids = tokenizer("Anna reads").input_ids
    greedy = module.model.eval().generate(torch.tensor([ids]), max_new_tokens=7, do_sample=False)[0, len(ids) :]
    (text,) = module.sample_prompts(["Anna reads"], PromptOptions(max_new_tokens=7, temperature=0))
    assert text == tokenizer.decode(greedy, skip_special_tokens=True)
    assert module.sample_prompts(["Anna reads"], PromptOptions(temperature=0))[0] == tokenizer.decode(greedy[:3])
    assert module.sample_prompts(["Anna"], PromptOptions(temperature=50.0)) != module.sample_prompts(["Anna"])


def test_the_end_of_text_token_ends_a_text_and_is_not_shown(tiny_llama):
    module = lm(tiny_llama, temperature=0, max_new_tokens=20)
    module.model.lm_head.weight.data.zero_()
    assert module.sample_prompts(["Anna"])[0] == ""  # the first of equal logits is <unk>
    hidden = module.model.model(input_ids=torch.tensor([module.tokenizer("Anna").input_ids]))[0][0, -1]
    module.model.lm_head.weight.data[2] = hidden.detach()
    assert module.sample_prompts(["Anna"]) == [""]


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        (["Anna " * 130], {}, r"at most 128 tokens, got a prompt of \d+ tokens with max_new_tokens=64, a length of"),
        (["Anna"], {"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        (["Anna"], {"temperature": -1.0}, "temperature must not be negative, got -1.0"),
    ],
)
def test_prompts_and_options_out_of_range_are_refused(tiny_llama, prompts, options, message):
    with pytest.raises(ValueError, match=f"CausalLM: .*{message}"):
        lm(tiny_llama).sample_prompts(prompts, PromptOptions(**options))


def test_the_number_of_generators_must_be_that_of_the_prompts(tiny_llama):
    with pytest.raises(ValueError, match="generator: need one for each of 2 prompts, got 3"):
        lm(tiny_llama).sample_prompts(["a", "b"], generator=sample_generators(0, 3))


def test_an_empty_prompt_needs_a_beginning_of_text_token(tiny_llama):
    module = lm(tiny_llama, max_new_tokens=2)
    assert len(module.sample_prompts([""])) == 1
    module.tokenizer.add_bos_token = False
    module.tokenizer.update_post_processor()
    with pytest.raises(ValueError, match="a prompt must have at least one token, got an empty one"):
        module.sample_prompts([""])


# export


@pytest.mark.parametrize(
    "adapter",
    [
        LORA,
        LoraConfig(r=2, target_modules="all-linear", use_dora=True),
        LoraConfig(r=2, target_modules=["v_proj"], modules_to_save=["lm_head"]),
        LoraConfig(r=2, target_modules=["v_proj"], trainable_token_indices=[300, 311]),
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ],
    ids=["lora", "dora", "whole head", "tokens", "ia3"],
)
def test_an_adapter_in_the_layers_is_exported_alone_or_merged(tiny_llama, tmp_path, adapter):
    module = moved(lm(tiny_llama, adapter=adapter))
    expected = logits_of(module.model)
    assert module.export_formats == ("peft", "merged")
    told = module.export("peft", tmp_path / "peft")
    assert told == f"PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({tiny_llama!r}), '{tmp_path}/peft')"
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), tmp_path / "peft").eval()
    torch.testing.assert_close(logits_of(loaded), expected, rtol=0, atol=1e-5)
    assert (logits_of(AutoModelForCausalLM.from_pretrained(tiny_llama)) - expected).abs().max() > 0.01
    told = module.export("merged", tmp_path / "merged")
    assert told == f"AutoModelForCausalLM.from_pretrained('{tmp_path}/merged')"
    whole, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(logits_of(whole), expected, rtol=0, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("Anna").input_ids == module.tokenizer("Anna").input_ids
    tiny.assert_same(logits_of(module.model), expected)  # the live one still has its adapter


def test_a_model_trained_whole_is_exported_whole(tiny_llama, tmp_path):
    module = moved(lm(tiny_llama))
    assert module.export_formats == ("transformers",)
    module.export("transformers", tmp_path)
    tiny.assert_same(logits_of(LlamaForCausalLM.from_pretrained(tmp_path)), logits_of(module.model))
    with pytest.raises(ValueError, match=r"format must be one of \['transformers'\] for this model, got 'peft'"):
        module.export("peft", tmp_path)


def test_learned_words_cannot_be_merged(tiny_llama, tmp_path):
    module = lm(tiny_llama, adapter=PROMPT)
    assert module.export_formats == ("peft",)
    with pytest.raises(ValueError, match=r"one of \['peft'\] .*got 'merged'. Learned words cannot be merged"):
        module.export("merged", tmp_path)


# refusals


def test_blocks_longer_than_the_model_reads_are_refused(tiny_llama, tmp_path):
    with pytest.raises(
        ValueError, match=r"built for texts of at most 128 tokens, got ToyTexts's block_size of 129. Lower"
    ):
        tiny.train(tmp_path, lm(tiny_llama), toy(tiny_llama, block_size=129))
    with pytest.raises(ValueError, match="block_size of 124 and 5 learned words"):
        tiny.train(tmp_path, lm(tiny_llama, adapter=PROMPT), toy(tiny_llama, block_size=124))
    tiny.train(tmp_path, lm(tiny_llama, adapter=PROMPT), toy(tiny_llama, block_size=123), max_steps=1)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tiny_llama, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.add_tokens(["<one>"])
    tokenizer.save_pretrained(tmp_path / "more")
    with pytest.raises(ValueError, match=r"tokenizer must have at most the model's 512 tokens, got 513. Give the data"):
        tiny.train(tmp_path, lm(tiny_llama), toy(str(tmp_path / "more")))


@pytest.mark.parametrize("options", [{"frozen_dtype": "bfloat16"}, {"quantization": "4bit"}])
def test_a_base_that_is_trained_stays_exact(tiny_llama, options):
    with pytest.raises(
        ValueError, match=r"CausalLM: frozen_dtype=.* are for a base that is not trained. Give an adapter"
    ):
        lm(tiny_llama, **options)


def test_defaults_out_of_range_are_refused_before_anything_is_loaded():
    with pytest.raises(ValueError, match="CausalLM: max_new_tokens must be at least 1, got 0"):
        lm("/no/such", max_new_tokens=0)
    with pytest.raises(ValueError, match="CausalLM: there is no folder '/no/such'"):
        lm("/no/such")


def test_text_files_train_a_model_that_answers_in_their_words(tiny_llama, tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(prompt.replace("\n", " ") for prompt, _ in questions()))
    data = TextData(pretrained=tiny_llama, train=str(tmp_path), one_per_line=True, block_size=30, batch_size=2)
    data.val_fraction = 0.2
    module = lm(tiny_llama, temperature=0, max_new_tokens=6)
    tiny.train(tmp_path, module, data, max_steps=60)
    assert module.sample_prompts(["Question: What"])[0].startswith("is the capital of")
