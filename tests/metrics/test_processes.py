"""One process; ``test_two_processes.py`` holds what takes two."""

import pytest
import torch

from lit_generative.metrics import processes


def test_one_process_has_nothing_to_tell():
    x = torch.arange(6.0).view(3, 2)
    assert (processes.num_processes(), processes.process_index()) == (1, 0)
    assert torch.equal(processes.sum_over_processes(x), x)
    assert torch.equal(processes.gather_rows(x), x)
    assert processes.on_first_process(lambda: {"fid": 1.5}) == {"fid": 1.5}


def test_an_error_of_one_process_is_its_own():
    def fail():
        raise KeyError("no such image")

    with pytest.raises(KeyError, match="no such image"):
        processes.on_first_process(fail)
    with pytest.raises(KeyError, match="no such image"), processes.raise_together():
        fail()


class LockedError(Exception):
    """Cannot be copied to another process."""

    def __init__(self, place: int, text: str) -> None:
        super().__init__(f"{text} at {place}")


def test_an_error_that_cannot_be_copied_is_told_in_words():
    plain = ValueError("too few images")
    assert processes._sendable(plain) is plain
    told = processes._sendable(LockedError(3, "stuck"))
    assert type(told) is RuntimeError
    assert str(told) == "LockedError: stuck at 3"
