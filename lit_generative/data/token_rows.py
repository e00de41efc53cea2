"""Rows of tokens in memory, and two corpora mixed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypedDict

import torch
from torch import Tensor
from typing_extensions import override

from lit_generative.data.batches import BatchDataset, BatchKey

IGNORED = -100
"""Label of a token that is not to be predicted, as in ``torch.nn.functional.cross_entropy``."""


class TokenBatch(TypedDict):
    """What text data modules yield."""

    input_ids: Tensor
    """Tokens, ``(N, T)`` int64."""
    attention_mask: Tensor
    """1, and 0 behind the end of a row, ``(N, T)`` int64."""
    labels: Tensor
    """``input_ids``, and -100 where nothing is to be predicted; the model shifts them itself. ``(N, T)`` int64."""


class TokenRows(BatchDataset):
    """Rows of unequal length; a batch is as long as its longest row.

    Args:
        rows: Tokens of each row.
        starts: The first token of each row that is to be predicted; at least 1, as nothing stands before the first.
        pad: Token that fills a batch up; attention and labels leave it out.
    """

    def __init__(self, rows: Sequence[Sequence[int]], starts: Sequence[int], pad: int) -> None:
        self.length = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        self.start = torch.tensor(list(starts), dtype=torch.int64)
        self.tokens = torch.full((len(rows), max(map(len, rows), default=0)), pad, dtype=torch.int32)
        for i, row in enumerate(rows):
            self.tokens[i, : len(row)] = torch.as_tensor(row, dtype=torch.int32)

    @override
    def __len__(self) -> int:
        return len(self.tokens)

    @override
    def __getitem__(self, key: BatchKey) -> TokenBatch:  # type: ignore[override]
        length = self.length[key.indices]
        tokens = self.tokens[key.indices, : int(length.max())].long()
        position = torch.arange(tokens.shape[1])
        real = position < length[:, None]
        labels = torch.where(real & (position >= self.start[key.indices, None]), tokens, IGNORED)
        return {"input_ids": tokens, "attention_mask": real.long(), "labels": labels}


def pack(documents: Iterable[Sequence[int]], block_size: int, pad: int) -> TokenRows:
    """Write documents one after another and cut the whole into blocks; what is left at the end is a shorter one.

    Args:
        documents: Tokens of each, with its end-of-text token.
        block_size: Tokens of a block.
        pad: As in :class:`TokenRows`.
    """
    parts = [torch.tensor(ids, dtype=torch.int32) for ids in documents]
    blocks = torch.cat(parts).split(block_size) if parts else ()
    rows = [block for block in blocks if len(block) > 1]  # of one token nothing can be predicted
    return TokenRows(rows, [1] * len(rows), pad)  # type: ignore[arg-type]


class Replay(BatchDataset):
    """Examples with others mixed in, against forgetting: each epoch takes further ones of these, in their order.

    Args:
        dataset: All of it is an epoch's.
        other: What is mixed in; it begins anew after its end.
        share: Part of an epoch that it makes up, in ``(0, 1)``.
    """

    def __init__(self, dataset: TokenRows, other: TokenRows, share: float) -> None:
        self.dataset, self.other = dataset, other
        self.num_others = max(1, round(len(dataset) * share / (1 - share)))

    @override
    def __len__(self) -> int:
        return len(self.dataset) + self.num_others

    @override
    def __getitem__(self, key: BatchKey) -> TokenBatch:  # type: ignore[override]
        own = key.indices < len(self.dataset)
        others = (key.epoch * self.num_others + key.indices[~own] - len(self.dataset)) % len(self.other)
        parts = [
            part[key._replace(indices=indices)]
            for part, indices in ((self.dataset, key.indices[own]), (self.other, others))
            if len(indices)
        ]
        order = torch.cat([own.nonzero(), (~own).nonzero()]).flatten().argsort()
        width = max(part["input_ids"].shape[1] for part in parts)
        fills = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}
        batch = {name: _joined([part[name] for part in parts], width, fill)[order] for name, fill in fills.items()}  # type: ignore[literal-required]
        return batch  # type: ignore[return-value]


def _joined(parts: Sequence[Tensor], width: int, fill: int) -> Tensor:
    padded = [torch.nn.functional.pad(part, (0, width - part.shape[1]), value=fill) for part in parts]
    return torch.cat(padded)
