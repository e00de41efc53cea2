from functools import partial

import jsonargparse
import pytest
import torch
from torch import nn

from lit_generative.diffusion.denoiser import Denoiser
from lit_generative.diffusion.guidance import Autoguidance, ClassifierFree, Guidance
from lit_generative.diffusion.parameterizations import CleanImage, Epsilon
from lit_generative.diffusion.samplers import DDIMSampler
from lit_generative.diffusion.schedules import CosineSchedule, Level, LinearSchedule
from lit_generative.networks.mlp import MLPDenoiser
from lit_generative.recipe import Recorded, describe
from lit_generative.tensor_ops import sample_generators
from tests.tiny import point_ddpm, weights

GUIDANCES = [cls for cls in Guidance.__subclasses__() if cls.__module__.startswith("lit_generative.")]


class Affine(nn.Module):
    """A number for each label plus the input; remembers what it was asked."""

    def __init__(self, factor: float = 1.0, outputs: int = 1) -> None:
        super().__init__()
        self.factor, self.outputs = factor, outputs
        self.num_classes = 3
        self.questions = []

    def forward(self, x_t, t, y=None):
        self.questions.append((x_t, t, y))
        labels = 0 if y is None else y.reshape(-1, *[1] * (x_t.ndim - 1)).to(x_t.dtype)
        return torch.cat([self.factor * x_t + 10 * (labels + k) for k in range(self.outputs)], dim=1)


def build(cls: type[Guidance], **options) -> Guidance:
    return cls(Affine(0.5), **options) if cls is Autoguidance else cls(**options)


every_guidance = pytest.mark.parametrize(
    "make", [partial(build, cls) for cls in GUIDANCES], ids=lambda m: m.args[0].__name__
)


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)


