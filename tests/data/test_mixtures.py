import math

import pytest
import torch

from lit_generative.data.mixtures import GridMixture, RingMixture

MIXTURES = [RingMixture, GridMixture]


def test_the_centers_of_a_ring_lie_on_the_circle_at_equal_distances():
    centers = RingMixture(num_modes=5, radius=0.7).centers
    assert centers.shape == (5, 2)
    torch.testing.assert_close(centers.norm(dim=1), torch.full((5,), 0.7))
    side = 2 * 0.7 * math.sin(math.pi / 5)
    torch.testing.assert_close((centers - centers.roll(1, 0)).norm(dim=1), torch.full((5,), side))
    torch.testing.assert_close(centers[0], torch.tensor([0.7, 0.0]))


def test_the_centers_of_a_grid_lie_around_the_origin():
    centers = GridMixture(side=3, spacing=0.4).centers
    expected = [(x, y) for x in (-0.4, 0.0, 0.4) for y in (-0.4, 0.0, 0.4)]
    torch.testing.assert_close(centers, torch.tensor(expected))


@pytest.mark.parametrize("mixture", MIXTURES)
def test_points_lie_around_the_center_their_label_names(mixture):
    data = mixture(std=0.02)
    data.setup()
    points = torch.cat([split.image for split in data.splits])
    labels = torch.cat([split.label for split in data.splits])
    assert (points.dtype, labels.dtype, len(points)) == (torch.float32, torch.int64, 20_000)
    offsets = points - data.centers[labels]
    torch.testing.assert_close(offsets.std(dim=0), torch.full((2,), 0.02), rtol=0.03, atol=0)
    torch.testing.assert_close(offsets.mean(dim=0), torch.zeros(2), rtol=0, atol=0.001)
    shares = labels.bincount() / len(labels)
    torch.testing.assert_close(shares, torch.full_like(shares, 1 / data.num_classes), rtol=0.15, atol=0)


@pytest.mark.parametrize("mixture", MIXTURES)
def test_points_lie_in_about_minus_one_to_one(mixture):
    data = mixture()
    data.setup()
    assert 0.99 < data.splits.train.image.abs().max() < 1.1


def test_points_depend_on_the_split_seed_and_not_on_the_global_seed():
    drawn = []
    for global_seed, split_seed in ((1, 0), (2, 0), (1, 3)):
        torch.manual_seed(global_seed)
        data = RingMixture(num_samples=100, split_seed=split_seed, val_fraction=0.0, test_fraction=0.0)
        data.setup()
        drawn.append(data.splits.train.image)
    torch.testing.assert_close(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_the_splits_have_their_sizes_and_share_no_point():
    data = GridMixture(num_samples=200, test_fraction=0.2, val_fraction=0.25)
    data.setup()
    assert [len(split) for split in data.splits] == [120, 40, 40]
    assert len(torch.cat([split.image for split in data.splits]).unique(dim=0)) == 200


def test_mixtures_describe_themselves():
    assert (GridMixture().sample_shape, GridMixture().num_classes, RingMixture().num_classes) == ((2,), 25, 8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RingMixture(num_modes=0), "RingMixture: num_modes must be at least 1, got 0"),
        (lambda: RingMixture(radius=0.0), "RingMixture: radius must be positive, got 0.0"),
        (lambda: GridMixture(side=0), "GridMixture: side must be at least 1, got 0"),
        (lambda: GridMixture(spacing=-1.0), "GridMixture: spacing must be positive, got -1.0"),
        (lambda: RingMixture(std=-0.1), "RingMixture: std must not be negative, got -0.1"),
        (lambda: RingMixture(num_samples=0), "RingMixture: num_samples must be at least 1, got 0"),
        (lambda: RingMixture(test_fraction=1.0), "RingMixture: test_fraction must be"),
    ],
)
def test_an_argument_out_of_range_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
