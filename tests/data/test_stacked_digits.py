import pytest
import torch
from sklearn.datasets import load_digits

from lit_generative.data.digits import Digits
from lit_generative.data.stacked_digits import StackedDigits


def splits(**options):
    data = StackedDigits(**({"num_samples": 500} | options))
    data.setup()
    return data.splits


def test_each_channel_is_a_digit_and_the_class_is_the_number_they_spell():
    everything = Digits(val_fraction=0.0, test_fraction=0.0).load_splits().train
    known = {
        bytes(image.flatten().tolist()): int(y) for image, y in zip(everything.image, everything.label, strict=True)
    }
    assert len(known) == len(load_digits().target)
    for split in splits():
        for image, label in zip(split.image, split.label.tolist(), strict=True):
            red, green, blue = (known[bytes(channel.flatten().tolist())] for channel in image)
            assert label == 100 * red + 10 * green + blue


def test_the_parts_have_their_sizes_and_all_thousand_classes_are_drawn():
    parts = splits(num_samples=20_000, test_fraction=0.2, val_fraction=0.25)
    assert [len(part) for part in parts] == [12_000, 4_000, 4_000]
    assert parts.train.label.bincount(minlength=1000).min() > 0


def test_digits_of_the_test_part_are_in_no_other():
    rows = [{bytes(c.flatten().tolist()) for image in part.image for c in image} for part in splits(num_samples=3000)]
    assert not rows[2] & (rows[0] | rows[1])


def test_the_triples_depend_on_the_split_seed_only():
    torch.manual_seed(1)
    first = splits().train.image
    torch.manual_seed(2)
    torch.testing.assert_close(splits().train.image, first, rtol=0, atol=0)
    assert not torch.equal(splits(split_seed=1).train.image, first)


def test_it_describes_itself():
    data = StackedDigits(num_samples=200, image_size=16, resize="stretch")
    data.setup()
    assert (data.sample_shape, data.num_classes) == ((3, 16, 16), 1000)
    assert data.splits.train.image.shape[1:] == (3, 16, 16)
    assert len(splits(test_fraction=0.0).test) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "StackedDigits: num_samples must be at least 1, got 0"),
        ({"test_fraction": 1.0}, "StackedDigits: test_fraction must be at least 0 and below 1, got 1"),
        ({"test_fraction": 1e-4, "num_samples": 20_000}, "leaves no digit for 2 triples of the test part. Set it to 0"),
    ],
)
def test_bad_numbers_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        splits(**options)
