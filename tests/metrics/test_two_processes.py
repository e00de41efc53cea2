"""Two processes (gloo, CPU) score as one does, whatever their shares; none waits for a failed one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lit_generative.metrics.frechet import Frechet
from lit_generative.metrics.generative_metrics import GenerativeMetrics
from lit_generative.metrics.inception_score import InceptionScore
from lit_generative.metrics.kernel import Kernel
from lit_generative.metrics.mode_coverage import ModeCoverage
from lit_generative.metrics.precision_recall import PrecisionRecall
from tests import processes
from tests.metrics.tiny_features import TinyFeatures

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("process_pair.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    """What each of the two processes found."""
    folder = tmp_path_factory.mktemp("pair")
    processes.run(SCRIPT, folder)
    return [torch.load(folder / f"{index}.pt") for index in range(2)]


def images(n: int, seed: int) -> torch.Tensor:
    return torch.randint(256, (n, 1, 6, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def scores_of_one(more: bool = False) -> dict[str, float]:
    measures = (Frechet(), Kernel(), InceptionScore(splits=3), PrecisionRecall(k=3), ModeCoverage())
    metric = GenerativeMetrics(TinyFeatures(), measures)
    metric.update(images(40, 0), real=True)
    metric.update(images(33, 1), real=False)
    if more:
        metric.update(images(9, 2), real=True)
    return metric.compute()


def test_two_processes_score_as_one(found):
    expected = pytest.approx(scores_of_one(), rel=1e-9)
    for one in found:
        assert one["uneven"] == expected
        assert one["one has none"] == expected
        assert one["one has more"] == pytest.approx(scores_of_one(more=True), rel=1e-9)
    assert found[0]["uneven"] == found[1]["uneven"]
    assert scores_of_one() != scores_of_one(more=True)


def test_an_error_is_raised_in_both_processes(found):
    for one in found:
        few, first, stubborn, together = one["errors"]
        assert few == "ValueError: Moments: a covariance needs at least two images, got 1. Add images before computing."
        assert first == "ValueError: of the first"
        assert stubborn == "RuntimeError: StubbornError: stuck at 3"
        assert "KeyError: 'image 7'" in together
        assert one["answer"] == {"from": 0}


def test_rows_and_sums_are_of_both_processes(found):
    assert torch.equal(found[0]["rows"], torch.ones(3, 2))
    assert len(found[1]["rows"]) == 0
    assert all(torch.equal(one["sum"], torch.tensor([2.0, 10.0])) for one in found)
