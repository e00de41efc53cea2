import pytest
import torch

from lit_generative.data.splits import check_fraction, split_indices


def test_a_split_takes_its_fraction_and_leaves_the_rest():
    rest, taken = split_indices(1000, 0.15, seed=0, part="val")
    assert len(taken) == 150
    assert sorted(rest.tolist() + taken.tolist()) == list(range(1000))


def test_a_split_is_the_same_for_ever():
    assert split_indices(10, 0.3, seed=0, part="val")[1].tolist() == [2, 3, 8]


def test_a_split_depends_on_its_seed_and_its_part_and_not_on_the_global_seed():
    torch.manual_seed(1)
    first = split_indices(100, 0.5, seed=0, part="val")[1].tolist()
    torch.manual_seed(2)
    assert first == split_indices(100, 0.5, seed=0, part="val")[1].tolist()
    assert first != split_indices(100, 0.5, seed=1, part="val")[1].tolist()
    assert first != split_indices(100, 0.5, seed=0, part="test")[1].tolist()


def test_a_fraction_of_zero_takes_nothing():
    rest, taken = split_indices(5, 0.0, seed=0, part="val")
    assert rest.tolist() == [0, 1, 2, 3, 4]
    assert (taken.shape, taken.dtype) == ((0,), torch.int64)


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_a_fraction_that_leaves_nothing_is_refused(fraction):
    with pytest.raises(ValueError, match="Digits: val_fraction must be at least 0 and below 1"):
        check_fraction("Digits", "val_fraction", fraction)
