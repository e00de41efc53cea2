"""Gradients of replicated weights, averaged over processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed
from torch import Tensor, nn

BUCKET = 2**23
"""Numbers sent at once: 32 MB of float32, large enough for the network and small beside the gradients."""


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its mean over all processes; those that are None must be so in every process.

    Args:
        parameters: Of one optimizer, in the same order in every process.
    """
    world = torch.distributed.get_world_size()
    gradients = [p.grad for p in parameters if p.grad is not None]
    if world == 1:
        return
    for bucket in _buckets(gradients):
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        torch.distributed.all_reduce(flat)
        flat /= world
        parts = flat.split([gradient.numel() for gradient in bucket])
        torch._foreach_copy_(bucket, [part.view_as(g) for part, g in zip(parts, bucket, strict=True)])


def _buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for gradient in gradients:
        if bucket and (size + gradient.numel() > BUCKET or gradient.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(gradient)
        size += gradient.numel()
    if bucket:
        yield bucket
