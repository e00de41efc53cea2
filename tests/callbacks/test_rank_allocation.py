"""AdaLoRA's ranks are those of PEFT's own loop, survive a stop, and are not forgotten."""

from __future__ import annotations

import functools
import math

import lightning as L
import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from lit_generative.callbacks.checkpoint import Checkpoint
from lit_generative.callbacks.rank_allocation import RankAllocation
from lit_generative.data.toy_texts import ToyTexts
from lit_generative.finetune.adapters import Adapted, merged
from lit_generative.finetune.causal_lm import CausalLM
from tests import tiny
from tests.finetune import tiny_llama

SCHEDULE = {"init_r": 6, "target_r": 2, "tinit": 3, "tfinal": 6, "deltaT": 3, "total_step": 20, "beta1": 0.95}
TARGETS = ["q_proj", "v_proj"]
STEPS = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A LLaMA with random weights."""
    where = tmp_path_factory.mktemp("llama")
    tiny_llama.write(where)
    return str(where)


def lm(folder: str, adapter) -> CausalLM:
    torch.manual_seed(0)
    return CausalLM(folder, functools.partial(torch.optim.AdamW, lr=5e-3), adapter=adapter)


def adalora(**changes) -> AdaLoraConfig:
    return AdaLoraConfig(target_modules=TARGETS, **(SCHEDULE | changes))


def toy(folder: str) -> ToyTexts:
    return ToyTexts(pretrained=folder, num_sentences=120, block_size=24, batch_size=4, general=None)


class Ranks(L.Callback):
    """The mean rank after each update."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.values.append(float(trainer.callback_metrics.get("train/mean_rank", math.nan)))


def train(folder, tmp_path, *callbacks, config: AdaLoraConfig, **options) -> CausalLM:
    module = lm(folder, adapter=config)
    options = {"max_steps": STEPS} | options
    tiny.train(tmp_path, module, toy(folder), callbacks=[RankAllocation(), *callbacks], **options)
    return module


@pytest.mark.parametrize("weight", [0.5, 0.0])
def test_the_adapter_is_that_of_pefts_own_loop(folder, tmp_path, weight):
    config, ranks = adalora(orth_reg_weight=weight), Ranks()
    module = train(folder, tmp_path, ranks, config=config)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder).train()
    model = get_peft_model(model, AdaLoraConfig(**config.to_dict() | {"peft_type": None, "task_type": "CAUSAL_LM"}))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    data = toy(folder)
    data.setup("fit")
    loader, step = data.train_dataloader(), 0
    for epoch in range(STEPS):
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            if step == STEPS:
                break
            model(**batch).loss.backward()
            optimizer.step()
            model.base_model.update_and_allocate(step)
            optimizer.zero_grad()
            step += 1
    found = {n: p for n, p in module.model.named_parameters() if "lora_" in n}
    expected = {n.removeprefix("base_model.model."): p for n, p in model.named_parameters() if "lora_" in n}
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-5)
    assert ranks.values[3] == 6
    assert 2 < ranks.values[6] < 6
    assert ranks.values[-1] == 2
    per_weight = {int(torch.count_nonzero(p)) for n, p in found.items() if "lora_E" in n}
    assert len(per_weight) > 1, "every weight kept as many: nothing was allocated"


def test_a_resumed_run_takes_the_ranks_of_one_that_never_stopped(folder, tmp_path):
    whole = train(folder, tmp_path / "whole", config=adalora())
    for stop in (9, 17, STEPS):  # while ranks are taken, after the last, and the end
        last = tmp_path / "stopped/last.ckpt"
        checkpoint = Checkpoint(10**6, dirpath=str(last.parent))
        options = {"max_steps": stop, "ckpt_path": last if last.exists() else None}
        stopped = train(folder, tmp_path / "stopped", checkpoint, config=adalora(), **options)
    tiny.assert_same(dict(stopped.state_dict()), dict(whole.state_dict()))


def test_gathered_gradients_count_as_one_update(folder, tmp_path):
    ranks = Ranks()
    train(folder, tmp_path, ranks, config=adalora(), accumulate_grad_batches=3)
    assert len(ranks.values) > 2 * STEPS
    assert math.isnan(ranks.values[1])
    assert ranks.values[3 * 4 - 1] == 6  # the fourth update, still of tinit
    assert ranks.values[-1] == 2


def test_our_own_networks_have_it_too_and_a_merged_copy_draws_the_same(tmp_path):
    torch.manual_seed(0)
    module = tiny.vae()
    config = AdaLoraConfig(target_modules="all-linear", **SCHEDULE)
    module = tiny.vae(decoder=Adapted(module.decoder, config))
    tiny.train(tmp_path, module, tiny.digits(), callbacks=[RankAllocation()], max_steps=STEPS)
    z = torch.randn(3, module.latent_dim)
    ranks = [int(torch.count_nonzero(p)) for n, p in module.named_parameters() if "lora_E" in n]
    assert sum(ranks) == 2 * len(ranks)
    torch.testing.assert_close(merged(module.decoder.network)(z), module.decoder(z), rtol=1e-4, atol=1e-5)


def test_training_without_it_is_refused(folder, tmp_path):
    message = r"CausalLM: .* without lit_generative\.callbacks\..*\.RankAllocation\. Add it to trainer\.callbacks"
    with pytest.raises(ValueError, match=message):
        tiny.train(tmp_path, lm(folder, adapter=adalora()), toy(folder))


def test_what_it_cannot_do_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"no network of CausalLM has an adapter of peft.AdaLoraConfig. Leave it out"):
        train(folder, tmp_path, config=LoraConfig(target_modules=TARGETS))
    generator = tiny.gan().generator
    module = tiny.gan(generator=Adapted(generator, AdaLoraConfig(target_modules="all-linear", **SCHEDULE)))
    with pytest.raises(TypeError, match=r"RankAllocation: GAN's optimizers take turns.*Use peft.LoraConfig"):
        tiny.train(tmp_path, module, tiny.ring(), callbacks=[RankAllocation()])


def test_training_that_ends_before_the_last_rank_is_taken_is_warned_of(folder, tmp_path):
    with pytest.warns(UserWarning, match="reaches target_r in update 15, .* but training ends after 14: more are left"):
        train(folder, tmp_path, config=adalora(), max_steps=14)


def test_ranks_of_other_weights_are_refused(folder, tmp_path):
    callback = RankAllocation()
    module = lm(folder, adapter=adalora())
    trainer = L.Trainer(accelerator="cpu", max_steps=STEPS, logger=False)
    callback.setup(trainer, module, "fit")
    callback.load_state_dict({"allocators": []})
    with pytest.raises(ValueError, match="holds the ranks of 0 networks, the module has 1 with AdaLoRA"):
        callback.on_train_start(trainer, module)
    other = {"pattern": None, "exp_avg_ipt": {"other.lora_A.default": torch.zeros(1)}, "exp_avg_unc": {}}
    callback.load_state_dict({"allocators": [other]})
    with pytest.raises(ValueError, match=r"of other weights than the adapter has, as .*target_modules of the run"):
        callback.on_train_start(trainer, module)
