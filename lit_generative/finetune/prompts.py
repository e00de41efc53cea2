"""From texts to what a U-Net sees of them: one CLIP text encoder, or two."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override


class Encoded(NamedTuple):
    """What a U-Net sees of ``N`` prompts."""

    hidden: Tensor
    """One vector for each token, ``(N, L, D)``, for its cross-attention."""
    pooled: Tensor | None = None
    """One vector for the whole, ``(N, P)``; Stable Diffusion XL alone has it."""


class Prompts(nn.Module, ABC):
    """Tokenizers and the text encoders behind them.

    Attributes:
        tokenizers: By the name that a pipeline knows them by.
        zeros_for_empty: Whether no prompt at all means zeros, and not the empty prompt.
    """

    tokenizers: dict[str, Any]
    zeros_for_empty: bool = False

    @property
    @abstractmethod
    def encoders(self) -> dict[str, Any]:
        """Text encoders by the name that a pipeline knows them by, in the order of the tokenizers."""

    @abstractmethod
    def encode(self, tokens: list[Tensor]) -> Encoded:
        """What the U-Net sees of tokens, ``(N, L)`` of each tokenizer."""

    def forward(self, texts: Sequence[str | None]) -> Encoded:
        """What the U-Net sees of prompts.

        Args:
            texts: ``N`` prompts; None is none at all: what guidance leads away from.
        """
        encoded = self.encode(self.tokens([text or "" for text in texts]))
        none = [text is None for text in texts]
        if not (self.zeros_for_empty and any(none)):
            return encoded
        kept = torch.tensor([not n for n in none], device=encoded.hidden.device)
        pooled = None if encoded.pooled is None else torch.where(kept[:, None], encoded.pooled, 0.0)
        return Encoded(torch.where(kept[:, None, None], encoded.hidden, 0.0), pooled)

    def tokens(self, texts: Sequence[str]) -> list[Tensor]:
        """Token ids, ``(N, L)`` int64 of each tokenizer, padded and cut to the length that its encoder takes.

        What does not fit is said in a warning.
        """
        device = next(self.parameters()).device
        return [_tokens(tokenizer, texts).to(device) for tokenizer in self.tokenizers.values()]


class ClipPrompts(Prompts):
    """The last hidden states of one encoder: Stable Diffusion 1.x and 2.x.

    Source: Rombach et al. 2022, sec. 3.3 (arXiv:2112.10752).

    Args:
        tokenizer: Of transformers.
        text_encoder: A ``CLIPTextModel``.
    """

    def __init__(self, tokenizer: Any, text_encoder: Any) -> None:
        super().__init__()
        self.tokenizers = {"tokenizer": tokenizer}
        self.text_encoder = text_encoder

    @property
    @override
    def encoders(self) -> dict[str, Any]:
        return {"text_encoder": self.text_encoder}

    @override
    def encode(self, tokens: list[Tensor]) -> Encoded:
        return Encoded(self.text_encoder(tokens[0])[0])


class DualClipPrompts(Prompts):
    """The last but one hidden states of two encoders side by side, and the pooled vector of the second: SDXL.

    Source: Podell et al. 2023, sec. 2.1 (arXiv:2307.01952).

    Args:
        tokenizer: Of the first encoder.
        tokenizer_2: Of the second.
        text_encoder: A ``CLIPTextModel``.
        text_encoder_2: A ``CLIPTextModelWithProjection``.
        zeros_for_empty: Whether no prompt at all means zeros, and not the empty prompt.
    """

    def __init__(
        self, tokenizer: Any, tokenizer_2: Any, text_encoder: Any, text_encoder_2: Any, zeros_for_empty: bool
    ) -> None:
        super().__init__()
        self.tokenizers = {"tokenizer": tokenizer, "tokenizer_2": tokenizer_2}
        self.text_encoder = text_encoder
        self.text_encoder_2 = text_encoder_2
        self.zeros_for_empty = zeros_for_empty

    @property
    @override
    def encoders(self) -> dict[str, Any]:
        return {"text_encoder": self.text_encoder, "text_encoder_2": self.text_encoder_2}

    @override
    def encode(self, tokens: list[Tensor]) -> Encoded:
        outputs = [
            encoder(ids, output_hidden_states=True) for encoder, ids in zip(self.encoders.values(), tokens, strict=True)
        ]
        hidden = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return Encoded(hidden, outputs[1].text_embeds)


def prompts_of(pipeline: Any) -> Prompts:
    """The prompts of a pipeline, made of its own tokenizers and encoders."""
    if not hasattr(pipeline, "text_encoder_2"):
        return ClipPrompts(pipeline.tokenizer, pipeline.text_encoder)
    encoders = (pipeline.tokenizer, pipeline.tokenizer_2, pipeline.text_encoder, pipeline.text_encoder_2)
    return DualClipPrompts(*encoders, bool(pipeline.config.force_zeros_for_empty_prompt))


def _tokens(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    length = tokenizer.model_max_length
    given = tokenizer(
        list(texts),
        padding="max_length",
        max_length=length,
        truncation=True,
        return_overflowing_tokens=True,  # as further rows
        return_tensors="pt",
    )
    ids, owners = given.input_ids, given.overflow_to_sample_mapping.tolist()
    first = [i for i, owner in enumerate(owners) if i == 0 or owner != owners[i - 1]]
    if len(first) < len(ids):
        row = next(i for i in range(len(ids)) if i not in first)
        cut = tokenizer.decode(ids[row], skip_special_tokens=True).strip()
        rank_zero_warn(
            f"The text encoder sees {length} tokens. Of the prompt {texts[owners[row]]!r} it does not see "
            f"{cut!r}. Shorten it."
        )
    return ids[first]
