"""What processes of one run tell each other while they evaluate; with one process, nothing."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def num_processes() -> int:
    """Processes of this run; 1 without ``torch.distributed``."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    """This process's index, from 0."""
    return dist.get_rank() if num_processes() > 1 else 0


def sum_over_processes(x: Tensor) -> Tensor:
    """The sum of every process's ``x``, on the CPU; ``x`` itself stays as it is."""
    if num_processes() == 1:
        return x
    total = x.to(_device(), copy=True)
    dist.all_reduce(total)
    return total.cpu()


def gather_rows(x: Tensor) -> Tensor:
    """The rows of every process, process after process, on the CPU of process 0; elsewhere ``(0, ...)``.

    Args:
        x: ``(N, ...)``, any ``N`` in each process, the other axes alike. Without rows they may have any length, since
            a process that saw no image does not know it; dtype and number of axes must be those of the others.

    Returns:
        ``(sum of N, ...)``.
    """
    if num_processes() == 1:
        return x
    mine = torch.tensor(x.shape if len(x) else [0] * x.ndim, device=_device())
    shapes = [torch.zeros_like(mine) for _ in range(num_processes())]
    dist.all_gather(shapes, mine)
    sizes = [int(shape[0]) for shape in shapes]
    # Collectives want equal shapes: pad to the longest.
    padded = torch.zeros(torch.stack(shapes).amax(dim=0).tolist(), dtype=x.dtype, device=_device())
    if len(x):
        padded[: len(x)] = x.to(padded.device)
    parts = [torch.zeros_like(padded) for _ in sizes] if process_index() == 0 else None
    dist.gather(padded, parts, dst=0)
    if parts is None:
        return x[:0]
    return torch.cat([part[:n].cpu() for part, n in zip(parts, sizes, strict=True)])


def on_first_process(work: Callable[[], T]) -> T:
    """Do ``work`` in process 0 and give its result to all; an error there is raised in all, so that none waits.

    The result must be picklable: numbers, texts, dictionaries and tensors of them.
    """
    if num_processes() == 1:
        return work()
    answer: list[T | Exception | None] = [None, None]
    if process_index() == 0:
        try:
            answer[0] = work()
        except Exception as error:  # re-raised below, everywhere
            answer[1] = _sendable(error)
    dist.broadcast_object_list(answer, src=0, device=_device())
    if isinstance(answer[1], Exception):
        raise answer[1]
    return answer[0]  # type: ignore[return-value]


@contextlib.contextmanager
def raise_together() -> Iterator[None]:
    """An error inside ends it in every process, with the message of the first one; all must enter."""
    if num_processes() == 1:
        yield
        return
    failure: Exception | None = None
    try:
        yield
    except Exception as error:  # re-raised below, everywhere
        failure = error
    messages: list[str | None] = [None] * num_processes()
    dist.all_gather_object(messages, None if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    if theirs := next((message for message in messages if message is not None), None):
        raise ValueError(f"Another process failed. {theirs}")


def _sendable(error: Exception) -> Exception:
    """The error itself, or one with its text if it cannot be copied: then the others would wait for ever."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever its class does
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _device() -> torch.device:
    # NCCL moves tensors of its GPU only.
    on_gpu = dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
