"""RePaint, on Gaussian images of correlated pixels, whose conditional mean is known."""

from functools import partial

import pytest
import torch
from torch import nn

from lit_generative.diffusion.continuous import CosineLogSNR, EDMSchedule, RectifiedFlow
from lit_generative.diffusion.denoiser import Denoiser
from lit_generative.diffusion.diffusers_sampler import DiffusersSampler
from lit_generative.diffusion.inpainting import inpaint
from lit_generative.diffusion.parameterizations import CleanImage
from lit_generative.diffusion.samplers import DDIMSampler, DDPMSampler, Sampler
from lit_generative.diffusion.schedules import CosineSchedule, LinearSchedule, NoiseSchedule
from lit_generative.diffusion.solvers import EulerSampler
from lit_generative.diffusion.spacings import Karras
from lit_generative.tensor_ops import randn, sample_generators

SAMPLERS = [cls for cls in Sampler.__subclasses__() if cls.__module__.startswith("lit_generative.")]
every_sampler = pytest.mark.parametrize("sampler_class", [cls for cls in SAMPLERS if cls.single_step])
every_schedule = pytest.mark.parametrize(
    "schedule",
    [LinearSchedule(), CosineSchedule(), RectifiedFlow(), CosineLogSNR(), EDMSchedule()],
    ids=lambda s: type(s).__name__,
)
SHAPE = (2, 2, 3)


class CorrelatedImages(nn.Module):
    """The best guess of images ``N(mean, std**2 * (correlation + (1 - correlation) * I))``; remembers its inputs."""

    mean, std, correlation = 0.2, 0.5, 0.8

    def __init__(self, schedule: NoiseSchedule) -> None:
        super().__init__()
        self.schedule = schedule
        self.seen = []

    def forward(self, x_t, t, y=None):
        self.seen.append((float(t[0]), x_t))
        alpha, sigma = (value[0] for value in self.schedule.alpha_sigma(t))
        rest = (x_t - alpha * self.mean).flatten(start_dim=1)
        # The covariance has one eigenvector of ones; all others share an eigenvalue.
        common = rest.mean(dim=1, keepdim=True).expand_as(rest)
        large = self.std**2 * (1 + self.correlation * (rest.shape[1] - 1))
        small = self.std**2 * (1 - self.correlation)
        shrunk = alpha * (large / (alpha**2 * large + sigma**2) * common)
        shrunk = shrunk + alpha * (small / (alpha**2 * small + sigma**2) * (rest - common))
        return self.mean + shrunk.reshape(x_t.shape)

    def expected(self, known: torch.Tensor) -> torch.Tensor:
        """Mean of an unknown pixel, given all known ones, ``(N, K)``."""
        num = known.shape[1]
        weight = self.correlation / (1 + self.correlation * (num - 1))
        return self.mean + weight * (known - self.mean).sum(dim=1)


class Constant(nn.Module):
    """All images are one number; remembers its inputs."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value
        self.seen = []

    def forward(self, x_t, t, y=None):
        self.seen.append((t[0].item(), x_t))
        return torch.full_like(x_t, self.value)


def denoiser(network: nn.Module, schedule: NoiseSchedule) -> Denoiser:
    return Denoiser(network, schedule, CleanImage(), clip=False)


def images(num: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Images, and a mask whose columns differ."""
    x = torch.rand(num, *SHAPE, generator=torch.Generator().manual_seed(1)) - 0.5
    mask = torch.tensor([[True, False, True], [True, True, False]]).expand(num, 1, 2, 3)
    return x, mask


def drawer(num: int = 4, shape: tuple[int, ...] = SHAPE, seed: int = 0):
    return partial(randn, (num, *shape), torch.Generator().manual_seed(seed))


def fill(sampler: Sampler, schedule: NoiseSchedule, x: torch.Tensor, mask: torch.Tensor, **options) -> torch.Tensor:
    noise = options.pop("noise", None) or drawer(len(x), tuple(x.shape[1:]))
    *_, (filled, _) = inpaint(denoiser(CorrelatedImages(schedule), schedule), sampler, x, mask, noise, **options)
    return filled


# ---- what is filled in


