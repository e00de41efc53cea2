import pytest
import torch

from lit_generative.diffusion.parameterizations import Epsilon, Parameterization, Velocity

PARAMETERIZATIONS = [cls for cls in Parameterization.__subclasses__() if cls.__module__.startswith("lit_generative.")]


@pytest.mark.parametrize("parameterization", [cls() for cls in PARAMETERIZATIONS], ids=lambda p: type(p).__name__)
def test_the_target_means_the_image_it_was_made_from(parameterization):
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 5, 3, 2, 4, generator=generator, dtype=torch.float64)
    angle = torch.tensor([0.01, 0.4, 0.8, 1.2, 1.5], dtype=torch.float64).reshape(5, 1, 1, 1)
    alpha, sigma = angle.cos(), angle.sin()
    target = parameterization.target(x0, eps, alpha, sigma)
    assert target.shape == x0.shape
    torch.testing.assert_close(parameterization.to_x0(target, alpha * x0 + sigma * eps, alpha, sigma), x0)


def test_epsilon_by_hand():
    x0, eps, alpha, sigma = (torch.tensor([value]) for value in (2.0, -1.0, 0.8, 0.6))
    torch.testing.assert_close(Epsilon().target(x0, eps, alpha, sigma), eps)
    # x_t = 0.8 * 2 - 0.6 * 1 = 1; a guessed noise of 0.5 leaves (1 - 0.6 * 0.5) / 0.8
    torch.testing.assert_close(Epsilon().to_x0(torch.tensor([0.5]), torch.tensor([1.0]), alpha, sigma), x0 * 0.4375)


def test_velocity_by_hand():
    x0, eps, alpha, sigma = (torch.tensor([value]) for value in (2.0, -1.0, 0.8, 0.6))
    torch.testing.assert_close(Velocity().target(x0, eps, alpha, sigma), torch.tensor([0.8 * -1 - 0.6 * 2]))
    guess = Velocity().to_x0(torch.tensor([0.5]), torch.tensor([1.0]), alpha, sigma)
    torch.testing.assert_close(guess, torch.tensor([0.8 * 1 - 0.6 * 0.5]))


def test_velocity_agrees_with_diffusers():
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler()
    x0, eps = torch.randn(2, 5, 3, 2, 4, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 10, 200, 700, 999])
    alpha, sigma = (
        v.reshape(5, 1, 1, 1) for v in (scheduler.alphas_cumprod[t].sqrt(), (1 - scheduler.alphas_cumprod[t]).sqrt())
    )
    torch.testing.assert_close(Velocity().target(x0, eps, alpha, sigma), scheduler.get_velocity(x0, eps, t))
