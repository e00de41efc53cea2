import pytest
import torch
from torchvision import datasets

from lit_generative.data.cifar10 import CIFAR10
from tests.generated import write_cifar10


@pytest.fixture
def written(tmp_path, monkeypatch):
    return write_cifar10(tmp_path, monkeypatch)


def test_images_and_labels_come_back_as_written(tmp_path, written):
    images, labels = written
    data = CIFAR10(str(tmp_path), val_fraction=0.0)
    data.prepare_data()
    data.setup("test")
    torch.testing.assert_close(data.splits.test.image, images["test_batch"])
    torch.testing.assert_close(data.splits.test.label, labels["test_batch"])
    torch.testing.assert_close(data.splits.train.image[8:12], images["data_batch_3"])
    torch.testing.assert_close(data.splits.train.label[8:12], labels["data_batch_3"])


def test_validation_images_come_from_the_training_images(tmp_path, written):
    data = CIFAR10(str(tmp_path), val_fraction=0.25)
    data.setup("test")
    assert [len(split) for split in data.splits] == [15, 5, 4]
    assert (data.sample_shape, data.num_classes) == ((3, 32, 32), 10)


@pytest.mark.parametrize(("download", "message"), [(True, "the download failed"), (False, "missing or damaged")])
def test_missing_files_are_an_error_that_says_where_to_put_them(tmp_path, monkeypatch, download, message):
    monkeypatch.setattr(datasets.CIFAR10, "url", f"file://{tmp_path}/nowhere.tar.gz")
    data = CIFAR10(str(tmp_path), download=download)
    with pytest.raises(ValueError, match=f"CIFAR10: .*{message}.*Unpack https.*cifar-10-batches-py"):
        data.prepare_data() or data.setup("test")