@every_sampler
def test_an_unknown_pixel_nears_its_conditional_mean_as_levels_are_resampled(sampler_class):
    schedule, network = CosineSchedule(), CorrelatedImages(CosineSchedule())
    x = torch.tensor([0.9, 0.0, 0.7]).expand(2000, 1, 1, 3)
    mask = torch.tensor([True, False, True]).expand(2000, 1, 1, 3)
    expected = network.expected(torch.tensor([[0.9, 0.7]]))
    errors = []
    for num_resamples in (1, 4, 20):
        filled = fill(sampler_class(50), schedule, x, mask, num_resamples=num_resamples)
        errors.append(float((filled[:, 0, 0, 1].mean() - expected).abs()))
    assert errors[0] > 0.1
    assert errors[1] < 0.7 * errors[0]
    assert errors[2] < 0.03


@every_schedule
def test_known_pixels_come_back_exactly_and_the_others_are_new(schedule):
    x, mask = images()
    filled = fill(DDPMSampler(6), schedule, x, mask, num_resamples=2)
    known = mask.expand_as(x)
    torch.testing.assert_close(filled[known], x[known], rtol=0, atol=0)
    assert filled.isfinite().all()
    assert (filled[~known] != x[~known]).all()


def test_what_stands_at_unknown_pixels_does_not_matter():
    x, mask = images()
    hidden = torch.where(mask, x, torch.nan)
    results = [fill(DDPMSampler(6), CosineSchedule(), value, mask) for value in (x, hidden)]
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_a_mask_may_differ_between_channels():
    x, mask = images()
    each = mask.repeat(1, 2, 1, 1)
    one, same = (fill(DDPMSampler(6), CosineSchedule(), x, m) for m in (mask, each))
    torch.testing.assert_close(one, same, rtol=0, atol=0)
    each[:, 1] = ~each[:, 1]
    filled = fill(DDPMSampler(6), CosineSchedule(), x, each)
    torch.testing.assert_close(filled[each], x[each], rtol=0, atol=0)
    assert (filled[~each] != x[~each]).all()


@pytest.mark.parametrize("schedule", [CosineSchedule(), RectifiedFlow()], ids=["cosine", "flow"])
def test_an_image_depends_on_its_own_noise_and_not_on_its_batch(schedule):
    x, mask = images(5)
    parts = [slice(5), slice(3), slice(3, 5)]

    def filled(part: slice) -> torch.Tensor:
        num = len(x[part])
        noise = partial(randn, (num, *SHAPE), sample_generators(3, num, start=part.start or 0))
        return fill(DDPMSampler(6), schedule, x[part], mask[part], noise=noise, num_resamples=3)

    together, *apart = (filled(part) for part in parts)
    torch.testing.assert_close(together, torch.cat(apart))


@pytest.mark.parametrize(
    ("schedule", "spacing"),
    [(CosineSchedule(), None), (EDMSchedule(), Karras(sigma_max=3.0))],
    ids=["from all noise", "from a lower level"],
)
def test_with_nothing_known_the_walk_is_the_samplers_own(schedule, spacing):
    sampler, network, (x, mask) = DDIMSampler(6, spacing=spacing), CorrelatedImages(schedule), images()
    start = schedule.initial_scale * drawer()()
    own = list(sampler.trajectory(denoiser(network, schedule), start, drawer()))
    steps = list(inpaint(denoiser(network, schedule), sampler, x, mask & False, drawer(), num_resamples=1))
    torch.testing.assert_close(steps, own)


# ---- the way up and down


@pytest.mark.parametrize(
    ("num_resamples", "jump_length", "order"),
    [
        (1, 1, [4, 3, 2, 1, 0]),
        (3, 1, [4, 4, 4, 3, 3, 3, 2, 2, 2, 1, 1, 1, 0]),
        (2, 2, [4, 3, 4, 3, 2, 1, 2, 1, 0]),
        (2, 4, [4, 3, 2, 1, 4, 3, 2, 1, 0]),
        (1, 9, [4, 3, 2, 1, 0]),
    ],
)
def test_the_walk_goes_up_before_each_level_but_clean_data(num_resamples, jump_length, order):
    """As the authors' schedule does, which ``RePaintScheduler`` of diffusers keeps, too."""
    schedule, network, (x, mask) = LinearSchedule(5, beta_end=0.5), Constant(0.3), images()
    steps = list(inpaint(denoiser(network, schedule), DDPMSampler(5), x, mask, drawer(), num_resamples, jump_length))
    assert [t for t, _ in network.seen] == order
    assert len(steps) == len(order)
    assert all(x_t.shape == x0.shape == x.shape for x_t, x0 in steps)


