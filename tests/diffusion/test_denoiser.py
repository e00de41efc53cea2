import pytest
import torch

from lit_generative.diffusion.denoiser import Denoiser
from lit_generative.diffusion.parameterizations import Epsilon, Parameterization, Velocity
from lit_generative.diffusion.schedules import CosineSchedule, LinearSchedule

PARAMETERIZATIONS = [cls for cls in Parameterization.__subclasses__() if cls.__module__.startswith("lit_generative.")]


class Table(torch.nn.Module):
    """Answers with a fixed tensor, and remembers what it was asked."""

    def __init__(self, answer: torch.Tensor) -> None:
        super().__init__()
        self.answer = answer
        self.question = None

    def forward(self, x_t, t, y=None):
        self.question = (x_t, t, y)
        return self.answer


def noisy(num: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.randn(2, num, 3, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64))


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("parameterization", [cls() for cls in PARAMETERIZATIONS], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("t", [0, 7, 49])
def test_image_and_noise_add_up_to_the_noisy_batch(parameterization, clip, t):
    schedule, (x_t, answer) = LinearSchedule(50, beta_end=0.2), noisy()
    x0, eps = Denoiser(Table(answer), schedule, parameterization, clip=clip)(x_t, t)
    alpha, sigma = schedule.alpha_sigma(torch.tensor(t))
    assert x0.shape == eps.shape == x_t.shape
    torch.testing.assert_close(alpha * x0 + sigma * eps, x_t)


def test_the_guess_is_clipped_unless_told_otherwise():
    schedule, (x_t, answer) = CosineSchedule(50), noisy()
    free, _ = Denoiser(Table(answer), schedule, Epsilon(), clip=False)(x_t, 40)
    clipped, _ = Denoiser(Table(answer), schedule, Epsilon())(x_t, 40)
    assert free.abs().max() > 1
    torch.testing.assert_close(clipped, free.clamp(-1, 1))


def test_a_perfect_prediction_gives_image_and_noise_back():
    schedule, (x0, eps) = CosineSchedule(50), noisy()
    alpha, sigma = schedule.alpha_sigma(torch.tensor(20))
    network = Table(Velocity().target(x0, eps, alpha, sigma))
    guess = Denoiser(network, schedule, Velocity(), clip=False)(alpha * x0 + sigma * eps, 20)
    # The network's answer is read in float32.
    torch.testing.assert_close(guess, (x0, eps), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("label", [None, [2, 0, 1, 2, 0]])
def test_the_network_gets_one_time_per_example_and_the_labels(label):
    y = None if label is None else torch.tensor(label)
    (x_t, answer), schedule = noisy(), CosineSchedule(50)
    network = Table(answer)
    Denoiser(network, schedule, Epsilon(), y)(x_t, 33)
    asked_x_t, asked_t, asked_y = network.question
    assert asked_x_t is x_t
    assert asked_y is y
    assert asked_t.dtype == torch.int64
    assert asked_t.tolist() == [33] * 5


def test_a_bf16_answer_gives_a_float32_guess():
    x_t, answer = (value.float() for value in noisy())
    guess = Denoiser(Table(answer.bfloat16()), CosineSchedule(50), Velocity())(x_t, 20)
    assert [value.dtype for value in guess] == [torch.float32, torch.float32]
