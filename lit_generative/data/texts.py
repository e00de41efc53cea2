"""Texts for language models: whole documents, or completions of prompts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from lit_generative.data.batches import BatchDataset, BatchKey
from lit_generative.data.resumable import ResumableDataModule
from lit_generative.data.splits import Splits, check_fraction, split_indices
from lit_generative.data.text_sources import fields, read_documents, read_records
from lit_generative.data.token_rows import Replay, TokenRows, pack
from lit_generative.data.tokenizers import encode_completions, encode_documents, load_tokenizer
from lit_generative.types import Batch, Split

GENERAL = "general"


class TokenDataModule(ResumableDataModule):
    """What :class:`TextData` and :class:`CompletionData` share; a batch is a ``TokenBatch``, ``(N, T)``.

    Args:
        train: Training data. A text file, a JSONL file, a folder of ``*.txt``, a folder that ``datasets`` saved, or a
            data set on the hub, as ``owner/name``, ``owner/name:split`` or ``owner/name:config:split``.
        pretrained: Where the tokenizer is: the folder or hub name of the model. ``litgen fit`` takes the model's.
        block_size: Most tokens of an example.
        val: Validation data; None takes ``val_fraction`` of the examples of ``train``.
        test: Test data; None for none.
        general: Texts of another kind, a second validation and test set: whether the model forgets what it could.
        replay: Texts that are mixed into training so that it does not.
        replay_share: Part of the examples of an epoch that ``replay`` makes up, in ``(0, 1)``.
        one_per_line: Each line of a text file is a document; else the file is.
        text_column: Which key of records is a document.
        revision: Of the tokenizer on the hub.
        kwargs: Arguments of :class:`~lit_generative.data.resumable.ResumableDataModule`.

    Attributes:
        tokenizer: Of transformers, after ``setup``.

    Raises:
        ValueError: If a number is out of its range.
    """

    def __init__(
        self,
        train: str,
        pretrained: str | None = None,
        block_size: int = 512,
        val: str | None = None,
        test: str | None = None,
        general: str | None = None,
        replay: str | None = None,
        replay_share: float = 0.25,
        one_per_line: bool = False,
        text_column: str = "text",
        revision: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if block_size < 2:
            raise ValueError(f"{self._name}: block_size must be at least 2, got {block_size}.")
        check_fraction(self._name, "replay_share", replay_share)
        if replay is not None and replay_share == 0:
            raise ValueError(f"{self._name}: replay_share must be above 0, got 0. Leave replay out.")
        self.pretrained, self.revision = pretrained, revision
        self.train, self.val, self.test = train, val, test
        self.block_size = block_size
        self.general, self.replay, self.replay_share = general, replay, replay_share
        self.one_per_line, self.text_column = one_per_line, text_column
        self.tokenizer: Any = None
        self._general: TokenRows | None = None

    @abstractmethod
    def read(self, place: str) -> Sequence[Any]:
        """The examples of ``train``, ``val`` or ``test``."""

    @abstractmethod
    def rows(self, examples: Sequence[Any]) -> TokenRows:
        """Examples as tokens."""

    def documents(self, place: str) -> Sequence[str]:
        """The documents of ``general`` or ``replay``."""
        return read_documents(self._name, place, self.text_column, self.one_per_line)

    @property
    @override
    def sample_shape(self) -> tuple[int, ...]:
        return (self.block_size,)

    @property
    @override
    def num_classes(self) -> None:
        return None

    def evaluation_sets(self, split: Split) -> list[str]:
        """Names of what the loaders of a split yield, in their order; "" for the data's own."""
        return [name for name, _ in self._evaluated(split)]

    @override
    def load_splits(self) -> Splits:
        if self.pretrained is None:
            raise ValueError(f"{self._name}: pretrained must name the model, for its tokenizer, got None.")
        self.tokenizer = load_tokenizer(self._name, self.pretrained, self.revision)
        train, val = self._development()
        rows = self.rows(train)
        mixed: BatchDataset = rows
        if self.replay is not None and len(rows):
            mixed = Replay(rows, self._packed(self.documents(self.replay)), self.replay_share)
        if self.general is not None:
            self._general = self._packed(self.documents(self.general))
        return Splits(mixed, self.rows(val), self.rows([] if self.test is None else self.read(self.test)))

    @override
    def val_dataloader(self) -> list[DataLoader[Batch]]:
        return [self._eval_loader(rows) for _, rows in self._evaluated("val")]  # type: ignore[misc]

    @override
    def test_dataloader(self) -> list[DataLoader[Batch]]:
        return [self._eval_loader(rows) for _, rows in self._evaluated("test")]  # type: ignore[misc]

    @override
    def examples(self, split: Split, indices: Tensor) -> Tensor:
        """Tokens, ``(N, T)`` int64; the rest as in the base class."""
        batch: Any = getattr(self.splits, split)[BatchKey(0, 0, 0, indices)]
        return batch["input_ids"]

    def _evaluated(self, split: Split) -> list[tuple[str, BatchDataset]]:
        own: BatchDataset = getattr(self.splits, split)
        sets = [("", own), (GENERAL, self._general)]
        return [(name, rows) for name, rows in sets if rows is not None and len(rows)]

    def _development(self) -> tuple[Sequence[Any], Sequence[Any]]:
        examples = self.read(self.train)
        if self.val is not None:
            return examples, self.read(self.val)
        train, val = split_indices(len(examples), self.val_fraction, self.split_seed, "val")
        if self.val_fraction > 0 and not len(val):
            raise ValueError(
                f"{self._name}: val_fraction={self.val_fraction} of {len(examples)} documents leaves none to validate "
                "on. Name validation data in val, set one_per_line for files of one document a line, or val_fraction 0."
            )
        return [examples[i] for i in train], [examples[i] for i in val]

    def _packed(self, texts: Sequence[str]) -> TokenRows:
        return pack(encode_documents(self.tokenizer, texts), self.block_size, self._pad)

    @property
    def _pad(self) -> int:
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad


