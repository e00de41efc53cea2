import torch

from lit_generative.finetune.caches import RowCache, content_keys


class Squares:
    """Squares of numbers, and which were asked for."""

    def __init__(self, numbers):
        self.numbers, self.asked = numbers, []

    def __call__(self, rows):
        values = torch.tensor([self.numbers[i] for i in rows], dtype=torch.float32)
        self.asked += values.tolist()
        return values.square()[:, None], -values


def test_each_row_is_computed_once_and_given_in_order():
    cache, squares = RowCache(), Squares([3, 2, 3])
    first, second = cache.rows(["c", "b", "c"], squares, "cpu")
    assert first.tolist() == [[9], [4], [9]]
    assert second.tolist() == [-3, -2, -3]
    assert sorted(squares.asked) == [2, 3]
    again = Squares([1, 3, 2])
    assert cache.rows(["a", "c", "b"], again, "cpu")[1].tolist() == [-1, -3, -2]
    assert again.asked == [1]
    assert len(cache) == 3


def test_it_is_useless_if_nothing_comes_back_in_an_epoch_that_found_it_filled():
    cache = RowCache()
    cache.start_epoch()
    cache.rows(["a"], Squares([1]), "cpu")
    assert not cache.useless
    cache.start_epoch()
    cache.rows(["b"], Squares([2]), "cpu")
    assert cache.useless
    cache.rows(["b", "c"], Squares([2, 3]), "cpu")
    assert not cache.useless
    cache.clear()
    assert len(cache) == 0


def test_what_is_given_is_not_what_is_kept():
    cache = RowCache()
    cache.rows(["a"], Squares([2]), "cpu")[0].zero_()
    assert cache.rows(["a"], Squares([2]), "cpu")[0].tolist() == [[4]]


def test_keys_depend_on_values_shape_and_type():
    x = torch.randn(2, 3, 4)
    keys = content_keys(torch.cat([x, x[:1], x[:1] + 1e-6]))
    assert keys[0] == keys[2]
    assert len(set(keys)) == 3
    assert content_keys(x.transpose(1, 2).contiguous().reshape(2, 3, 4)) != content_keys(x)
    assert content_keys(torch.zeros(1, 2, 3)) != content_keys(torch.zeros(1, 3, 2))
    assert content_keys(torch.zeros(1, 2)) != content_keys(torch.zeros(1, 2, dtype=torch.int32))
    assert content_keys(x.bfloat16()[:, :, 0]) != content_keys(x[:, :, 0])
