"""Small tensor functions that every family uses."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

HALF_LEVEL = 1 / 255
"""Half the distance of two of the 256 levels in ``[-1, 1]``."""
OFF_LEVEL = 0.3
Generators = torch.Generator | Sequence[torch.Generator] | None


def expand_like(values: Tensor, x: Tensor) -> Tensor:
    """Give one value per example the axes of ``x``, so that the two broadcast.

    Args:
        values: One number per example, ``(N,)``.
        x: Any tensor whose first axis is the batch, ``(N, ...)``.

    Returns:
        ``(N, 1, ..., 1)`` with as many axes as ``x``.
    """
    return values.reshape(-1, *([1] * (x.ndim - 1)))


def sum_per_example(x: Tensor) -> Tensor:
    """Sum over every axis but the first: ``(N, ...)`` to ``(N,)``."""
    return x.flatten(start_dim=1).sum(dim=1)


def perplexity(counts: Tensor) -> Tensor:
    """``exp(entropy)`` of how often each of K things was seen: K if all equally often, 1 if always the same.

    Args:
        counts: At least one of them above zero, ``(K,)``.

    Returns:
        A scalar in ``[1, K]``.
    """
    return torch.special.entr(counts / counts.sum()).sum().exp()


@contextlib.contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No parameter of ``module`` asks for a gradient inside; each gets its own setting back, also after an error."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    for p in trainable:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trainable:
            p.requires_grad_(True)


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """``module`` is in evaluation mode inside; each sub-module gets its own mode back, also after an error."""
    training = [m for m in module.modules() if m.training]
    module.eval()
    try:
        yield
    finally:
        for m in training:
            m.training = True


def full_precision(device: torch.device | str) -> contextlib.AbstractContextManager[None]:
    """Inside, autocast is off: operations run in the dtype of their inputs.

    Tensors that autocast made before are half precision still: give them through :func:`to_float32`. The backward pass
    must run outside autocast too, or it lowers the precision of what was computed here.

    Args:
        device: Where the tensors lie, or its type.

    Returns:
        A context manager.
    """
    return torch.autocast(torch.device(device).type, enabled=False)


def to_float32(values: Any) -> Any:
    """Cast float16 and bfloat16 tensors to float32, within lists, tuples and dictionaries; the rest stays as it is."""
    if isinstance(values, Tensor):
        return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
    if type(values) in (list, tuple):
        return type(values)(to_float32(value) for value in values)
    if type(values) is dict:
        return {key: to_float32(value) for key, value in values.items()}
    return values


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part and is the same in every process, unlike ``hash``."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def sample_generators(seed: int, num: int, start: int = 0) -> list[torch.Generator]:
    """One generator per sample, so that sample ``i`` does not depend on the batch it is drawn in.

    Args:
        seed: Seed of the whole set.
        num: How many generators.
        start: Index of the first sample in the whole set.

    Returns:
        CPU generators for the samples ``start`` to ``start + num - 1``.
    """
    return [torch.Generator().manual_seed(derive_seed("sample", seed, start + i)) for i in range(num)]


def generators_of(x: Tensor, *parts: int | str) -> list[torch.Generator]:
    """One generator for each example, seeded by its own values: whatever the batch, the process, or the order.

    Args:
        x: Examples, ``(N, ...)``.
        parts: What else the seeds depend on.

    Returns:
        ``N`` CPU generators.
    """
    rows = x.detach().cpu().flatten(start_dim=1).contiguous().view(torch.uint8).numpy()  # numpy has no bfloat16
    return [torch.Generator().manual_seed(derive_seed(*parts, row.tobytes().hex())) for row in rows]


def randn(shape: Sequence[int], generator: Generators = None, device: torch.device | str = "cpu") -> Tensor:
    """Standard normal noise, drawn where the generator lives and moved to ``device``.

    Args:
        shape: Shape of the result, ``(N, ...)``.
        generator: None (torch's own), one generator for the whole batch, or a sequence of ``N``, one per example.
        device: Where the result lies.

    Returns:
        float32 noise of ``shape``.

    Raises:
        ValueError: If a sequence of generators has not one for each example.
    """
    return _drawn(torch.randn, shape, generator, device)


def uniform(shape: Sequence[int], generator: Generators = None, device: torch.device | str = "cpu") -> Tensor:
    """Numbers drawn uniformly from ``[0, 1)``, float32; arguments as in :func:`randn`."""
    return _drawn(torch.rand, shape, generator, device)


def random_labels(
    num: int, num_classes: int, generator: Generators = None, device: torch.device | str = "cpu"
) -> Tensor:
    """Labels drawn uniformly from ``[0, num_classes)``: ``(num,)`` int64. ``generator`` as in :func:`randn`."""
    if generator is None or isinstance(generator, torch.Generator):
        source = device if generator is None else generator.device
        return torch.randint(num_classes, (num,), generator=generator, device=source).to(device)
    _check_count(generator, num)
    if not generator:
        return torch.empty(0, dtype=torch.int64, device=device)
    return torch.cat([torch.randint(num_classes, (1,), generator=g, device=g.device) for g in generator]).to(device)


def to_uint8(images: Tensor) -> Tensor:
    """Quantize images from ``[-1, 1]`` to the nearest of 256 levels; what lies outside becomes 0 or 255.

    This is the only place where the project turns floats into pixels.

    Args:
        images: ``(N, C, H, W)``, any floating dtype.

    Returns:
        uint8, same shape.
    """
    return images.float().mul(127.5).add(127.5).round().clamp(0, 255).to(torch.uint8)


def from_uint8(pixels: Tensor) -> Tensor:
    """Scale pixels 0..255 to float32 in ``[-1, 1]``; the inverse of :func:`to_uint8`."""
    return pixels.float().div(127.5).sub(1.0)


def check_pixel_levels(who: str, x: Tensor, otherwise: str) -> None:
    """Refuse what is no 8-bit pixels brought to ``[-1, 1]``. Reads numbers off the device: not for every batch.

    Args:
        who: Begins the message, and says whose values they are, as in ``"Likelihood: images"``.
        x: Values, any shape.
        otherwise: Ends the message: what to do.

    Raises:
        ValueError: If a value lies outside, is NaN, or is not near one of the 256 levels.
    """
    level = x.float().add(1).mul(127.5)
    low, high = (float(value) for value in level.aminmax())
    off = float((level - level.round()).abs().max())
    # bfloat16 alone moves a value by a quarter of a level
    if not (low > -OFF_LEVEL and high < 255 + OFF_LEVEL and off < OFF_LEVEL):
        raise ValueError(
            f"{who} must hold the 256 levels k / 127.5 - 1 of 8-bit pixels, got values from {low / 127.5 - 1:.4g} to "
            f"{high / 127.5 - 1:.4g}, up to {off:.2g} levels from the nearest. {otherwise}"
        )


def _drawn(
    draw: Callable[..., Tensor], shape: Sequence[int], generator: Generators, device: torch.device | str
) -> Tensor:
    if generator is None or isinstance(generator, torch.Generator):
        source = device if generator is None else generator.device
        return draw(tuple(shape), generator=generator, device=source).to(device)
    _check_count(generator, shape[0])
    if not generator:
        return torch.empty(tuple(shape), device=device)
    return torch.stack([draw(tuple(shape[1:]), generator=g, device=g.device) for g in generator]).to(device)


def _check_count(generators: Sequence[torch.Generator], num: int) -> None:
    if len(generators) != num:
        raise ValueError(f"generator: need one for each of {num} samples, got {len(generators)}.")


def log_ndtr(x: Tensor) -> Tensor:
    """Logarithm of the standard normal distribution function, with a gradient that is right at any distance.

    That of ``torch.special.log_ndtr`` is the exponential of a difference of squares: in float32 it is off by a factor
    of 6 at -10,000, and soon infinite.
    """
    return cast(Tensor, _LogNdtr.apply(x))


class _LogNdtr(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.special.log_ndtr(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * math.sqrt(2 / math.pi) / torch.special.erfcx(-math.sqrt(0.5) * x)
