import pytest
import torch
from torch_fidelity.metric_prc import calculate_precision_recall_full, calculate_precision_recall_part

from lit_generative.metrics import precision_recall
from lit_generative.metrics.feature_set import FeatureSet
from lit_generative.metrics.measures import choose_rows
from lit_generative.metrics.moments import moments_of
from lit_generative.metrics.precision_recall import PrecisionRecall, precision_recall_density_coverage


def features(n: int, seed: int = 0, shift: float = 0.0, dim: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, dim, generator=generator).double() + shift


def feature_set(x: torch.Tensor) -> FeatureSet:
    return FeatureSet(moments_of(x), x.float())


def by_hand(real: torch.Tensor, fake: torch.Tensor, k: int) -> dict[str, float]:
    """Distances one by one; the k-th of an image's neighbours is the (k+1)-th of all, which begin with itself."""

    def distances(a, b):
        return torch.tensor([[float((x - y).square().sum()) ** 0.5 for y in b] for x in a])

    real_radius = distances(real, real).sort(dim=1).values[:, k]
    fake_radius = distances(fake, fake).sort(dim=1).values[:, k]
    between = distances(fake, real)
    inside = between <= real_radius
    return {
        "precision": inside.any(dim=1).float().mean().item(),
        "recall": (between <= fake_radius.unsqueeze(1)).any(dim=0).float().mean().item(),
        "density": inside.sum().item() / (k * len(fake)),
        "coverage": inside.any(dim=0).float().mean().item(),
    }


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("block", [7, 128])
def test_all_four_are_those_of_all_distances_by_hand(monkeypatch, k, block):
    monkeypatch.setattr(precision_recall, "BLOCK", block)
    real, fake = features(20), features(17, seed=1, shift=0.5)
    expected = by_hand(real, fake, k)
    assert precision_recall_density_coverage(real, fake, k) == pytest.approx(expected, rel=1e-6)
    assert all(value > 0.0 for value in expected.values())


@pytest.mark.parametrize("theirs", [calculate_precision_recall_full, calculate_precision_recall_part])
def test_precision_and_recall_are_those_of_torch_fidelity(theirs):
    real, fake = features(150), features(120, seed=1, shift=0.4)
    ours = precision_recall_density_coverage(real, fake, 3)
    assert (ours["precision"], ours["recall"]) == pytest.approx(theirs(fake, real, 3), rel=1e-6)
    assert ours["precision"] != ours["recall"]


def test_exchanged_sets_exchange_precision_and_recall():
    real, fake = features(50), features(40, seed=1, shift=0.5)
    ours, other = (precision_recall_density_coverage(*pair, 3) for pair in ((real, fake), (fake, real)))
    assert (ours["precision"], ours["recall"]) == (other["recall"], other["precision"])


@pytest.mark.parametrize("shift", [0.0, 1e7])  # far from zero, too
def test_copies_of_the_real_images_lie_on_the_edges_of_the_balls(shift):
    real = features(40, shift=shift)
    scores = precision_recall_density_coverage(real, real.flip(0).clone(), 3)
    # Each ball holds its own image and three neighbours, the third on its edge.
    assert scores == {"precision": 1.0, "recall": 1.0, "density": 4 / 3, "coverage": 1.0}


def test_sets_far_apart_share_nothing():
    scores = precision_recall_density_coverage(features(20), features(20, seed=1, shift=100.0), 3)
    assert set(scores.values()) == {0.0}


def test_a_generator_of_one_real_image_is_precise_and_recalls_that_image():
    real = features(40, dim=33)
    scores = precision_recall_density_coverage(real, real[7:8].repeat(30, 1), 3)
    assert scores["precision"] == 1.0
    assert scores["recall"] == 1 / 40


def test_three_points_on_a_line_by_hand():
    real = torch.tensor([[0.0], [1.0], [3.0]]).double()  # radii 1, 1, 2
    fake = torch.tensor([[2.0], [5.0], [9.0], [9.5]]).double()  # radii 3, 3, 0.5, 0.5
    expected = {"precision": 2 / 4, "recall": 3 / 3, "density": 3 / 4, "coverage": 2 / 3}
    assert precision_recall_density_coverage(real, fake, 1) == expected


def test_the_measure_scores_the_features():
    real, fake = feature_set(features(30)), feature_set(features(25, seed=1))
    x, y = real.embedding.double(), fake.embedding.double()
    assert PrecisionRecall().compute(real, fake) == precision_recall_density_coverage(x, y, 5)
    assert PrecisionRecall(k=2).compute(real, fake) == precision_recall_density_coverage(x, y, 2)
    x, y = choose_rows(x, 12), choose_rows(y, 12)
    assert PrecisionRecall(max_samples=12).compute(real, fake) == precision_recall_density_coverage(x, y, 5)


@pytest.mark.parametrize("arguments", [{"k": 0}, {"k": 5, "max_samples": 5}])
def test_impossible_neighbours_are_refused(arguments):
    with pytest.raises(ValueError, match="1 <= k < max_samples"):
        PrecisionRecall(**arguments)


@pytest.mark.parametrize(("n", "m"), [(5, 9), (9, 5), (1, 1)])
def test_a_set_without_a_kth_neighbour_is_refused(n, m):
    with pytest.raises(ValueError, match=f"more than k=5 images, got {n} real and {m} generated"):
        PrecisionRecall().compute(feature_set(features(n)), feature_set(features(m)))
