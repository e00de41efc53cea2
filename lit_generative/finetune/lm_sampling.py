"""Continuations of prompts, drawn with a generator of their own."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from lit_generative.tensor_ops import uniform


class GumbelNoise(LogitsProcessor):  # type: ignore[misc]
    """Makes the most likely token a draw from the softmax of ``logits / temperature``.

    Source: the Gumbel-max trick, Maddison et al. 2014 (arXiv:1411.0030), eq. 1.

    Args:
        temperature: Positive.
        generator: Source of the noise; None for torch's own.
    """

    def __init__(self, temperature: float, generator: torch.Generator | None) -> None:
        self.temperature, self.generator = temperature, generator

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: ARG002  transformers' signature
        """Scores ``(N, V)`` with noise added, float32."""
        u = uniform(scores.shape, self.generator, scores.device)
        return scores.float() / self.temperature - (-u.log()).log()


def continue_tokens(
    model: Any, ids: list[int], ends: list[int], max_new_tokens: int, temperature: float, generator: Any = None
) -> list[int]:
    """Draw how one text goes on.

    Args:
        model: Of transformers, or one that PEFT has wrapped, in evaluation mode.
        ids: Tokens of the text, at least one.
        ends: Tokens that end a text; the first one drawn is the last token.
        max_new_tokens: Most tokens to draw.
        temperature: 0 takes the most likely token each time.
        generator: Source of the draws; None for torch's own.

    Returns:
        The tokens drawn.
    """
    inputs = torch.tensor([ids], device=model.device)
    # One text at a time: rows of unequal length would be padded, which PEFT's learned words do not take into account.
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, eos_token_id=ends, pad_token_id=ends[0]
    )
    noise = [] if temperature == 0 else [GumbelNoise(temperature, generator)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Position ids are not supported")  # they count from 0 anyway
        drawn = model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            generation_config=config,
            logits_processor=LogitsProcessorList(noise),
        )
    return drawn[0, len(ids) :].tolist()


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end a text: the tokenizer's, which training puts behind each, and further ones of the model."""
    own = model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [] if own is None else [own]
    return list(dict.fromkeys([tokenizer.eos_token_id, *own]))