class TextData(TokenDataModule):
    """Documents, written one after another with an end-of-text token behind each, and cut into blocks.

    Every token but a block's first is to be predicted. A block may begin within a document, and hold several.

    Args:
        kwargs: Arguments of :class:`TokenDataModule`.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    @override
    def read(self, place: str) -> Sequence[str]:
        return self.documents(place)

    @override
    def rows(self, examples: Sequence[str]) -> TokenRows:
        return self._packed(examples)


class CompletionData(TokenDataModule):
    """Prompts and their completions, one pair a row: the completion and the end-of-text token are to be predicted.

    A pair of more than ``block_size`` tokens is left out, and it is said how many are.

    Args:
        prompt: Template of the prompt, with keys of the records in braces:
            ``"Instruction: {instruction} Response:"``.
        completion: Template of what follows. It should begin with the space that parts it from the prompt, if any.
        kwargs: Arguments of :class:`TokenDataModule`. ``train``, ``val`` and ``test`` are JSONL files or data sets;
            ``general`` and ``replay`` are whole texts, packed as in :class:`TextData`.

    Raises:
        ValueError: If ``completion`` names no key.
    """

    def __init__(self, prompt: str = "{prompt}", completion: str = "{completion}", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not fields(completion):
            raise ValueError(
                f"{self._name}: completion must name a key in braces, as '{{completion}}', got {completion!r}."
            )
        self.prompt, self.completion = prompt, completion

    @override
    def read(self, place: str) -> Sequence[tuple[str, str]]:
        records = read_records(self._name, place, fields(self.prompt + self.completion))
        return [(self.prompt.format_map(record), self.completion.format_map(record)) for record in records]

    @override
    def rows(self, examples: Sequence[tuple[str, str]]) -> TokenRows:
        encoded = list(encode_completions(self.tokenizer, examples))
        kept = [(ids, start) for ids, start in encoded if len(ids) <= self.block_size]
        if len(kept) < len(encoded):
            message = f"{len(encoded) - len(kept)} of {len(encoded)} examples have more than {self.block_size} tokens"
            if not kept:
                raise ValueError(f"{self._name}: {message}, so none is left. Raise block_size.")
            rank_zero_warn(f"{self._name}: {message} and are left out. Raise block_size to keep them.")
        # An empty prompt of a model without beginning-of-text token: nothing stands before the first token.
        return TokenRows([ids for ids, _ in kept], [max(1, start) for _, start in kept], self._pad)
