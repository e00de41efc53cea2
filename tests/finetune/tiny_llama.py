"""Write a tiny LLaMA with its tokenizer, offline, to try fine-tuning on.

It is built as the large ones are (RMSNorm, rotary positions, SwiGLU, two heads of keys for four of queries; BPE with
spaces as letters and bytes for what is unknown), but has 200,000 weights. ``--pretrain`` teaches it the everyday
sentences of ``lit_generative.data.toy_texts`` and every word of the others, in half a minute.

    python tests/finetune/tiny_llama.py FOLDER [--pretrain]
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

import torch

from lit_generative.data.batches import BatchKey
from lit_generative.data.token_rows import pack
from lit_generative.data.tokenizers import encode_documents
from lit_generative.data.toy_texts import everyday, medical, questions, word_soup

POSITIONS = 128
SPECIAL = ["<unk>", "<s>", "</s>"]


def build_tokenizer(vocabulary: int = 512) -> Any:
    """LLaMA's kind, trained on the toy texts; it pads with ``<unk>``, and adds ``<s>`` but no ``</s>``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaTokenizer

    texts = [*everyday(500), *medical(500), *(prompt + completion for prompt, completion in questions() * 5)]
    known = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    trained = Tokenizer(models.BPE(unk_token=SPECIAL[0], fuse_unk=True, byte_fallback=True))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=True)
    trained.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=known, show_progress=False)
    trained.train_from_iterator(texts, trainer)
    state = json.loads(trained.to_str())["model"]
    tokenizer = LlamaTokenizer(
        vocab=state["vocab"],
        merges=[tuple(merge) for merge in state["merges"]],
        model_max_length=POSITIONS,
        add_bos_token=True,
        add_eos_token=False,
    )
    tokenizer.pad_token = tokenizer.unk_token
    return tokenizer


def build_model(tokenizer: Any, seed: int = 0) -> Any:
    """Random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=172,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=POSITIONS,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def pretrain(model: Any, tokenizer: Any, steps: int = 600, seed: int = 0) -> float:
    """Teach it the everyday world; gives the last loss, nats per token."""
    texts = everyday(2000) + word_soup(1000)
    rng = random.Random(seed)
    rng.shuffle(texts)
    rows = pack(encode_documents(tokenizer, texts), block_size=64, pad=tokenizer.pad_token_id)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    loss = torch.tensor(float("nan"))
    model.train()
    for _ in range(steps):
        indices = torch.tensor(rng.sample(range(len(rows)), 8))
        loss = model(**rows[BatchKey(0, 0, 0, indices)]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    return loss.item()


def write(folder: str | Path, steps: int = 0, seed: int = 0) -> float | None:
    """Write model and tokenizer as ``from_pretrained`` reads them; gives the loss if it was trained."""
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed)
    loss = pretrain(model, tokenizer, steps, seed) if steps else None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return loss


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="where to write")
    parser.add_argument("--pretrain", action="store_true", help="teach it the toy texts, in half a minute")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    loss = write(options.folder, 600 if options.pretrain else 0, options.seed)
    print(f"wrote {options.folder}" + ("" if loss is None else f", loss {loss:.3f} nats per token"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
