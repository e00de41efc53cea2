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
    x0, eps = Denoiser(Table(answer), schedule, parameterization, clip=clip)(x_t, schedule.level(t))[:2]
    _, alpha, sigma = schedule.level(t)
    assert x0.shape == eps.shape == x_t.shape
    torch.testing.assert_close(alpha * x0 + sigma * eps, x_t)


def test_the_guess_is_clipped_unless_told_otherwise():
    schedule, (x_t, answer) = CosineSchedule(50), noisy()
    free, _ = Denoiser(Table(answer), schedule, Epsilon(), clip=False)(x_t, schedule.level(40))[:2]
    clipped, _ = Denoiser(Table(answer), schedule, Epsilon())(x_t, schedule.level(40))[:2]
    assert free.abs().max() > 1
    torch.testing.assert_close(clipped, free.clamp(-1, 1))


def test_a_perfect_prediction_gives_image_and_noise_back():
    schedule, (x0, eps) = CosineSchedule(50), noisy()
    alpha, sigma = schedule.alpha_sigma(torch.tensor(20))
    network = Table(Velocity().target(x0, eps, alpha, sigma))
    guess = Denoiser(network, schedule, Velocity(), clip=False)(alpha * x0 + sigma * eps, schedule.level(20))[:2]
    # The network's answer is read in float32.
    torch.testing.assert_close(guess, (x0, eps), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("label", [None, [2, 0, 1, 2, 0]])
def test_the_network_gets_one_time_per_example_and_the_labels(label):
    y = None if label is None else torch.tensor(label)
    (x_t, answer), schedule = noisy(), CosineSchedule(50)
    network = Table(answer)
    Denoiser(network, schedule, Epsilon(), y)(x_t, schedule.level(33))
    asked_x_t, asked_t, asked_y = network.question
    assert asked_x_t is x_t
    assert asked_y is y
    assert asked_t.dtype == torch.int64
    assert asked_t.tolist() == [33] * 5


def test_a_bf16_answer_gives_a_float32_guess():
    x_t, answer = (value.float() for value in noisy())
    guess = Denoiser(Table(answer.bfloat16()), CosineSchedule(50), Velocity())(x_t, CosineSchedule(50).level(20))[:2]
    assert [value.dtype for value in guess] == [torch.float32, torch.float32]


class Echo(torch.nn.Module):
    """Answers with a share of what it saw of ``x_t``, and keeps all that it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = []

    def forward(self, x_t, t, y=None):
        self.seen.append(x_t)
        return 0.1 * x_t[:, :3]


def conditioned(**options) -> Denoiser:
    return Denoiser(Echo(), CosineSchedule(50), Velocity(), **options)


def test_a_condition_is_seen_beside_the_noisy_batch():
    x_t, other = noisy()
    denoise = conditioned(condition=other[:, :2])
    guess = denoise(x_t, denoise.schedule.level(20))
    torch.testing.assert_close(denoise.network.seen[0], torch.cat([x_t, other[:, :2]], dim=1))
    assert guess.x0.shape == x_t.shape


def test_self_conditioning_shows_the_last_guess_and_at_first_zeros():
    x_t, _ = noisy()
    denoise = conditioned(self_conditioning=True)
    first = denoise(x_t, denoise.schedule.level(40))
    denoise(x_t, denoise.schedule.level(20))
    shown = [seen[:, 3:] for seen in denoise.network.seen]
    torch.testing.assert_close(shown, [torch.zeros_like(x_t), first.x0])


def test_in_training_half_of_the_calls_see_a_first_guess_through_which_no_gradient_goes():
    x_t, _ = noisy()
    t = torch.tensor([3, 20, 40, 45, 49])
    calls = []
    torch.manual_seed(0)
    for _ in range(40):
        denoise = conditioned(self_conditioning=True)
        denoise.predict(x_t.requires_grad_(), t)
        calls.append(len(denoise.network.seen))
        shown = denoise.network.seen[-1][:, 3:]
        if calls[-1] == 1:
            assert (shown == 0).all()
            continue
        alpha, sigma = (v.reshape(5, 1, 1, 1) for v in denoise.schedule.alpha_sigma(t))
        torch.testing.assert_close(shown, (alpha * x_t - sigma * 0.1 * x_t).clamp(-1, 1), rtol=1e-5, atol=1e-5)
        assert torch.autograd.grad(shown.sum(), x_t, allow_unused=True)[0].abs().sum() == 0
    assert 10 < calls.count(1) < 30
    assert set(calls) == {1, 2}


def test_a_prediction_for_a_loss_is_the_networks_own():
    (x_t, _), t = noisy(), torch.tensor([3, 20, 40, 45, 49])
    denoise = conditioned()
    output, variance = denoise.predict(x_t, t)
    torch.testing.assert_close(output, 0.1 * x_t)
    assert variance is None
    table = Table(torch.cat([x_t, 2 * x_t], dim=1))
    output, variance = Denoiser(table, CosineSchedule(50), Velocity()).predict(x_t, t)
    torch.testing.assert_close((output, variance), (x_t, 2 * x_t))
