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
    """Smooth colours with edges, ``(NUM, 3, 28, 28)`` uint8."""
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


def test_scores_are_those_of_torch_fidelity(ours, theirs):
    """One test: of several, each process of xdist would pass the images through both networks again."""
    assert 0 < ours["recall"] < ours["precision"] < 1
    pairs = {
        "fid": ("frechet_inception_distance", 1e-6),
        "kid": ("kernel_inception_distance_mean", 1e-5),  # over all pairs; theirs in one subset
        "is": ("inception_score_mean", 1e-6),
        "is_std": ("inception_score_std", 1e-4),
        "precision": ("precision", 1e-6),
        "recall": ("recall", 1e-6),
    }
    wrong = {
        name: (ours[name], theirs[key])
        for name, (key, rel) in pairs.items()
        if ours[name] != pytest.approx(theirs[key], rel=rel)
    }
    assert wrong == {}


def test_fid_is_that_of_torchmetrics_without_antialiasing(ours, weights):
    metric = FrechetInceptionDistance(feature=2048, feature_extractor_weights_path=weights, antialias=False)
    metric.update(pictures(0), real=True)
    metric.update(pictures(1), real=False)
    assert ours["fid"] == pytest.approx(float(metric.compute()), rel=1e-6)
