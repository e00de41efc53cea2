"""Small files in the formats of real data sets."""

from __future__ import annotations

import gzip
import pickle
import struct
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchvision import datasets

from lit_generative.data.mnist import FILES


def idx(values: Tensor) -> bytes:
    """``values``, uint8, as an idx file."""
    return struct.pack(f">4B{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.numpy().tobytes()


def write_mnist(folder: Path, num_train: int = 20, num_test: int = 5, compress: bool = False) -> list[Tensor]:
    """The four files of MNIST or Fashion-MNIST; returns what they hold, in the order of ``FILES``."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(num_train)
    written = []
    for name, num in zip(FILES, (num_train, num_train, num_test, num_test), strict=True):
        shape, top = ((num, 28, 28), 256) if "images" in name else ((num,), 10)
        written.append(torch.randint(top, shape, dtype=torch.uint8, generator=generator))
        data = idx(written[-1])
        (folder / (name + ".gz" * compress)).write_bytes(gzip.compress(data) if compress else data)
    return written


def write_cifar10(
    root: Path, monkeypatch: pytest.MonkeyPatch, num: int = 4
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """``num`` images a file in torchvision's format, whose checksums are not looked at; returns images and labels."""
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: True)
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(i) for i in range(10)]}))
    images, labels = {}, {}
    for seed, (name, _) in enumerate(datasets.CIFAR10.train_list + datasets.CIFAR10.test_list):
        generator = torch.Generator().manual_seed(seed)
        images[name] = torch.randint(256, (num, 3, 32, 32), dtype=torch.uint8, generator=generator)
        labels[name] = torch.randint(10, (num,), generator=generator)
        content = {"data": images[name].flatten(1).numpy(), "labels": labels[name].tolist()}
        (folder / name).write_bytes(pickle.dumps(content))
    return images, labels
