import warnings

import pytest
import torch

from lit_generative.data.mixtures import RingMixture
from lit_generative.diffusion.conditions import SuperResolution
from lit_generative.metrics.sources import DataModuleImages, ModelSamples, Quantizer
from lit_generative.networks.diffusers_unet import DiffusersUNet
from lit_generative.tensor_ops import sample_generators, to_uint8
from tests import families


@pytest.fixture
def digits():
    data = families.digits()
    data.setup()
    return data


def test_data_gives_the_images_of_its_split_unaugmented(digits):
    flipping = families.digits(horizontal_flip=True)
    flipping.setup()
    for split, count in (("train", 1455), ("val", 162), ("test", 180)):
        source = DataModuleImages(flipping, split)
        assert source.count == count
        indices = torch.tensor([5, 0, count - 1])
        torch.testing.assert_close(source.pixels(indices), getattr(digits.splits, split).image[indices])


def test_the_record_tells_data_apart(digits):
    train = DataModuleImages(digits, "train").record()
    assert train == DataModuleImages(digits, "train").record()
    larger = families.digits(image_size=16, resize="stretch")
    larger.setup()
    others = [DataModuleImages(digits, "val").record(), DataModuleImages(larger, "train").record()]
    assert train["data"].endswith("Digits")
    assert len({train["fingerprint"], *(other["fingerprint"] for other in others)}) == 3


def test_one_changed_image_changes_the_fingerprint_of_a_small_set(digits):
    before = DataModuleImages(digits, "val").record()["fingerprint"]
    digits.splits.val.image[7, 0, 0, 0] += 1
    assert DataModuleImages(digits, "val").record()["fingerprint"] != before


def test_an_empty_split_and_other_data_are_refused():
    data = families.digits(test_fraction=0.0)
    data.setup()
    with pytest.raises(ValueError, match="split 'test' is empty"):
        DataModuleImages(data, "test")
    with pytest.raises(TypeError, match="dict gives no images"):
        DataModuleImages({}, "train")


def test_points_are_refused():
    data = RingMixture(num_samples=100)
    data.setup()
    with pytest.raises(ValueError, match=r"RingMixture, train split: need images .* got \(2, 2\)"):
        DataModuleImages(data, "train").pixels(torch.tensor([0, 1]))


def test_sample_i_depends_on_the_seed_and_i_alone():
    module = families.build("vae").eval()
    source = ModelSamples(module, 10, seed=3)
    together = source.pixels(torch.arange(10))
    apart = torch.cat([source.pixels(torch.tensor([i])) for i in range(10)])
    assert (together.int() - apart.int()).abs().max() <= 1  # float sums
    expected = to_uint8(module.sample(10, generator=sample_generators(3, 10)))
    torch.testing.assert_close(together, expected)
    assert not torch.equal(together, ModelSamples(module, 10, seed=4).pixels(torch.arange(10)))


def test_sampling_leaves_modes_and_gradients_as_they_were():
    module = families.build("gan").train()
    module.generator.eval()
    ModelSamples(module, 4).pixels(torch.arange(4))
    assert module.training
    assert not module.generator.training
    assert all(p.grad is None for p in module.parameters())


def test_the_record_of_samples_says_how_they_are_drawn():
    record = ModelSamples(families.build("ddpm"), 7, seed=2).record()
    assert (record["count"], record["seed"]) == (7, 2)
    assert record["model"].endswith("DDPM")
    assert record["sampler"]["init_args"]["num_steps"] == 4
    assert record["clip_samples"] is True


def super_resolution(**changes):
    network = DiffusersUNet(8, 1, widths=(8,), layers_per_block=1, extra_channels=1, **changes)
    return families.build("ddpm", network=network, condition=SuperResolution(2))


@pytest.mark.parametrize("num_classes", [None, 10])
def test_a_model_that_draws_from_images_is_shown_each_in_turn_with_its_label(digits, num_classes, monkeypatch):
    module, given = super_resolution(num_classes=num_classes), []
    original = module.samples_of
    monkeypatch.setattr(module, "samples_of", lambda x, y, g: given.append((x, y)) or original(x, y, g))
    source = ModelSamples(module, 200, seed=3, shown=DataModuleImages(digits, "val"))  # which has 162 images
    indices = torch.tensor([0, 161, 162])
    pixels = source.pixels(indices)
    expected = digits.splits.val.image[[0, 161, 0]]
    torch.testing.assert_close(to_uint8(given[0][0]), expected)
    if num_classes is None:
        assert given[0][1] is None
    else:
        torch.testing.assert_close(given[0][1], digits.splits.val.label[[0, 161, 0]])
    assert not torch.equal(pixels[0], pixels[2])  # other noise
    apart = torch.cat([source.pixels(i) for i in indices.split(1)])
    assert (pixels.int() - apart.int()).abs().max() <= 1
    assert source.record()["shown"] == DataModuleImages(digits, "val").record()
    assert "shown" not in ModelSamples(families.build("ddpm"), 7, shown=DataModuleImages(digits, "val")).record()


def test_a_model_that_draws_from_images_is_refused_without_and_one_with_classes_without_labels(digits):
    with pytest.raises(ValueError, match="this DDPM draws from images, and was given none"):
        ModelSamples(super_resolution(), 5)

    class Unlabelled:
        num_examples, examples = digits.num_examples, digits.examples

    source = ModelSamples(super_resolution(num_classes=10), 5, shown=DataModuleImages(Unlabelled(), "val"))
    with pytest.raises(TypeError, match="Unlabelled gives no labels of its images"):
        source.pixels(torch.tensor([0]))


def test_a_module_without_samples_and_one_sample_are_refused():
    with pytest.raises(TypeError, match=r"Linear has no sample\(\)"):
        ModelSamples(torch.nn.Linear(1, 1), 5)
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        ModelSamples(families.build("vae"), 1)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_named_by_process_and_image(value):
    images = torch.zeros(4, 1, 2, 3)
    images[2, 0, 1, 1] = value
    with pytest.raises(ValueError, match="VAE, process 0, image 32: NaN or infinite"):
        Quantizer("VAE")(images, torch.tensor([30, 31, 32, 33]))


def test_what_is_clamped_is_said_once():
    quantize = Quantizer("VAE")
    images = torch.zeros(3, 1, 2, 2)
    images[1] = 1.5
    with pytest.warns(UserWarning, match="image 11: values from 1.5 to 1.5"):
        pixels = quantize(images, torch.tensor([10, 11, 12]))
    assert pixels[1].unique().tolist() == [255]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize(images, torch.tensor([10, 11, 12]))
        Quantizer("VAE")(torch.full((1, 1, 2, 2), 1.003), torch.tensor([0]))  # less than a grey level
