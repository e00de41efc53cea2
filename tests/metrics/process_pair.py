"""What ``test_two_processes.py`` runs in each of two processes: ``process_pair.py FOLDER``, its index in LOCAL_RANK."""

import contextlib
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from lit_generative.metrics.frechet import Frechet
from lit_generative.metrics.generative_metrics import GenerativeMetrics
from lit_generative.metrics.inception_score import InceptionScore
from lit_generative.metrics.kernel import Kernel
from lit_generative.metrics.mode_coverage import ModeCoverage
from lit_generative.metrics.precision_recall import PrecisionRecall
from lit_generative.metrics.processes import gather_rows, on_first_process, raise_together, sum_over_processes
from tests.metrics.tiny_features import TinyFeatures


def images(n: int, seed: int) -> torch.Tensor:
    return torch.randint(256, (n, 1, 6, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


REAL, FAKE, MORE = images(40, 0), images(33, 1), images(9, 2)
MEASURES = (Frechet(), Kernel(), InceptionScore(splits=3), PrecisionRecall(k=3), ModeCoverage())


def metric(shares: list[torch.Tensor], batch_size: int = 5) -> GenerativeMetrics:
    """Fed with one process's shares of the real and of the generated images."""
    result = GenerativeMetrics(TinyFeatures(), MEASURES, reset_real=False)
    for real, whole, share in ((True, REAL, shares[0]), (False, FAKE, shares[1])):
        for index in share.split(batch_size) if len(share) else ():
            result.update(whole[index], real=real, index=index)
    return result


def alternating(n: int, process: int) -> torch.Tensor:
    return torch.arange(process, n, 2)


def everything(n: int, process: int) -> torch.Tensor:
    return torch.arange(n if process == 1 else 0)


def error_of(work) -> str:
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


class StubbornError(Exception):
    def __init__(self, place: int, text: str) -> None:
        super().__init__(f"{text} at {place}")


def fail(error: Exception) -> None:
    raise error


def fail_together(process: int) -> None:
    with raise_together():
        if process == 1:
            raise KeyError("image 7")


def run(process: int) -> dict:
    found = {"sum": sum_over_processes(torch.tensor([1.0, 10.0 * process]))}
    found["rows"] = gather_rows(torch.full((3 * process, 2), float(process)))
    found["uneven"] = metric([alternating(40, process), alternating(33, process)], batch_size=5 - 3 * process).compute()
    found["one has none"] = metric([everything(40, process), everything(33, process)]).compute()

    again = metric([alternating(40, process), alternating(33, process)])
    again.compute()
    if process == 1:  # the other has no new image
        again.update(MORE, real=True, index=torch.arange(40, 49))
    found["one has more"] = again.compute()

    too_few = metric([everything(40, process), torch.arange(2)[:process]])
    found["errors"] = [
        error_of(too_few.compute),
        error_of(lambda: on_first_process(lambda: fail(ValueError("of the first")))),
        error_of(lambda: on_first_process(lambda: fail(StubbornError(3, "stuck")))),
        error_of(lambda: fail_together(process)),
    ]
    found["answer"] = on_first_process(lambda: {"from": process})
    return found


if __name__ == "__main__":
    index, folder = int(os.environ["LOCAL_RANK"]), Path(sys.argv[1])
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=index, world_size=2, timeout=timedelta(seconds=60))
    torch.save(run(index), folder / f"{index}.pt")
    with contextlib.suppress(RuntimeError):
        dist.destroy_process_group()
