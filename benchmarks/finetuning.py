"""Tabulates what each way to fine-tune costs: weights trained, size of a checkpoint, time of a step.

Run: ``python benchmarks/finetuning.py --out benchmarks/results/finetuning.md``, two minutes of one core. Bases are tiny
ones, made on the spot; the same adapters are counted in Stable Diffusion 1.5 and in LLaMA-2 7B too, whose weights are
not needed for that.
"""

from __future__ import annotations

import argparse
import copy
import runpy
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from diffusers import UNet2DConditionModel
from peft import (
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.runs import ROOT
from lit_generative.data.toy_shapes import ToySubject
from lit_generative.data.toy_texts import ToyTexts
from lit_generative.finetune.causal_lm import CausalLM
from lit_generative.finetune.text_to_image import TextToImage
from lit_generative.finetune.textual_inversion import TextualInversion
from lit_generative.training.module import GenerativeModule

ADAM = partial(torch.optim.AdamW, lr=1e-4)
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
TASK = {"task_type": "CAUSAL_LM"}
IMAGE: dict[str, PeftConfig | None] = {
    "full U-Net": None,
    "LoRA, rank 4": LoraConfig(r=4, target_modules=ATTENTION),
    "LoRA, rank 16": LoraConfig(r=16, target_modules=ATTENTION),
    "DoRA, rank 4": LoraConfig(r=4, use_dora=True, target_modules=ATTENTION),
    "LoHa, rank 4": LoHaConfig(r=4, target_modules=ATTENTION),
    "LoKr, rank 4": LoKrConfig(r=4, target_modules=ATTENTION),
}
TEXT: dict[str, PeftConfig | None] = {
    "full": None,
    "LoRA, rank 8": LoraConfig(r=8, target_modules="all-linear", **TASK),
    "DoRA, rank 8": LoraConfig(r=8, use_dora=True, target_modules="all-linear", **TASK),
    "IA3": IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], **TASK),
    "prompt tuning, 20": PromptTuningConfig(num_virtual_tokens=20, **TASK),
    "prefix tuning, 20": PrefixTuningConfig(num_virtual_tokens=20, **TASK),
    "p-tuning, 20": PromptEncoderConfig(num_virtual_tokens=20, encoder_hidden_size=128, **TASK),
}


class Cost(NamedTuple):
    """What one method costs on the tiny base."""

    trained: int
    bytes: float
    milliseconds: float


class Clock(L.Callback):
    """Notes how long each update takes."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        """Start."""
        self._start = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        """Stop."""
        self.times.append(time.perf_counter() - self._start)


def measure(build: Callable[[], GenerativeModule], data: Callable[[], Any], steps: int, rounds: int) -> Cost:
    """Train for some updates, several times; the time is the median over the rounds of each round's median."""
    medians = []
    for _ in range(rounds):
        L.seed_everything(0, verbose=False)
        module, clock = build(), Clock()
        options: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=steps,
            limit_val_batches=0,
            callbacks=[clock],
            enable_checkpointing=False,
            **options,
        )
        trainer.fit(module, data())
        medians.append(statistics.median(clock.times[2:]))
    with tempfile.TemporaryDirectory() as folder:
        trainer.save_checkpoint(Path(folder) / "last.ckpt")
        size = (Path(folder) / "last.ckpt").stat().st_size
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return Cost(trained, size, 1e3 * statistics.median(medians))


