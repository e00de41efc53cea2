"""New words of a frozen text encoder, and the few vectors that stand for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lit_generative.finetune.prompts import Prompts


class LearnedTokens(nn.Module):
    """An embedding table, not trained, and rows of its own for ids that stand beside it: these are its parameters.

    So neither weight decay nor an optimizer's momenta can touch another word, and a checkpoint holds the rows alone.

    Args:
        table: The embedding table, ``(V, D)``.
        ids: Ids of the new rows; consecutive, no words of the table.
        row: What each new row starts from, ``(D,)``.

    Attributes:
        learned: The new rows, ``(len(ids), D)`` float32.
    """

    first: Tensor

    def __init__(self, table: nn.Embedding, ids: list[int], row: Tensor) -> None:
        super().__init__()
        self.table = table
        self.learned = nn.Parameter(row.detach().float().repeat(len(ids), 1))
        self.register_buffer("first", torch.tensor(ids[0]), persistent=False)

    @property
    def weight(self) -> Tensor:
        """The table, for those who ask for its type or device."""
        return self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Vectors ``(..., D)``, of the table's type, of ids ``(...)``."""
        new = (ids >= self.first) & (ids < self.first + len(self.learned))
        known = self.table(torch.where(new, 0, ids))
        learned = self.learned[torch.where(new, ids - self.first, 0)].to(known.dtype)
        return torch.where(new[..., None], learned, known)


def add_tokens(who: str, prompts: Prompts, token: str, initializer: str, num_vectors: int) -> dict[str, LearnedTokens]:
    """Give every tokenizer new words, and every text encoder rows for them, in place.

    Args:
        who: Named in messages.
        prompts: Tokenizers and text encoders.
        token: The first new word; the others are ``<token>_1`` and so on, as diffusers names them.
        initializer: A word, whose row each new one starts from.
        num_vectors: How many new words.

    Returns:
        The new embeddings by the encoder's name.

    Raises:
        ValueError: If the word exists, or what it starts from is not one token.
    """
    names = token_names(token, num_vectors)
    result = {}
    for (name, encoder), tokenizer in zip(prompts.encoders.items(), prompts.tokenizers.values(), strict=True):
        start = tokenizer.encode(initializer, add_special_tokens=False)
        if len(start) != 1:
            raise ValueError(
                f"{who}: initializer must be one token of the text encoder, and {initializer!r} is {len(start)}. "
                "Take a shorter, common word."
            )
        if known := [n for n in names if n in tokenizer.get_vocab()]:
            raise ValueError(f"{who}: token must be new, and {known[0]!r} is in the vocabulary. Choose another.")
        tokenizer.add_tokens(names)
        table = encoder.get_input_embeddings()
        learned = LearnedTokens(table, tokenizer.convert_tokens_to_ids(names), table.weight[start[0]])
        encoder.set_input_embeddings(learned)
        _pool_at_the_end(encoder, tokenizer)
        result[name] = learned
    return result


def token_names(token: str, num_vectors: int) -> list[str]:
    """The words that stand for one of several vectors, as diffusers names them."""
    return [token, *(f"{token}_{i}" for i in range(1, num_vectors))]


def _pool_at_the_end(encoder: Any, tokenizer: Any) -> None:
    """Configs of old say 2, and then the pooled vector is taken at the largest id: that would be a new word's."""
    network = getattr(encoder, "text_model", encoder)
    network.eos_token_id = tokenizer.eos_token_id
