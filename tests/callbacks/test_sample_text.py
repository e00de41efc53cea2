import functools
import json
import os

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from peft import LoraConfig
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_generative.callbacks.checkpoint import Checkpoint
from lit_generative.callbacks.ema import EMA
from lit_generative.callbacks.sample_text import SampleText
from lit_generative.data.toy_texts import ToyTexts
from lit_generative.finetune.causal_lm import CausalLM
from lit_generative.tensor_ops import sample_generators
from lit_generative.types import PromptOptions
from tests import tiny
from tests.finetune import tiny_llama

PROMPTS = ["Anna reads", "Question: a\nb"]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    tiny_llama.write(folder)
    return str(folder)


def lm(pretrained, rate=1e-2) -> CausalLM:
    torch.manual_seed(0)
    optimizer = functools.partial(torch.optim.SGD, lr=rate)
    adapter = LoraConfig(r=2, target_modules=["v_proj"], lora_dropout=0.5)
    return CausalLM(pretrained, optimizer, adapter=adapter, max_new_tokens=4)


def train(folder, module, callbacks, **kwargs) -> L.Trainer:
    data = ToyTexts(pretrained=module.pretrained, num_sentences=60, block_size=16, batch_size=4, general=None)
    return tiny.train(folder, module, data, callbacks=callbacks, **kwargs)


def told(folder, step) -> str:
    return (folder / "samples" / f"step_{step:07d}.txt").read_text(encoding="utf-8")


def test_texts_are_drawn_before_the_first_update_every_n_updates_and_at_the_end(pretrained, tmp_path):
    train(tmp_path, lm(pretrained), [SampleText(PROMPTS, every_n_steps=3)], max_steps=7)
    assert sorted(os.listdir(tmp_path / "samples")) == [f"step_{step:07d}.txt" for step in (0, 3, 6, 7)]


def test_a_file_shows_each_prompt_and_how_the_model_of_now_goes_on(pretrained, tmp_path):
    module = lm(pretrained)
    train(tmp_path, module, [SampleText(PROMPTS, seed=3)])
    texts = module.sample_prompts(PROMPTS, generator=sample_generators(3, 2))
    assert told(tmp_path, 3) == f">>> Anna reads\n{texts[0]}\n\n>>> Question: a\nb\n{texts[1]}\n"


def test_length_and_temperature_replace_the_models(pretrained, tmp_path):
    module = lm(pretrained)
    train(tmp_path, module, [SampleText(PROMPTS[:1], max_new_tokens=9, temperature=0)])
    (text,) = module.sample_prompts(PROMPTS[:1], PromptOptions(max_new_tokens=9, temperature=0))
    assert told(tmp_path, 3) == f">>> Anna reads\n{text}\n"


def test_draws_are_the_same_each_time_and_others_with_another_seed(pretrained, tmp_path):
    texts = []
    for seed in (0, 1):
        train(tmp_path / str(seed), lm(pretrained, rate=0.0), [SampleText(PROMPTS, every_n_steps=1, seed=seed)])
        texts.append({told(tmp_path / str(seed), step) for step in range(4)})
    assert [len(t) for t in texts] == [1, 1]
    assert texts[0] != texts[1]


def test_drawing_does_not_change_training_by_one_bit(pretrained, tmp_path):
    trained = []
    for callbacks in ([], [SampleText(PROMPTS, every_n_steps=1)]):
        module = lm(pretrained)
        train(tmp_path, module, callbacks, max_steps=4)
        assert module.training
        trained.append((tiny.weights(module), torch.get_rng_state()))
    tiny.assert_same(trained[1], trained[0])


def test_texts_come_from_the_averaged_weights(pretrained, tmp_path):
    ema, module = EMA(half_life=1e6, ramp_up=1e9), lm(pretrained, rate=300.0)
    train(tmp_path, module, [ema, SampleText(PROMPTS, max_new_tokens=20)])
    options, generators = PromptOptions(max_new_tokens=20), functools.partial(sample_generators, 0, 2)
    live = module.sample_prompts(PROMPTS, options, generators())
    with ema.averaged():
        averaged = module.sample_prompts(PROMPTS, options, generators())
    assert live != averaged
    assert told(tmp_path, 3) == f">>> {PROMPTS[0]}\n{averaged[0]}\n\n>>> {PROMPTS[1]}\n{averaged[1]}\n"


