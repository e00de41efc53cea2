"""Prior preservation: what a model knew of a class shall not become the one subject it is shown.

Source: Ruiz et al. 2023, eq. 2 (arXiv:2208.12242).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

from torch import nn

from lit_generative.finetune.adapters import adapter_layers
from lit_generative.recipe import Recorded


class Prior(Recorded):
    """A second loss that holds the class where it was.

    ``images``: the loss on pictures of the class, which the data brings as ``class_image`` and ``class_caption``; made
    by the model itself before training, as in the paper. ``teacher``: for the class's prompt, the model shall predict
    what it predicts without its adapters, on the subject's own noisy pictures; no pictures of the class are needed.

    Args:
        weight: Of this loss; that of the subject has weight 1.
        source: ``images`` or ``teacher``.
        prompt: The class, as in "a photo of a dog"; for ``images``, where the batch has no ``class_caption``.

    Raises:
        ValueError: If ``weight`` is not positive, ``source`` is not known, or a teacher has no prompt.
    """

    def __init__(
        self, weight: float = 1.0, source: Literal["images", "teacher"] = "images", prompt: str | None = None
    ) -> None:
        if not weight > 0:
            raise ValueError(f"Prior: weight must be positive, got {weight}. Leave the prior out to turn it off.")
        if source not in ("images", "teacher"):
            raise ValueError(f"Prior: source must be images or teacher, got {source!r}.")
        if source == "teacher" and not prompt:
            raise ValueError("Prior: a teacher needs the class's prompt, got none. Give one: 'a photo of a dog'.")
        self.weight = weight
        self.source = source
        self.prompt = prompt


@contextlib.contextmanager
def adapters_off(module: nn.Module) -> Iterator[None]:
    """Inside, the networks are those of before the adapters; after it, each adapter is trained or not as before."""
    layers = [layer for _, layer in adapter_layers(module)]
    trained = [p for p in module.parameters() if p.requires_grad]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter in module.parameters():
            parameter.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
