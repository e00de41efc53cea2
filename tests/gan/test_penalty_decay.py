import pytest
import torch

from lit_generative.gan.penalties import R1
from lit_generative.gan.penalty_decay import Decaying
from tests import tiny


def test_the_strength_falls_exponentially_and_then_stays():
    decaying = Decaying(R1(gamma=2.0), final_share=0.01, total_steps=100)
    assert [decaying.share(step) for step in (0, 50, 100, 500)] == pytest.approx([1.0, 0.1, 0.01, 0.01])


def test_it_is_the_penalty_that_it_holds():
    inner = R1(gamma=2.0, every_n_steps=4)
    decaying = Decaying(inner, 0.1, 10)
    assert decaying.name == "r1"
    assert [decaying.due(step) for step in range(5)] == [inner.due(step) for step in range(5)]
    x = torch.randn(3, 2)
    weight = torch.randn(2)
    both = [penalty.compute(lambda points: (points @ weight).square(), x, x) for penalty in (inner, decaying)]
    torch.testing.assert_close(*both)


def test_two_decays_multiply():
    inner = Decaying(R1(gamma=1.0), 0.1, 10)
    assert Decaying(inner, 0.1, 10).share(10) == pytest.approx(0.01)


def test_a_gan_is_penalized_by_what_is_left(tmp_path):
    module = tiny.gan(penalties=[Decaying(R1(gamma=1.0), 0.5, 2)])
    module.trainer = tiny.trainer(tmp_path)
    x = torch.randn(4, 2)
    whole, left = (module._penalties(update, x, x, None)["r1"] for update in (0, 2))
    torch.testing.assert_close(left, 0.5 * whole)
    assert (whole > 0).all()


@pytest.mark.parametrize(
    ("share", "steps", "message"),
    [(0.0, 1, "final_share must lie between"), (1.0, 1, "final_share must lie"), (0.5, 0, "total_steps must be at")],
)
def test_numbers_out_of_range_are_refused(share, steps, message):
    with pytest.raises(ValueError, match=message):
        Decaying(R1(gamma=1.0), share, steps)