@every_schedule
@pytest.mark.parametrize("jump_length", [1, 3])
@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
def test_each_batch_the_network_sees_holds_as_much_image_and_noise_as_its_level(schedule, jump_length, known):
    network, x = Constant(0.3), torch.full((4000, 1, 1, 5), 0.3)
    mask = torch.full(x.shape, known)
    sampler, noise = DDPMSampler(7), drawer(4000, (1, 1, 5))
    list(inpaint(denoiser(network, schedule), sampler, x, mask, noise, num_resamples=3, jump_length=jump_length))
    assert len(network.seen) > 7
    for t, x_t in network.seen:
        _, alpha, sigma = schedule.level(t)
        eps = (x_t - alpha * 0.3) / sigma
        torch.testing.assert_close(eps.mean(), torch.tensor(0.0), rtol=0, atol=0.03)
        torch.testing.assert_close(eps.std(), torch.tensor(1.0), rtol=0, atol=0.03)


def test_known_pixels_are_in_place_where_the_first_level_is_not_all_noise():
    schedule, network, x = LinearSchedule(5, beta_end=0.5), Constant(0.3), torch.full((4000, 1, 1, 5), 0.8)
    next(inpaint(denoiser(network, schedule), DDPMSampler(5), x, x > 0, drawer(4000, (1, 1, 5))))
    _, alpha, sigma = schedule.level(4)
    assert alpha > 0.4
    eps = (network.seen[0][1] - alpha * 0.8) / sigma
    torch.testing.assert_close(eps.mean(), torch.tensor(0.0), rtol=0, atol=0.03)
    torch.testing.assert_close(eps.std(), torch.tensor(1.0), rtol=0, atol=0.03)


def test_a_jump_by_hand():
    schedule, network = CosineSchedule(2), Constant(0.0)
    draws = iter([torch.full((1, 1, 1, 1), value) for value in (2.0, 9.0, 9.0, 3.0, 9.0)])
    x = torch.zeros(1, 1, 1, 1)
    walk = inpaint(denoiser(network, schedule), DDIMSampler(2), x, x > 0, lambda: next(draws), num_resamples=2)
    list(walk)
    ratio, (low, high) = schedule.level(1).alpha / schedule.level(0).alpha, (schedule.level(t).sigma for t in (0, 1))
    started, again, last = (x_t.item() for _, x_t in network.seen)
    assert started == 2.0
    # All of it is noise: down to 2 / high * low, and up with a fresh 3.
    assert again == pytest.approx(ratio * 2 / high * low + (high**2 - (ratio * low) ** 2) ** 0.5 * 3, rel=1e-5)
    assert last == pytest.approx(again / high * low, rel=1e-5)


# ---- refusals


@pytest.mark.parametrize("sampler_class", [cls for cls in SAMPLERS if not cls.single_step])
def test_a_sampler_without_single_steps_is_refused(sampler_class):
    from diffusers import DPMSolverMultistepScheduler

    options = {"scheduler": DPMSolverMultistepScheduler()} if sampler_class is DiffusersSampler else {}
    schedule = CosineSchedule()
    with pytest.raises(TypeError, match=f"inpaint: {sampler_class.__name__} has only whole walks"):
        inpaint(denoiser(Constant(0.0), schedule), sampler_class(num_steps=6, **options), *images(), drawer())


@pytest.mark.parametrize(
    "mask",
    [torch.ones(4, 1, 2, 3), torch.ones(4, 3, 2, 3, dtype=torch.bool), torch.ones(1, 1, 2, 3, dtype=torch.bool)],
    ids=["numbers", "channels", "one for all"],
)
def test_a_mask_that_does_not_fit_is_refused(mask):
    with pytest.raises(ValueError, match=r"mask must be bool, .* of shape \(4, 1, 2, 3\) or \(4, 2, 2, 3\)"):
        inpaint(denoiser(Constant(0.0), CosineSchedule()), EulerSampler(6), images()[0], mask, drawer())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_resamples": 0}, "num_resamples and jump_length must be at least 1, got 0 and 1"),
        ({"jump_length": 0}, "num_resamples and jump_length must be at least 1, got 10 and 0"),
        ({"jump_length": 6}, "jump_length must be below the sampler's 6 steps, got 6"),
    ],
)
def test_numbers_that_make_no_walk_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        inpaint(denoiser(Constant(0.0), CosineSchedule()), EulerSampler(6), *images(), drawer(), **options)
