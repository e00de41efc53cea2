import gzip
import struct

import pytest
import torch

from lit_generative.data.idx import find_idx, read_idx


def idx(values: torch.Tensor) -> bytes:
    return struct.pack(f">4B{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.numpy().tobytes()


VALUES = torch.arange(24, dtype=torch.uint8).reshape(2, 3, 4)


@pytest.mark.parametrize("name", ["a", "a.gz"])
def test_values_come_back_as_written(tmp_path, name):
    data = idx(VALUES)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    torch.testing.assert_close(read_idx(find_idx(tmp_path, "a")), VALUES)


def test_a_file_that_is_not_there_is_not_found(tmp_path):
    (tmp_path / "a").mkdir()
    assert find_idx(tmp_path, "a") is None


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a", b"", "got nothing"),
        ("a", b"\x89PNG", "got 89 50 4e 47"),
        ("a", b"\0\0\x0d\1" + b"\0" * 8, "got 00 00 0d 01"),  # floats
        ("a", idx(VALUES)[:9], "cut off within its header of 16 bytes"),
        ("a", idx(VALUES)[:-1], r"must hold 24 values for its shape \(2, 3, 4\), got 23"),
        ("a", idx(VALUES) + b"\0", "got 25"),
        ("a.gz", gzip.compress(idx(VALUES), mtime=0)[:-9], "no complete gzip file"),
        ("a.gz", idx(VALUES), "no complete gzip file"),
        ("a.gz", gzip.compress(idx(VALUES), mtime=0)[:10] + b"\xff" * 30, "no complete gzip file"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        read_idx(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
