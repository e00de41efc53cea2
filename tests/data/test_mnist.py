import hashlib
import threading
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler

import pytest
import torch
from torchvision import datasets

from lit_generative.data.mnist import FILES, MNIST, FashionMNIST
from tests.generated import idx, write_mnist


@pytest.fixture
def server(tmp_path):
    """A folder, and the address at which it is served."""
    folder = tmp_path / "server"
    http_server = HTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(folder)))
    threading.Thread(target=partial(http_server.serve_forever, poll_interval=0.01), daemon=True).start()
    yield folder, f"http://127.0.0.1:{http_server.server_port}/"
    http_server.shutdown()
    http_server.server_close()


@pytest.mark.parametrize("compress", [False, True])
def test_files_in_the_folder_itself_are_read(tmp_path, compress):
    train_images, train_labels, test_images, test_labels = write_mnist(tmp_path, compress=compress)
    data = MNIST(str(tmp_path), val_fraction=0.0)
    data.prepare_data()
    data.setup("test")
    torch.testing.assert_close(data.splits.train.image.squeeze(1), train_images)
    torch.testing.assert_close(data.splits.train.label, train_labels.long())
    torch.testing.assert_close(data.splits.test.image.squeeze(1), test_images)
    torch.testing.assert_close(data.splits.test.label, test_labels.long())


def test_validation_images_come_from_the_training_images(tmp_path):
    write_mnist(tmp_path)
    data = MNIST(str(tmp_path), val_fraction=0.2, image_size=32)
    data.setup("test")
    assert [len(split) for split in data.splits] == [16, 4, 5]
    assert data.sample_shape == data.splits.val.image.shape[1:] == (1, 32, 32)
    assert data.num_classes == 10


def test_each_set_reads_the_files_that_torchvision_put_into_its_own_folder(tmp_path):
    digits = write_mnist(tmp_path / "MNIST" / "raw", 20)
    clothes = write_mnist(tmp_path / "FashionMNIST" / "raw", 30)
    for cls, written in ((MNIST, digits), (FashionMNIST, clothes)):
        data = cls(str(tmp_path), val_fraction=0.0)
        data.prepare_data()
        data.setup("test")
        torch.testing.assert_close(data.splits.train.image.squeeze(1), written[0])


@pytest.mark.parametrize("cls", [MNIST, FashionMNIST])
def test_missing_files_are_downloaded(tmp_path, monkeypatch, server, cls):
    source, address = server
    written = write_mnist(source, compress=True)
    torchvision_cls = getattr(datasets, cls.__name__)
    checksums = [(f"{name}.gz", hashlib.md5((source / f"{name}.gz").read_bytes()).hexdigest()) for name in FILES]
    monkeypatch.setattr(torchvision_cls, "mirrors", [address])
    monkeypatch.setattr(torchvision_cls, "resources", checksums)
    data = cls(str(tmp_path / "data"), val_fraction=0.0)
    data.prepare_data()
    data.setup("test")
    torch.testing.assert_close(data.splits.train.image.squeeze(1), written[0])


def test_a_failed_download_says_where_to_put_the_files(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.MNIST, "mirrors", [f"file://{tmp_path}/nowhere/"])
    with pytest.raises(
        ValueError, match=r"MNIST: the download failed.*put the files train-images-idx3-ubyte"
    ) as caught:
        MNIST(str(tmp_path / "data")).prepare_data()
    assert str(tmp_path / "data") in str(caught.value)


def test_without_download_missing_files_are_an_error_that_names_the_folder(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / FILES[3]).unlink()
    data = MNIST(str(tmp_path), download=False)
    data.prepare_data()
    with pytest.raises(ValueError, match=r"MNIST: put the files .* Not all four are there") as caught:
        data.setup("test")
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("number", "values", "message"),
    [
        (0, torch.zeros(20, 32, 32, dtype=torch.uint8), "images of 28 x 28"),
        (1, torch.zeros(19, dtype=torch.uint8), "20 labels"),
        (1, torch.full((20,), 10, dtype=torch.uint8), "labels 0 to 9"),
    ],
)
def test_files_that_hold_something_else_are_named(tmp_path, number, values, message):
    write_mnist(tmp_path)
    (tmp_path / FILES[number]).write_bytes(idx(values))
    with pytest.raises(ValueError, match=f"{FILES[number]} must hold {message}"):
        MNIST(str(tmp_path)).setup("test")
