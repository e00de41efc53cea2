"""Scores are those of torch-fidelity and torchmetrics on the same images and the same weight file."""

from __future__ import annotations

import pytest
import torch
import torch_fidelity
from torch import Tensor
from torch.utils.data import Dataset
from torchmetrics.image.fid import FrechetInceptionDistance

from lit_generative.metrics.frechet import Frechet
from lit_generative.metrics.generative_metrics import GenerativeMetrics
from lit_generative.metrics.inception import InceptionV3
from lit_generative.metrics.inception_score import InceptionScore
from lit_generative.metrics.kernel import Kernel
from lit_generative.metrics.precision_recall import PrecisionRecall
from tests.inception_weights import weights_file

pytestmark = pytest.mark.slow  # images pass through three Inceptions
NUM = 20


class Images(Dataset):
    """What torch-fidelity wants of a data set."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def pictures(seed: int) -> Tensor:
    """Smooth colours with edges, ``(20, 3, 28, 28)`` uint8."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(NUM, 3, 5, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(28, 28), mode="bicubic").clamp(0, 1)
    edges = torch.rand(NUM, 1, 28, 28, generator=generator) > 0.2 + 0.1 * seed
    return (smooth * edges * 255).round().to(torch.uint8)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return str(weights_file(tmp_path_factory))


@pytest.fixture(scope="module")
def ours(weights):
    measures = [Frechet(), Kernel(), InceptionScore(splits=4), PrecisionRecall(k=3)]
    metric = GenerativeMetrics(InceptionV3(weights), measures)
    metric.update(pictures(0), real=True)
    metric.update(pictures(1), real=False)
    return metric.compute()


@pytest.fixture(scope="module")
def theirs(weights):
    return torch_fidelity.calculate_metrics(
        input1=Images(pictures(1)),
        input2=Images(pictures(0)),
        isc=True,
        fid=True,
        kid=True,
        prc=True,
        isc_splits=4,
        samples_shuffle=False,
        kid_subsets=1,
        kid_subset_size=NUM,
        prc_neighborhood=3,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=weights,
        cuda=False,
        cache=False,
        verbose=False,
    )


def test_fid_is_that_of_torch_fidelity(ours, theirs):
    assert ours["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)


def test_fid_is_that_of_torchmetrics_without_antialiasing(ours, weights):
    metric = FrechetInceptionDistance(feature=2048, feature_extractor_weights_path=weights, antialias=False)
    metric.update(pictures(0), real=True)
    metric.update(pictures(1), real=False)
    assert ours["fid"] == pytest.approx(float(metric.compute()), rel=1e-6)


def test_kid_over_all_pairs_is_that_of_torch_fidelity_in_one_subset(ours, theirs):
    assert ours["kid"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-5)


def test_the_inception_score_is_that_of_torch_fidelity(ours, theirs):
    assert ours["is"] == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
    assert ours["is_std"] == pytest.approx(theirs["inception_score_std"], rel=1e-4)


def test_precision_and_recall_are_those_of_torch_fidelity(ours, theirs):
    assert ours["precision"] == pytest.approx(theirs["precision"])
    assert ours["recall"] == pytest.approx(theirs["recall"])
