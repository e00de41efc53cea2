import pytest
import torch

from lit_generative.gan.losses import Hinge
from lit_generative.tracebacks import causes, is_ours
from lit_generative.vae.distributions import normal_log_prob


def error_of(function, *arguments):
    with pytest.raises(Exception) as caught:  # noqa: PT011  any error will do
        function(*arguments)
    return caught.value


def test_an_error_of_our_code_is_ours_and_one_of_python_is_not():
    assert is_ours(error_of(Hinge, -1.0))
    assert not is_ours(error_of(int, "x"))


def test_an_error_of_torch_is_not_ours_though_our_line_met_it():
    error = error_of(normal_log_prob, torch.zeros(2), torch.zeros(3), torch.zeros(3))
    assert isinstance(error, RuntimeError)
    assert not is_ours(error)


def test_causes_are_followed_to_the_first():
    first, second, third = ValueError("1"), ValueError("2"), ValueError("3")
    third.__cause__, second.__context__ = second, first
    assert list(causes(third)) == [third, second, first]


def test_errors_that_name_each_other_are_told_once():
    first, second = ValueError("1"), ValueError("2")
    first.__context__, second.__context__ = second, first
    assert list(causes(second)) == [second, first]
