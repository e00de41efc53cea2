"""Results that are computed once for each example."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor


class RowCache:
    """Keeps rows of tensors in main memory, by keys that say what they were computed of."""

    def __init__(self) -> None:
        self._hits = self._known = 0
        self._rows: dict[Hashable, tuple[Tensor, ...]] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def rows(
        self,
        keys: Sequence[Hashable],
        compute: Callable[[list[int]], tuple[Tensor, ...]],
        device: torch.device | str,
    ) -> tuple[Tensor, ...]:
        """Rows of each key.

        Args:
            keys: ``N`` keys, some of them the same, perhaps.
            compute: Gives tensors ``(M, ...)`` for the positions of ``M`` keys.
            device: Where the result shall lie.

        Returns:
            Tensors ``(N, ...)``, as many as ``compute`` gives.
        """
        missing = list({key: i for i, key in enumerate(keys) if key not in self._rows}.values())
        self._hits += len(keys) - len(missing)
        if missing:
            parts = [part.detach().cpu() for part in compute(missing)]
            for row, i in enumerate(missing):
                self._rows[keys[i]] = tuple(part[row].clone() for part in parts)
        found = [self._rows[key] for key in keys]
        return tuple(torch.stack(part).to(device) for part in zip(*found, strict=True))

    @property
    def useless(self) -> bool:
        """Whether there were rows when this epoch began, and none of them was asked for."""
        return self._known > 0 and self._hits == 0

    def start_epoch(self) -> None:
        """Begin to watch whether it is of use."""
        self._hits, self._known = 0, len(self._rows)

    def clear(self) -> None:
        """Forget all rows."""
        self._rows.clear()


def content_keys(x: Tensor) -> list[bytes]:
    """A digest of each example's values, shape and type: ``(N, ...)`` to ``N`` keys."""
    rows = x.detach().cpu().contiguous()
    kind = f"{tuple(x.shape[1:])} {x.dtype}".encode()
    return [hashlib.blake2b(kind + row.view(torch.uint8).numpy().tobytes(), digest_size=16).digest() for row in rows]
