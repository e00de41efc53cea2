"""A process of ``test_causal_lm_two_processes.py``: ``python causal_lm_process.py WORLD BASE FOLDER`` validates."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import lightning as L
import torch

from lit_generative.data.toy_texts import ToyQuestions
from lit_generative.finetune.causal_lm import CausalLM


def validated(world: int, base: str, folder: Path) -> dict[str, torch.Tensor]:
    """What is logged."""
    torch.manual_seed(0)
    module = CausalLM(base, functools.partial(torch.optim.SGD, lr=0.0))
    trainer = L.Trainer(
        accelerator="cpu",
        devices=world,
        strategy="ddp" if world > 1 else "auto",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.validate(module, ToyQuestions(pretrained=base, batch_size=3, eval_batch_size=4 // world), verbose=False)
    return dict(trainer.callback_metrics)


if __name__ == "__main__":
    torch.set_num_threads(1)
    logged = validated(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
    torch.save(logged, Path(sys.argv[3]) / f"logged_{torch.distributed.get_rank()}.pt")
    torch.distributed.barrier()  # who leaves first would cut the other one off
    torch.distributed.destroy_process_group()
