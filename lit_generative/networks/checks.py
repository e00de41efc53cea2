"""Checks of arguments that several networks share, and what they do with a label."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOWEST_SIZE = 4


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


def with_label(network: nn.Module, x: Tensor, num_classes: int | None, y: Tensor | None) -> Tensor:
    """Rows ``(N, D)`` with the one-hot class behind them, ``(N, D + num_classes)``; as they are without classes.

    Raises:
        ValueError: As :func:`check_label`.
    """
    check_label(network, num_classes, y)
    if y is None or num_classes is None:
        return x
    return torch.cat([x, F.one_hot(y, num_classes).to(x.dtype)], dim=1)


def check_counts(name: str, **counts: int | None) -> None:
    """Refuse sizes and numbers below 1, which torch would take, or refuse in its own words.

    Args:
        name: Name of the class that asks.
        counts: Its arguments by name; None stands for none.

    Raises:
        ValueError: If one is below 1.
    """
    for argument, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name}: {argument} must be at least 1, got {count}.")


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


def pyramid_widths(name: str, image_size: int, width: int, max_width: int) -> list[int]:
    """Channels at the sizes ``image_size, image_size / 2, ..., 4``.

    Args:
        name: Name of the class that asks.
        image_size: Height and width in pixels.
        width: Channels at ``image_size``.
        max_width: Every halving doubles the channels, up to this.

    Returns:
        One number per size, at least two.

    Raises:
        ValueError: If ``image_size`` is not 4 times a power of two, at least 8, or ``width`` not in
            ``[1, max_width]``.
    """
    num_halvings = (image_size // LOWEST_SIZE).bit_length() - 1
    if num_halvings < 1 or image_size != LOWEST_SIZE * 2**num_halvings:
        below = LOWEST_SIZE * 2 ** max(num_halvings, 1)
        nearest = f"{below} and {2 * below}" if image_size > below else f"{below}"
        raise ValueError(
            f"{name}: image_size must be 4 times a power of two, at least 8, got {image_size}. "
            f"Nearest that fit: {nearest}."
        )
    if not 1 <= width <= max_width:
        raise ValueError(f"{name}: width must be at least 1 and at most {max_width}, got {width}.")
    return [min(width * 2**i, max_width) for i in range(num_halvings + 1)]


def check_shape(network: nn.Module, x: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse examples ``(N, ...)`` whose own shape is not ``shape``.

    Raises:
        ValueError: If it is another.
    """
    if tuple(x.shape[1:]) != tuple(shape):
        raise ValueError(
            f"{type(network).__name__}: needs a batch of shape (N, {', '.join(map(str, shape))}), got {tuple(x.shape)}."
        )