def count(base: nn.Module, config: PeftConfig | None) -> int:
    """Weights that a method trains in a base without storage."""
    if config is None:
        return sum(p.numel() for p in base.parameters())
    model, config = copy.deepcopy(base), copy.deepcopy(config)
    if config.task_type is None:
        model = inject_adapter_in_model(config, model, low_cpu_mem_usage=True)
    else:
        model = get_peft_model(model, config, low_cpu_mem_usage=True)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def published() -> tuple[nn.Module, nn.Module]:
    """The U-Net of Stable Diffusion 1.5 and LLaMA-2 7B, without storage."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        llama = AutoModelForCausalLM.from_config(LlamaConfig())
    return unet, llama


def size_of(num_bytes: float) -> str:
    """Bytes for people, to three digits."""
    for unit, power in (("GB", 9), ("MB", 6)):
        if num_bytes >= 10**power:
            return f"{num_bytes / 10**power:.3g} {unit}"
    return f"{num_bytes / 1e3:.3g} kB"


def rows(costs: dict[str, Cost], whole: str, papers: dict[str, int]) -> list[str]:
    """One line a method."""
    lines = []
    for name, cost in costs.items():
        paper = papers.get(name)
        told = ["", ""] if paper is None else [f"{paper:,}", size_of(12 * paper)]
        ratio = cost.milliseconds / costs[whole].milliseconds
        cells = [name, f"{cost.trained:,}", size_of(cost.bytes), f"{cost.milliseconds:.1f} ({ratio:.2f})", *told]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def table(title: str, base: str, lines: list[str]) -> str:
    """A section of the page."""
    heads = ["method", "trained, tiny", "checkpoint", "ms a step (of full)", f"trained, {base}", "checkpoint"]
    return "\n".join([f"## {title}", "", "| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|", *lines])


def main(argv: list[str] | None = None) -> None:
    """Measure, count, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--methods", nargs="+", choices=[*IMAGE, *TEXT, "textual inversion"])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)

    def chosen(methods: dict[str, Any], whole: str) -> dict[str, Any]:
        wanted = options.methods
        return {name: value for name, value in methods.items() if wanted is None or name in (*wanted, whole)}

    unet, llama = published()
    with tempfile.TemporaryDirectory() as folder:
        runpy.run_path(str(ROOT / "tests/finetune/tiny_stable_diffusion.py"))["make"](f"{folder}/sd", "sd")
        runpy.run_path(str(ROOT / "tests/finetune/tiny_llama.py"))["write"](f"{folder}/llama")

        def text_data() -> Any:
            return ToyTexts(pretrained=f"{folder}/llama", batch_size=12)

        def image_data(prompt: str = "a photo of a sks circle") -> Any:
            return ToySubject(num_images=4, batch_size=4, repeats=50, prompt=prompt)

        images, texts = chosen(IMAGE, "full U-Net"), chosen(TEXT, "full")
        pictures = {
            name: measure(
                partial(TextToImage, f"{folder}/sd", ADAM, adapter=config), image_data, options.steps, options.rounds
            )
            for name, config in images.items()
        }
        if options.methods is None or "textual inversion" in options.methods:
            word = partial(TextualInversion, f"{folder}/sd", ADAM, "<mine>", "toy")
            named = partial(image_data, "a photo of {token}")
            pictures["textual inversion"] = measure(word, named, options.steps, options.rounds)
        sentences = {
            name: measure(
                partial(CausalLM, f"{folder}/llama", ADAM, adapter=config), text_data, options.steps, options.rounds
            )
            for name, config in texts.items()
        }
    unet_counts = {name: count(unet, config) for name, config in images.items()} | {"textual inversion": 768}
    text_counts = {name: count(llama, config) for name, config in texts.items()}
    head = (
        "# What fine-tuning costs\n\n"
        f"`python benchmarks/finetuning.py`, one thread, torch {torch.__version__.partition('+')[0]}. Tiny bases: a "
        "Stable Diffusion with a U-Net of 0.8 million weights, batches of 4; a LLaMA of 0.2 million, batches of 12 "
        f"blocks of 64 tokens. Times are medians of {options.rounds} rounds of {options.steps} updates. Checkpoints "
        "are Lightning's: weights and AdamW's two moments. The last two columns are counted, not measured: the same "
        "methods in the U-Net of Stable Diffusion 1.5 and in LLaMA-2 7B, and 12 bytes for each weight that is trained."
    )
    parts = [
        head,
        table("Stable Diffusion", "SD 1.5", rows(pictures, "full U-Net", unet_counts)),
        table("Language model", "7B", rows(sentences, "full", text_counts)),
    ]
    text = "\n\n".join(parts) + "\n"
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