def test_with_accumulated_gradients_texts_are_drawn_once_an_update(pretrained, tmp_path):
    drawn = []

    class Counts(SampleText):
        def _show(self, trainer, texts) -> None:
            drawn.append(trainer.global_step)

    train(tmp_path, lm(pretrained), [Counts(PROMPTS, every_n_steps=1)], accumulate_grad_batches=2)
    assert drawn == [0, 1, 2, 3]


def test_a_resumed_run_does_not_draw_the_texts_of_its_checkpoint_again(pretrained, tmp_path):
    train(tmp_path, lm(pretrained), [SampleText(PROMPTS, 1), Checkpoint(dirpath=str(tmp_path))])
    resumed = {"ckpt_path": tmp_path / "last.ckpt", "max_steps": 5, "accumulate_grad_batches": 2}
    train(tmp_path / "b", lm(pretrained), [SampleText(PROMPTS, 1)], **resumed)
    assert sorted(os.listdir(tmp_path / "b" / "samples")) == ["step_0000004.txt", "step_0000005.txt"]


def test_a_fast_dev_run_writes_no_file(pretrained, tmp_path):
    train(tmp_path, lm(pretrained), [SampleText(PROMPTS, 1)], fast_dev_run=2)
    assert not list(tmp_path.rglob("step_*.txt"))


# loggers


def test_a_csv_logger_gets_no_text_but_its_folder_does(pretrained, tmp_path):
    logger = CSVLogger(tmp_path, name="runs", version="one")
    train(tmp_path, lm(pretrained), [SampleText(PROMPTS)], logger=logger)
    assert sorted(os.listdir(tmp_path / "runs" / "one" / "samples")) == ["step_0000000.txt", "step_0000003.txt"]


def test_tensorboard_shows_prompts_and_texts_beside_the_losses_of_their_update(pretrained, tmp_path):
    logger, module = TensorBoardLogger(tmp_path, name="runs", version="one"), lm(pretrained)
    train(tmp_path, module, [SampleText(PROMPTS, 2)], logger=logger)
    events = EventAccumulator(str(tmp_path / "runs" / "one"))
    events.Reload()
    tensors = events.Tensors("samples/text_summary")
    assert [tensor.step for tensor in tensors] == [0, 1, 2]
    texts = module.sample_prompts(PROMPTS, generator=sample_generators(0, 2))
    shown = tensors[-1].tensor_proto.string_val[0].decode()
    assert shown == f"    >>> Anna reads\n    {texts[0]}\n\n    >>> Question: a\n    b\n    {texts[1]}"


@pytest.mark.slow  # starts wandb's own process
def test_an_offline_wandb_run_holds_a_table_of_the_texts(pretrained, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, project="tests", offline=True)
    train(tmp_path, lm(pretrained), [SampleText(PROMPTS)], logger=logger)
    logger.experiment.finish()
    tables = [json.loads(p.read_text()) for p in tmp_path.glob("wandb/offline-run-*/files/media/table/*.json")]
    assert [table["columns"] for table in tables] == [["prompt", "text"]] * 2
    assert [row[0] for row in tables[0]["data"]] == PROMPTS


# refusals


def test_no_prompt_and_less_than_one_step_are_refused():
    with pytest.raises(ValueError, match="SampleText: needs at least one prompt, got none"):
        SampleText([])
    with pytest.raises(ValueError, match="SampleText: every_n_steps must be at least 1, got 0"):
        SampleText(PROMPTS, every_n_steps=0)


class Painter(L.LightningModule):
    prompt_options = ("num_steps",)

    def sample_prompts(self, prompts, options=None, generator=None):
        return torch.zeros(len(prompts), 3, 4, 4)


def test_a_module_that_draws_no_texts_is_refused(tmp_path):
    for module in (tiny.vae(), Painter()):
        with pytest.raises(
            TypeError, match=f"SampleText: {type(module).__name__} does not go on with texts. Use it wi"
        ):
            SampleText(PROMPTS).setup(tiny.trainer(tmp_path), module, "fit")