def question(num: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Batch, times and labels."""
    return numbers(num, 3, 2, 4), torch.arange(num), torch.arange(num) % 3


# ---- every guidance


@every_guidance
def test_scale_one_is_the_good_prediction_and_zero_the_bad_one(make):
    good, bad = numbers(2, 5, 3, 2, 4)
    torch.testing.assert_close(make(scale=1.0).combine(good, bad), good)
    torch.testing.assert_close(make(scale=0.0).combine(good, bad), bad)


@every_guidance
def test_scale_three_goes_two_steps_beyond_the_good_prediction(make):
    good, bad = numbers(2, 5, 3, 2, 4)
    torch.testing.assert_close(make(scale=3.0).combine(good, bad), good + 2 * (good - bad))


@every_guidance
def test_scale_one_asks_for_no_second_prediction(make):
    assert not make(scale=1.0).active(Level(3, 0.6, 0.8))
    assert not make(scale=1.0, interval=(0.0, 9.0)).active(Level(3, 0.6, 0.8))
    assert make(scale=0.0).active(Level(3, 0.6, 0.8))
    assert make(scale=2.0).active(Level(3, 0.0, 1.0))


@every_guidance
def test_the_interval_is_one_of_noise_to_image(make):
    guidance = make(scale=2.0, interval=(0.5, 2.0))
    ratios = {(1.0, 0.4): False, (1.0, 0.5): False, (1.0, 0.6): True, (0.5, 1.0): True, (0.5, 1.1): False}
    assert {pair: guidance.active(Level(3, *pair)) for pair in ratios} == ratios
    assert not guidance.active(Level(3, 0.0, 1.0))  # nothing but noise
    assert make(scale=2.0, interval=(0.5, float("inf"))).active(Level(3, 0.0, 1.0))


@every_guidance
def test_guidance_does_not_depend_on_the_batch(make):
    x_t, _, y = question()
    schedule = CosineSchedule(50)

    def guess(part: slice) -> torch.Tensor:
        guidance = make(scale=2.0)
        return Denoiser(Affine(), schedule, Epsilon(), y[part], False, guidance)(x_t[part], schedule.level(20)).x0

    torch.testing.assert_close(guess(slice(5)), torch.cat([guess(slice(3)), guess(slice(3, 5))]))


@every_guidance
def test_a_scale_that_is_no_strength_is_refused(make):
    for scale in (-0.1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="scale must be at least 0 and finite"):
            make(scale=scale)


@every_guidance
@pytest.mark.parametrize("interval", [(2.0, 2.0), (3.0, 2.0), (-1.0, 2.0), (1.0, 2.0, 3.0)])
def test_an_empty_interval_is_refused(make, interval):
    with pytest.raises(ValueError, match=r"interval must be two values of sigma / alpha, the smaller one first"):
        make(scale=2.0, interval=interval)


# ---- without the label


def test_both_predictions_come_from_one_batch_of_twice_the_size():
    network, (x_t, t, y) = Affine(), question()
    good, bad = ClassifierFree(2.0).evaluate(network, x_t, t, y, 3)
    ((inputs, times, labels),) = network.questions
    torch.testing.assert_close(inputs, torch.cat([x_t, x_t]))
    assert times.tolist() == [0, 1, 2, 3, 4] * 2
    assert labels.tolist() == [0, 1, 2, 0, 1, 3, 3, 3, 3, 3]
    torch.testing.assert_close(good, Affine()(x_t, t, y))
    torch.testing.assert_close(bad, Affine()(x_t, t, torch.full((5,), 3)))


def test_outside_the_interval_the_network_is_asked_once_with_the_labels():
    schedule, (x_t, _, y) = CosineSchedule(50), question()
    network, level = Affine(), schedule.level(20)
    ratio = level.sigma / level.alpha
    guided = Denoiser(network, schedule, CleanImage(), y, False, ClassifierFree(3.0, (ratio + 0.1, ratio + 1)))
    torch.testing.assert_close(guided(x_t, level).x0, Affine()(x_t, None, y))
    ((inputs, _, labels),) = network.questions
    assert inputs.shape == x_t.shape
    assert labels is y


def test_the_guided_image_by_hand():
    schedule, (x_t, _, y) = CosineSchedule(50), question()
    guess = Denoiser(Affine(), schedule, CleanImage(), y, False, ClassifierFree(3.0))(x_t, schedule.level(20))
    # The label adds 10 y, none adds 30: 30 + 3 * (10 y - 30)
    torch.testing.assert_close(guess.x0, x_t + (30 * y - 60).reshape(5, 1, 1, 1))


def test_what_is_said_of_the_variance_is_said_with_the_label():
    schedule, (x_t, _, y) = CosineSchedule(50), question()
    guidance = ClassifierFree(3.0)
    guess = Denoiser(Affine(outputs=2), schedule, CleanImage(), y, False, guidance)(x_t, schedule.level(20))
    torch.testing.assert_close(guess.variance, x_t + (10 * y + 10).reshape(5, 1, 1, 1))


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_rescaling_brings_each_example_so_far_back_to_the_deviation_of_the_conditional_one(share):
    good, bad = numbers(2, 5, 3, 2, 4) * torch.tensor([1.0, 5.0, 0.1, 2.0, 3.0]).double().reshape(5, 1, 1, 1)
    plain = ClassifierFree(4.0).combine(good, bad)
    rescaled = ClassifierFree(4.0, rescale=share).combine(good, bad)
    expected = share * good.flatten(1).std(dim=1) + (1 - share) * plain.flatten(1).std(dim=1)
    torch.testing.assert_close(rescaled.flatten(1).std(dim=1), expected)
    factors = (rescaled / plain).flatten(1)
    torch.testing.assert_close(factors, factors[:, :1].expand_as(factors))


def test_rescaling_leaves_a_constant_prediction_as_it_is():
    zero = torch.zeros(2, 3, 2, 4)
    torch.testing.assert_close(ClassifierFree(4.0, rescale=1.0).combine(zero, zero), zero)


@pytest.mark.parametrize("rescale", [-0.1, 1.1])
def test_a_rescaling_that_is_no_share_is_refused(rescale):
    with pytest.raises(ValueError, match=r"rescale must lie in \[0, 1\]"):
        ClassifierFree(2.0, rescale=rescale)


@pytest.mark.parametrize(("y", "null_class"), [(None, 3), (torch.zeros(5, dtype=torch.int64), None)])
def test_without_labels_there_is_nothing_to_leave_out(y, null_class):
    x_t, t, _ = question()
    with pytest.raises(ValueError, match="ClassifierFree: needs labels and a network with num_classes"):
        ClassifierFree(2.0).evaluate(Affine(), x_t, t, y, null_class)


def test_a_model_that_trained_with_all_labels_is_refused():
    sampler = DDIMSampler(3, guidance=ClassifierFree(2.0))
    with pytest.raises(ValueError, match="ClassifierFree asks the network without a label, which it never trained for"):
        point_ddpm(num_classes=4, sampler=sampler)
    assert point_ddpm(num_classes=4, sampler=sampler, label_dropout=0.1).sample(3).shape == (3, 2)


def test_a_description_builds_the_same_guidance():
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--guidance", type=Guidance)
    made = ClassifierFree(2.5, (0.2, 5.0), rescale=0.7)
    again = parser.instantiate(parser.parse_object({"guidance": describe(made)})).guidance
    assert vars(again) == vars(made)
    assert again.interval == (0.2, 5.0)


# ---- a weaker network


class Guide(Recorded, nn.Module):
    """Weights from a file, and a layer that differs in training."""

    checkpoint = "guide.ckpt"
    sample_shape = (2,)

    def __init__(self, num_classes: int | None = None, **attributes: object) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.network = MLPDenoiser(hidden_dim=5, num_layers=1, num_classes=num_classes)
        self.num_classes = num_classes
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x_t, t, y=None):
        return self.dropout(self.network(x_t, t, y))


def test_the_guide_is_asked_what_the_network_is_asked():
    network, guide, (x_t, t, y) = Affine(), Affine(0.5), question()
    good, bad = Autoguidance(guide, 2.0).evaluate(network, x_t, t, y, 3)
    for asked in (network, guide):
        ((inputs, times, labels),) = asked.questions
        assert (inputs is x_t, times is t, labels is y) == (True, True, True)
    torch.testing.assert_close(good, Affine()(x_t, t, y))
    torch.testing.assert_close(bad, Affine(0.5)(x_t, t, y))


def test_the_guide_is_neither_trained_nor_part_of_the_model():
    torch.manual_seed(7)
    guide = Guide()
    guide.train()
    module = point_ddpm(sampler=DDIMSampler(3, guidance=Autoguidance(guide, 2.0)))
    module.train()
    assert weights(module).keys() == weights(point_ddpm()).keys()
    assert not any(layer.training for layer in guide.modules())
    assert not any(p.requires_grad for p in guide.parameters())
    samples = [module.sample(3, generator=sample_generators(0, 3)) for _ in range(2)]
    torch.testing.assert_close(*samples, rtol=0, atol=0)
    assert (samples[0] != point_ddpm().sample(3, generator=sample_generators(0, 3))).any()


def test_the_guide_follows_its_input_to_another_device():
    guide = Guide()
    x_t, t = torch.zeros(3, 2, device="meta"), torch.zeros(3, dtype=torch.int64, device="meta")
    _, bad = Autoguidance(guide, 2.0).evaluate(lambda x_t, *_: x_t, x_t, t, None, None)
    assert {bad.device.type, *(p.device.type for p in guide.parameters())} == {"meta"}


def test_a_guide_whose_weights_no_file_holds_is_refused():
    with pytest.raises(
        ValueError, match=r"guide must say which checkpoint its weights are from.*a MLPDenoiser does not"
    ):
        Autoguidance(MLPDenoiser(hidden_dim=5, num_layers=1), 2.0)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"num_classes": 4}, "same num_classes, got 4 and None"),
        ({"sample_shape": (3,)}, r"same sample_shape, got \(3,\) and \(2,\)"),
        ({"extra_channels": 2}, "same extra_channels, got 2 and "),
        ({"schedule": CosineSchedule(10)}, "trained with the model's schedule.*CosineSchedule.*LinearSchedule"),
        ({"schedule": LinearSchedule(20)}, "trained with the model's schedule"),
        ({"parameterization": CleanImage()}, "trained with the model's parameterization.*CleanImage.*Epsilon"),
    ],
)
def test_a_guide_whose_prediction_means_something_else_is_refused(attributes, message):
    with pytest.raises(ValueError, match=message):
        point_ddpm(sampler=DDIMSampler(3, guidance=Autoguidance(Guide(**attributes), 2.0)))


def test_a_guide_that_fits_is_taken():
    guide = Guide(extra_channels=0, schedule=LinearSchedule(10), parameterization=Epsilon())
    assert point_ddpm(sampler=DDIMSampler(3, guidance=Autoguidance(guide, 2.0))).sample(3).shape == (3, 2)


@pytest.mark.parametrize("guide", [Affine(0.5), Guide(num_classes=3, extra_channels=0)], ids=["silent", "no channels"])
def test_what_guide_or_network_do_not_say_is_not_compared(guide):
    network = Affine()
    network.sample_shape = (2,)
    Autoguidance(guide, 2.0).check(network, LinearSchedule(10), Epsilon())
