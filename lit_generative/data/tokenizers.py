"""Texts as token numbers, as a pretrained language model wants them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

_HUB_NAME = re.compile(r"\w[\w.-]*/[\w.-]+")
_CHUNK = 1000


def load_tokenizer(who: str, pretrained: str, revision: str | None = None) -> Any:
    """The tokenizer of a pretrained language model.

    Args:
        who: Named in messages.
        pretrained: A folder as ``save_pretrained`` writes it, or the name of one on the hub.
        revision: Commit, branch or tag on the hub; None for its main branch.

    Raises:
        ValueError: If transformers is not installed, there is no such tokenizer, or it has no end-of-text token.
    """
    check_place(who, pretrained, "config.json and tokenizer.json")
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ValueError(
            f"{who}: tokenizers need transformers, which is not installed. Install lit-generative[finetune]."
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(pretrained, revision=revision)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{who}: {pretrained!r} holds no tokenizer that could be loaded: {_first_line(error)} Give the folder of a "
            "language model, or its name on the hub."
        ) from error
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"{who}: the tokenizer of {pretrained!r} must have an end-of-text token (eos_token), by which the model "
            "learns to stop. Set one in its tokenizer_config.json."
        )
    return tokenizer


def check_place(who: str, pretrained: str, holds: str) -> None:
    """A mistyped path must not be looked for on the hub.

    Args:
        who: Named in the message.
        pretrained: Folder, or name on the hub.
        holds: What a folder must hold, for the message.

    Raises:
        ValueError: If it is neither a folder that exists nor a possible name.
    """
    folder = Path(pretrained)
    if (pretrained and folder.is_dir()) or is_hub_name(pretrained):
        return
    raise ValueError(
        f"{who}: there is no folder {pretrained!r}, and names on the hub read owner/name. Give a folder that holds "
        f"{holds}."
    )


def is_hub_name(name: str) -> bool:
    """Whether ``name`` reads ``owner/name`` and is no path that exists."""
    return _HUB_NAME.fullmatch(name) is not None and not Path(name).exists()


def encode_prompt(tokenizer: Any, text: str) -> list[int]:
    """Tokens that a model continues: those of the text, after a beginning-of-text token where the model has one.

    Special tokens within the text, as ``</s>``, are letters like others.
    """
    return next(_encoded(tokenizer, [text]))


def encode_documents(tokenizer: Any, texts: Sequence[str]) -> Iterator[list[int]]:
    """Tokens of each whole text: as :func:`encode_prompt`, and the end-of-text token."""
    for ids in _encoded(tokenizer, texts):
        yield [*ids, tokenizer.eos_token_id]


def encode_completions(tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> Iterator[tuple[list[int], int]]:
    """Tokens of each prompt and its completion, with the end-of-text token, and how many of them are the prompt's.

    The prompt's tokens are those of :func:`encode_prompt`, which the model is given when it answers. Where the text as
    a whole would be cut otherwise across their border, the two are cut apart.
    """
    prompts = _encoded(tokenizer, [prompt for prompt, _ in pairs])
    wholes = _encoded(tokenizer, [prompt + completion for prompt, completion in pairs])
    for (_, completion), prompt, whole in zip(pairs, prompts, wholes, strict=True):
        if whole[: len(prompt)] != prompt:
            whole = prompt + next(_encoded(tokenizer, [completion], begin=False))
        yield [*whole, tokenizer.eos_token_id], len(prompt)


def _encoded(tokenizer: Any, texts: Sequence[str], begin: bool = True) -> Iterator[list[int]]:
    """Tokens without the end-of-text token that some tokenizers add themselves."""
    for start in range(0, len(texts), _CHUNK):
        ids: Iterable[list[int]] = tokenizer(
            list(texts[start : start + _CHUNK]), add_special_tokens=begin, split_special_tokens=True, verbose=False
        )["input_ids"]
        for row in ids:
            yield row[:-1] if row and row[-1] == tokenizer.eos_token_id else list(row)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
