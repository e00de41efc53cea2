"""Groups of settings that the fine-tuning modules share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from lit_generative.recipe import Recorded
from lit_generative.types import PromptOptions


class Sampling(Recorded):
    """How a module draws when nobody says otherwise.

    Args:
        prompts: What ``sample()`` draws; a sample's label is the index of its prompt.
        negative: What pictures shall not show.
        guidance_scale: How much more the prompt counts; 1 is no guidance. Source: Ho & Salimans 2022
            (arXiv:2207.12598), whose ``w`` is one less.
        num_steps: Steps of DDIM.
        image_size: Height and width in pixels; None for what the pipeline was made for.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        prompts: Sequence[str] = (),
        negative: str | None = None,
        guidance_scale: float = 7.5,
        num_steps: int = 50,
        image_size: int | None = None,
    ) -> None:
        if isinstance(prompts, str):
            raise ValueError(f"Sampling: prompts must be a list, got the text {prompts!r}. Put it into a list.")
        if not guidance_scale >= 1:
            raise ValueError(f"Sampling: guidance_scale must be at least 1, got {guidance_scale}. 1 is no guidance.")
        if num_steps < 1:
            raise ValueError(f"Sampling: num_steps must be at least 1, got {num_steps}.")
        self.prompts = list(prompts)
        self.negative = negative
        self.guidance_scale = guidance_scale
        self.num_steps = num_steps
        self.image_size = image_size

    def completed(self, options: PromptOptions) -> PromptOptions:
        """The options, with what they leave open.

        Raises:
            ValueError: If a number is out of range.
        """
        own = Sampling(
            negative=self.negative if options.negative is None else options.negative,
            guidance_scale=self.guidance_scale if options.guidance_scale is None else options.guidance_scale,
            num_steps=self.num_steps if options.num_steps is None else options.num_steps,
        )
        return options._replace(negative=own.negative, guidance_scale=own.guidance_scale, num_steps=own.num_steps)

    def settings(self) -> dict[str, Any]:
        """The same as plain data."""
        return {key: value for key, value in vars(self).items() if not key.startswith("_")}


class Memory(Recorded):
    """How to do with less memory, or less time.

    Args:
        gradient_checkpointing: Compute activations a second time in the backward pass: the same numbers, 1.8 times the
            time on a small model.
        cache: Compute once for each picture or caption what no training changes, and keep it in main memory:
            ``latents`` (the posterior; each step draws from it anew), ``text`` or ``both``. Pictures must then come
            unchanged each epoch: without random crops or flips.
        frozen_dtype: What weights that are not trained are kept in: half the memory. What is trained stays float32, and
            so does the autoencoder, which overflows in float16. Use it with ``precision: bf16-mixed`` or ``16-mixed``.
            A whole pipeline that is exported then holds the rounded weights.

    Raises:
        ValueError: If a name is not one of these.
    """

    def __init__(
        self,
        gradient_checkpointing: bool = False,
        cache: Literal["latents", "text", "both"] | None = None,
        frozen_dtype: Literal["bfloat16", "float16"] | None = None,
    ) -> None:
        if cache not in (None, "latents", "text", "both"):
            raise ValueError(f"Memory: cache must be latents, text, both or null, got {cache!r}.")
        if frozen_dtype not in (None, "bfloat16", "float16"):
            raise ValueError(f"Memory: frozen_dtype must be bfloat16, float16 or null, got {frozen_dtype!r}.")
        self.gradient_checkpointing = gradient_checkpointing
        self.cache = cache
        self.frozen_dtype = frozen_dtype

    @property
    def dtype(self) -> torch.dtype:
        """Of frozen weights."""
        return torch.float32 if self.frozen_dtype is None else getattr(torch, self.frozen_dtype)

    @property
    def caches_latents(self) -> bool:
        """Whether latents are computed once."""
        return self.cache in ("latents", "both")

    @property
    def caches_text(self) -> bool:
        """Whether prompts are encoded once."""
        return self.cache in ("text", "both")
