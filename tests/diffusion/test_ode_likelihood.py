"""The ODE gives densities that are known: of a Gaussian, of a mixture, of images."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from lit_generative.diffusion.continuous import CosineLogSNR, EDMSchedule, LinearLogSNR, RectifiedFlow
from lit_generative.diffusion.denoiser import Denoiser
from lit_generative.diffusion.ode_likelihood import ode_log_likelihood
from lit_generative.diffusion.parameterizations import CleanImage, Epsilon
from lit_generative.diffusion.schedules import CosineSchedule, LinearSchedule, NoiseSchedule
from lit_generative.diffusion.spacings import Spacing
from lit_generative.networks.mlp import MLPDenoiser
from lit_generative.tensor_ops import sample_generators

F64 = torch.float64


class Mixture(nn.Module):
    """The best guess of points ``(N, D)`` from a mixture of Gaussians."""

    def __init__(self, schedule: NoiseSchedule, means: list[list[float]], stds: list[list[float]]) -> None:
        super().__init__()
        self.schedule = schedule
        self.means, self.stds = (torch.tensor(v, dtype=F64) for v in (means, stds))
        self.weights = torch.arange(1.0, len(means) + 1, dtype=F64) / sum(range(1, len(means) + 1))

    def density(self, noise: float = 0.0) -> MixtureSameFamily:
        stds = (self.stds.square() + noise**2).sqrt()
        return MixtureSameFamily(Categorical(self.weights), Independent(Normal(self.means, stds), 1))

    def forward(self, x_t, t, y=None):
        _, alpha, sigma = self.schedule.level(t[0].item())
        variances = alpha**2 * self.stds.square() + sigma**2
        parts = Independent(Normal(alpha * self.means, variances.sqrt()), 1).log_prob(x_t[:, None])
        shares = (self.weights.log() + parts).softmax(dim=1)[..., None]
        guesses = self.means + alpha * self.stds.square() / variances * (x_t[:, None] - alpha * self.means)
        return (shares * guesses).sum(dim=1)


class GaussianImages(nn.Module):
    """The best guess of images of independent pixels from ``N(0.2, std**2)``, as noise."""

    def __init__(self, schedule: NoiseSchedule, std: float) -> None:
        super().__init__()
        self.schedule, self.std = schedule, nn.Parameter(torch.tensor(std))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x_t, t, y=None):
        _, alpha, sigma = self.schedule.level(t[0].item())
        eps = sigma * (x_t - alpha * 0.2) / (alpha**2 * self.std**2 + sigma**2)
        return self.dropout(eps)


def gaussian(schedule: NoiseSchedule) -> tuple[Denoiser, Mixture]:
    network = Mixture(schedule, [[0.3, -0.8]], [[0.5, 1.5]])
    return Denoiser(network, schedule, CleanImage(), clip=False), network


def mixture(schedule: NoiseSchedule) -> tuple[Denoiser, Mixture]:
    network = Mixture(schedule, [[1.0, 0.0], [-0.5, 0.8], [-0.5, -0.9]], [[0.2, 0.3], [0.3, 0.25], [0.4, 0.2]])
    return Denoiser(network, schedule, CleanImage(), clip=False), network


def images(schedule: NoiseSchedule, std: float = 0.5) -> Denoiser:
    return Denoiser(GaussianImages(schedule, std), schedule, Epsilon(), clip=False)


def points(num: int = 12) -> torch.Tensor:
    return torch.randn(num, 2, generator=torch.Generator().manual_seed(0), dtype=F64)


def least_noise(schedule: NoiseSchedule) -> float:
    _, alpha, sigma = schedule.level(schedule.even_times(2)[-1])
    return sigma / alpha


def pixels(num: int = 4) -> torch.Tensor:
    return 0.5 * torch.randn(num, 3, 2, 5, generator=torch.Generator().manual_seed(0))


# ---- known densities


@pytest.mark.parametrize(
    "schedule",
    [
        LinearSchedule(1000),
        CosineSchedule(1000),
        CosineLogSNR(),
        LinearLogSNR(log_snr_min=-14.0),
        RectifiedFlow(),
        EDMSchedule(sigma_max=500.0),
    ],
    ids=lambda schedule: type(schedule).__name__,
)
@pytest.mark.parametrize("make", [gaussian, mixture])
def test_the_log_density_is_the_analytic_one_whatever_the_schedule(make, schedule):
    denoise, network = make(schedule)
    found = ode_log_likelihood(denoise, points(), 200, num_probes=2, exact_divergence=True)
    expected = network.density(least_noise(schedule)).log_prob(points())
    torch.testing.assert_close(found.log_prob, expected, rtol=0, atol=0.03)
    assert found.standard_error.tolist() == [0.0] * 12


def test_the_error_falls_with_the_square_of_the_distance_between_levels():
    schedule = RectifiedFlow()
    denoise, network = mixture(schedule)
    expected = network.density(least_noise(schedule)).log_prob(points())
    errors = [
        (ode_log_likelihood(denoise, points(), n, exact_divergence=True).log_prob - expected).mean().item()
        for n in (40, 80, 160)
    ]
    assert errors[0] / errors[1] == pytest.approx(4, abs=0.4)
    assert errors[1] / errors[2] == pytest.approx(4, abs=0.4)


def test_images_have_the_density_of_their_pixels_in_float32():
    schedule = CosineSchedule(1000)
    found = ode_log_likelihood(images(schedule), pixels(), 300)
    std = math.hypot(0.5, least_noise(schedule))
    expected = Normal(0.2, std).log_prob(pixels()).sum(dim=(1, 2, 3))
    assert found.log_prob.dtype == torch.float32
    torch.testing.assert_close(found.log_prob, expected, rtol=0, atol=0.02)


def test_a_single_number_has_a_density_too():
    schedule = RectifiedFlow()
    network = Mixture(schedule, [[0.5]], [[0.7]])
    denoise, x0 = Denoiser(network, schedule, CleanImage(), clip=False), points()[:, :1]
    found = ode_log_likelihood(denoise, x0, 100, exact_divergence=True)
    torch.testing.assert_close(found.log_prob, network.density().log_prob(x0), rtol=0, atol=1e-3)
    assert found.standard_error.tolist() == [0.0] * 12


# ---- the divergence by probes


def test_probes_estimate_the_exact_divergence_as_well_as_they_say():
    denoise, _ = mixture(RectifiedFlow())
    exact = ode_log_likelihood(denoise, points(), 30, exact_divergence=True).log_prob
    seeded = torch.Generator().manual_seed(1)
    found = ode_log_likelihood(denoise, points(), 30, num_probes=60, generator=seeded)
    assert (found.standard_error > 1e-3).any()
    off = (found.log_prob - exact) / found.standard_error.clamp(min=1e-9)
    assert off.abs().max() < 4
    assert off.square().mean() > 0.2  # the error is not overstated either


@pytest.mark.filterwarnings("error")
def test_the_standard_error_is_that_of_the_mean_over_probes():
    denoise, _ = mixture(RectifiedFlow())
    generators = [torch.Generator().manual_seed(i) for i in range(8)]
    x0 = points(1).expand(8, 2)
    single = ode_log_likelihood(denoise, x0, 10, generator=generators)
    several = ode_log_likelihood(denoise, x0, 10, num_probes=2, generator=sample_generators(0, 8))
    assert single.standard_error.isnan().all()
    values = single.log_prob.unique()
    assert len(values) == 2  # two numbers have one product of signs
    half = (values[1] - values[0]) / 2
    # Two probes agree, or differ by all there is.
    assert {round(float(e / half), 6) for e in several.standard_error} == {0.0, 1.0}


def test_signs_find_the_divergence_of_independent_pixels_at_once():
    denoise = images(CosineSchedule(100))
    found = ode_log_likelihood(denoise, pixels(), 20, num_probes=2)
    exact = ode_log_likelihood(denoise, pixels(), 20, num_probes=2, exact_divergence=True)
    assert exact.standard_error.tolist() == [0.0] * 4
    torch.testing.assert_close(found.log_prob, exact.log_prob, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(found.standard_error, torch.zeros(4), rtol=0, atol=1e-3)


def test_a_figure_depends_on_its_own_generator_and_not_on_its_batch():
    denoise, _ = mixture(CosineLogSNR())
    x0 = points(6)
    together = ode_log_likelihood(denoise, x0, 8, num_probes=3, generator=sample_generators(5, 6))
    apart = [
        ode_log_likelihood(denoise, x0[i : i + 2], 8, num_probes=3, generator=sample_generators(5, 2, i))
        for i in (0, 2, 4)
    ]
    for name in ("log_prob", "standard_error"):
        torch.testing.assert_close(getattr(together, name), torch.cat([getattr(part, name) for part in apart]))


# ---- options and surroundings


def test_the_spacing_says_which_levels_are_visited():
    schedule = CosineSchedule(1000)
    denoise, seen = images(schedule), []
    denoise.network.register_forward_pre_hook(lambda _, args: seen.append(int(args[1][0])))
    ode_log_likelihood(denoise, pixels(), 3, Backwards())
    assert seen == [1, 10, 10, 999, 999]  # a look ahead, and one at the place that was found


def test_a_walk_that_starts_in_noise_gives_the_density_of_data_with_that_noise():
    schedule = RectifiedFlow()
    denoise, network = mixture(schedule)
    found = ode_log_likelihood(denoise, points(), 100, FromNoise(), exact_divergence=True)
    expected = network.density(noise=0.3 / 0.7).log_prob(points())
    torch.testing.assert_close(found.log_prob, expected, rtol=0, atol=1e-3)


class FromNoise(Spacing):
    """Even times that end early."""

    def times(self, schedule, num_steps):
        return torch.linspace(1, 0.3, num_steps, dtype=F64).tolist()


class Backwards(Spacing):
    """Three times of its own."""

    def times(self, schedule, num_steps):
        assert num_steps == 3
        return [999, 10, 1]


def test_a_clipped_guess_makes_another_density():
    denoise = images(CosineSchedule(100), std=2.0)
    free = ode_log_likelihood(denoise, pixels(), 20).log_prob
    denoise.clip = True
    assert (ode_log_likelihood(denoise, pixels(), 20).log_prob - free).abs().min() > 0.1


def test_the_network_is_asked_in_evaluation_mode_and_left_as_it_was():
    denoise = images(CosineSchedule(100))
    first = ode_log_likelihood(denoise, pixels(), 5)
    again = ode_log_likelihood(denoise, pixels(), 5)
    torch.testing.assert_close(first.log_prob, again.log_prob)  # there is dropout
    assert denoise.network.dropout.training
    assert denoise.network.std.requires_grad
    assert denoise.network.std.grad is None
    assert not first.log_prob.requires_grad


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_works_where_gradients_are_off_as_lightning_evaluates(mode):
    denoise = images(CosineSchedule(100))
    expected = ode_log_likelihood(denoise, pixels(), 5).log_prob
    with mode():
        found = ode_log_likelihood(denoise, pixels() + 0, 5).log_prob
    torch.testing.assert_close(found, expected)


def test_labels_of_a_lightning_batch_are_no_hindrance():
    schedule, x0 = CosineSchedule(100), points(3).float()
    network = MLPDenoiser(hidden_dim=4, num_layers=1, num_classes=3)
    with torch.inference_mode():
        denoise = Denoiser(network, schedule, Epsilon(), torch.tensor([0, 2, 1]), clip=False)
        found = ode_log_likelihood(denoise, x0, 5, exact_divergence=True).log_prob
    denoise.y = torch.tensor([0, 2, 1])
    torch.testing.assert_close(found, ode_log_likelihood(denoise, x0, 5, exact_divergence=True).log_prob)
    denoise.y = torch.tensor([1, 1, 1])
    assert (ode_log_likelihood(denoise, x0, 5, exact_divergence=True).log_prob != found).any()


# ---- refusals


@pytest.mark.parametrize("options", [{"num_steps": 1}, {"num_steps": 5, "num_probes": 0}])
def test_too_few_levels_or_probes_are_refused(options):
    with pytest.raises(ValueError, match="num_steps must be at least 2 and num_probes at least 1, got"):
        ode_log_likelihood(images(CosineSchedule(100)), pixels(), **options)


def test_a_network_that_remembers_is_refused():
    denoise = images(CosineSchedule(100))
    denoise.self_conditioning = True
    with pytest.raises(ValueError, match="ode_log_likelihood: with self_conditioning the steps are no ODE"):
        ode_log_likelihood(denoise, pixels(), 5)
