import pytest
import torch

from lit_generative.training.examples import training_images
from tests import tiny


def test_training_images_are_spread_over_the_set_and_at_most_all_of_it(tmp_path):
    data, run = tiny.digits(), tiny.trainer(tmp_path)
    data.setup("fit")
    run.datamodule = data
    total = data.num_examples("train")
    images = training_images(run, 3, "A test")
    expected = data.examples("train", torch.tensor([0, round((total - 1) / 2), total - 1]))
    torch.testing.assert_close(images, expected.float() / 127.5 - 1)
    assert len(training_images(run, total + 5, "A test")) == total


def test_data_without_single_images_is_refused(tmp_path):
    run = tiny.trainer(tmp_path)
    with pytest.raises(ValueError, match="A test needs single training images, which a plain DataLoader does not give"):
        training_images(run, 3, "A test")
    run.datamodule = tiny.ring()
    with pytest.raises(ValueError, match="A test needs single training images, which RingMixture does not give"):
        training_images(run, 3, "A test")
