import pytest
import torch
from sklearn.datasets import load_digits

from lit_generative.data.digits import Digits


def test_grey_levels_span_the_bytes():
    data = Digits(val_fraction=0.0, test_fraction=0.0)
    data.setup()
    levels = torch.from_numpy(load_digits().images)
    torch.testing.assert_close(
        data.splits.train.image.squeeze(1).double() * 16 / 255, levels, rtol=0, atol=0.5 * 16 / 255 + 1e-9
    )
    assert data.splits.train.image.unique().tolist()[:3] == [0, 16, 32]
    assert data.splits.train.image.max() == 255


def test_there_are_1797_digits_in_three_splits():
    data = Digits(val_fraction=0.2, test_fraction=0.1)
    data.setup()
    assert [len(split) for split in data.splits] == [1294, 323, 180]
    together = torch.cat([split.label for split in data.splits])
    torch.testing.assert_close(together.bincount(), torch.from_numpy(load_digits().target).bincount())


def test_digits_describe_themselves():
    data = Digits(image_size=16)
    data.setup()
    assert (data.sample_shape, data.num_classes) == ((1, 16, 16), 10)
    assert data.splits.test.image.shape == (180, 1, 16, 16)


def test_a_test_fraction_of_one_is_refused():
    with pytest.raises(ValueError, match="Digits: test_fraction must be at least 0 and below 1, got 1"):
        Digits(test_fraction=1)


def test_one_digit_alone_can_be_asked_for():
    data = Digits(digit=3, batch_size=8)
    data.setup("fit")
    data.setup("test")
    everything = Digits(batch_size=8)
    everything.setup("test")
    assert 150 < sum(data.num_examples(split) for split in ("train", "val", "test")) < 200
    assert set(next(iter(data.train_dataloader()))["label"].tolist()) == {3}
    assert data.num_examples("test") < everything.num_examples("test")
    assert data.num_classes == 10


def test_a_digit_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=r"digit must be one of 0\.\.9, got 10"):
        Digits(digit=10)
