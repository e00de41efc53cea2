import math

import pytest
import torch

from lit_generative.diffusion.parameterizations import EDMPreconditioning, Epsilon, Parameterization
from lit_generative.diffusion.schedules import CosineSchedule
from lit_generative.diffusion.weightings import P2, SNR, EDMWeighting, MinSNR, TruncatedSNR, Uniform, Weighting

WEIGHTINGS = [cls for cls in Weighting.__subclasses__() if cls.__module__.startswith("lit_generative.")]
OF_THE_IMAGE = [cls for cls in WEIGHTINGS if cls is not Uniform]
PARAMETERIZATIONS = [cls for cls in Parameterization.__subclasses__() if cls.__module__.startswith("lit_generative.")]
every_parameterization = pytest.mark.parametrize(
    "parameterization", [cls() for cls in PARAMETERIZATIONS], ids=lambda p: type(p).__name__
)
every_weighting = pytest.mark.parametrize("weighting", [cls() for cls in WEIGHTINGS], ids=lambda w: type(w).__name__)
every_weighting_of_the_image = pytest.mark.parametrize(
    "weighting", [cls() for cls in OF_THE_IMAGE], ids=lambda w: type(w).__name__
)


def levels(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors with SNRs of 1e-4 to 1e4, the variance preserved."""
    snr = torch.logspace(-4, 4, 33, dtype=torch.float64)
    return (snr / (1 + snr)).sqrt().to(dtype), (1 / (1 + snr)).sqrt().to(dtype)


# ---- laws


@every_weighting_of_the_image
@every_parameterization
def test_an_error_has_the_same_weight_whatever_the_network_predicts(weighting, parameterization):
    (alpha, sigma), output, other = levels(), 0.3, 0.7
    x_t = torch.ones_like(alpha)
    moved = parameterization.to_x0(output * x_t, x_t, alpha, sigma)
    moved = moved - parameterization.to_x0(other * x_t, x_t, alpha, sigma)
    weight = weighting.weight(alpha, sigma, parameterization.output_scale(alpha, sigma))
    expected = weighting.image_weight(alpha, sigma) * moved.square()
    torch.testing.assert_close(weight * (output - other) ** 2, expected)


@every_weighting_of_the_image
def test_the_weight_of_the_noise_is_that_of_the_image_over_the_snr(weighting):
    alpha, sigma = levels()
    expected = weighting.image_weight(alpha, sigma) * sigma.square() / alpha.square()
    torch.testing.assert_close(weighting.noise_weight(alpha, sigma), expected)


@every_weighting
def test_weights_are_positive_one_for_each_example_and_float32(weighting):
    alpha, sigma = CosineSchedule(1000).alpha_sigma(torch.arange(1000))
    for scale in (torch.ones_like(alpha), sigma / alpha, sigma):
        weight = weighting.weight(alpha, sigma, scale)
        assert weight.dtype == torch.float32
        assert weight.shape == (1000,)
        assert weight.isfinite().all()
        assert (weight > 0).all()


@every_weighting
@every_parameterization
def test_weights_are_finite_at_a_zero_terminal_snr(weighting, parameterization):
    if isinstance(parameterization, Epsilon):
        return  # below
    alpha, sigma = CosineSchedule(8, zero_terminal_snr=True).alpha_sigma(torch.arange(8))
    assert alpha[-1] == 0
    assert weighting.weight(alpha, sigma, parameterization.output_scale(alpha, sigma)).isfinite().all()


@pytest.mark.parametrize(
    ("weighting", "limit"), [(Uniform(), 1.0), (SNR(), 1.0), (MinSNR(), 1.0), (P2(gamma=2.0, k=4.0), 1 / 16)]
)
def test_weights_of_the_noise_have_their_limit_where_the_noise_says_nothing_of_the_image(weighting, limit):
    alpha, sigma = torch.tensor([0.0, 1e-6]), torch.tensor([1.0, 1.0])
    weight = weighting.weight(alpha, sigma, Epsilon().output_scale(alpha, sigma))
    torch.testing.assert_close(weight, torch.full((2,), limit))


@pytest.mark.parametrize("weighting", [TruncatedSNR(), EDMWeighting()])
def test_a_weight_without_a_limit_there_is_infinite_and_not_nan(weighting):
    alpha, sigma = torch.zeros(1), torch.ones(1)
    assert weighting.weight(alpha, sigma, Epsilon().output_scale(alpha, sigma)).item() == float("inf")


# ---- values


PUBLISHED = {
    "SNR": (SNR(), {"noise": lambda s: s**0, "image": lambda s: s, "velocity": lambda s: s / (s + 1)}),
    "TruncatedSNR": (
        TruncatedSNR(),
        {
            "noise": lambda s: s.clamp(min=1) / s,
            "image": lambda s: s.clamp(min=1),
            "velocity": lambda s: s.clamp(min=1) / (s + 1),
        },
    ),
    "MinSNR": (
        MinSNR(gamma=3.0),
        {
            "noise": lambda s: s.clamp(max=3) / s,
            "image": lambda s: s.clamp(max=3),
            "velocity": lambda s: s.clamp(max=3) / (s + 1),
        },
    ),
    "P2": (
        P2(gamma=0.5, k=2.0),
        {
            "noise": lambda s: (2 + s) ** -0.5,
            "image": lambda s: s * (2 + s) ** -0.5,
            "velocity": lambda s: s * (2 + s) ** -0.5 / (s + 1),
        },
    ),
    "EDMWeighting": (
        EDMWeighting(sigma_data=0.25),
        {
            "noise": lambda s: (1 / s + 0.0625) / (1 / s * 0.0625) / s,
            "image": lambda s: (1 / s + 0.0625) / (1 / s * 0.0625),
            "velocity": lambda s: (1 / s + 0.0625) / (1 / s * 0.0625) / (s + 1),
        },
    ),
    "Uniform": (Uniform(), {"noise": lambda s: s**0, "image": lambda s: s**0, "velocity": lambda s: s**0}),
}


def test_the_published_weights_are_those_of_every_class():
    assert set(PUBLISHED) == {cls.__name__ for cls in WEIGHTINGS}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("predicted", ["noise", "image", "velocity"])
def test_weights_are_the_published_ones_of_the_networks_own_error(name, predicted):
    weighting, published = PUBLISHED[name]
    alpha, sigma = levels()
    scale = {"noise": sigma / alpha, "image": torch.ones_like(alpha), "velocity": sigma}[predicted]
    expected = published[predicted]((alpha / sigma).square())
    torch.testing.assert_close(weighting.weight(alpha, sigma, scale), expected)


def test_defaults_are_the_papers():
    alpha, sigma = torch.tensor([0.96]), torch.tensor([0.28])  # an SNR of 11.755
    snr = (0.96 / 0.28) ** 2
    assert MinSNR().image_weight(alpha, sigma).item() == 5
    assert P2().noise_weight(alpha, sigma).item() == pytest.approx(1 / (1 + snr))
    assert EDMWeighting().image_weight(alpha, sigma).item() == pytest.approx(snr + 4)


def test_edms_weight_is_one_on_the_error_of_edms_network():
    alpha, sigma = levels()
    scale = EDMPreconditioning(sigma_data=0.3).output_scale(alpha, sigma)
    torch.testing.assert_close(EDMWeighting(sigma_data=0.3).weight(alpha, sigma, scale), torch.ones_like(alpha))


def test_p2_without_gamma_is_the_snr():
    alpha, sigma = levels()
    torch.testing.assert_close(P2(gamma=0.0).image_weight(alpha, sigma), SNR().image_weight(alpha, sigma))


# ---- refusals


@pytest.mark.parametrize("gamma", [0.0, -1.0, float("nan")])
def test_a_bound_of_the_snr_that_is_not_positive_is_refused(gamma):
    with pytest.raises(ValueError, match="MinSNR: gamma must be positive, got"):
        MinSNR(gamma=gamma)


@pytest.mark.parametrize(
    "options", [{"gamma": -0.1}, {"gamma": math.inf}, {"k": 0.0}, {"k": math.inf}, {"k": math.nan}]
)
def test_weights_of_p2_that_explode_are_refused(options):
    with pytest.raises(ValueError, match="P2: gamma must be at least 0, k above 0, and both finite, got"):
        P2(**options)


@pytest.mark.parametrize("sigma_data", [0.0, math.inf])
def test_data_without_deviation_is_refused(sigma_data):
    with pytest.raises(ValueError, match="EDMWeighting: sigma_data must be positive and finite, got"):
        EDMWeighting(sigma_data)
