"""Checks of arguments that several networks share."""

from __future__ import annotations

from torch import Tensor, nn


def check_label(network: nn.Module, num_classes: int | None, y: Tensor | None) -> None:
    """Refuse a missing label, and one that the network has no use for.

    Args:
        network: Who asks; its class is named in the message.
        num_classes: What the network was built with; None if it is unconditional.
        y: Class labels ``(N,)``, or None.

    Raises:
        ValueError: If exactly one of ``num_classes`` and ``y`` is None.
    """
    name = type(network).__name__
    if num_classes is not None and y is None:
        raise ValueError(f"{name}: built with num_classes={num_classes}, so it needs labels y of shape (N,), got None.")
    if num_classes is None and y is not None:
        raise ValueError(
            f"{name}: built without num_classes, so it takes no labels, got y of shape {tuple(y.shape)}. "
            "Pass y=None, or build it with num_classes."
        )


def check_divisible(name: str, image_size: int, divisor: int, reason: str) -> None:
    """Refuse an image size that is no positive multiple of ``divisor``.

    Args:
        name: Name of the class that asks.
        image_size: Height and width in pixels.
        divisor: What must divide ``image_size``.
        reason: Where ``divisor`` comes from, as in ``"2**num_stages"``.

    Raises:
        ValueError: If ``divisor`` does not divide ``image_size``; the message names the nearest sizes that fit.
    """
    if image_size >= divisor and image_size % divisor == 0:
        return
    below = image_size // divisor * divisor
    sizes = f"{below} and {below + divisor}" if below > 0 else f"{divisor}"
    raise ValueError(
        f"{name}: image_size must be a positive multiple of {divisor} ({reason}), got {image_size}. "
        f"Nearest that fit: {sizes}."
    )
