"""Reconstructions, and samples drawn from images, are compared with the images."""

import pytest
import torch

from lit_generative.callbacks.ema import EMA
from lit_generative.callbacks.fidelity_evaluation import FidelityEvaluation
from lit_generative.diffusion.conditions import Condition, SuperResolution
from lit_generative.metrics.fidelity import mean_squared_error, psnr, ssim
from lit_generative.networks.conv_vae import ConvDecoder, ConvEncoder
from lit_generative.networks.diffusers_unet import DiffusersUNet
from lit_generative.tensor_ops import from_uint8, generators_of
from tests import families


def large_vae(**changes):
    sizes = {"image_size": 16, "latent_dim": 3, "width": 8, "channels": 1}
    return families.build("vae", encoder=ConvEncoder(**sizes, **changes), decoder=ConvDecoder(**sizes, **changes))


def super_resolution(condition=None, extra_channels=1, **changes):
    network = DiffusersUNet(8, 1, widths=(8,), layers_per_block=1, extra_channels=extra_channels, **changes)
    return families.build("ddpm", network=network, condition=condition or SuperResolution(2))


def scores(tmp_path, module, data=None, **options):
    run = families.trainer(tmp_path, callbacks=[FidelityEvaluation(**options)])
    found = run.test(module, data or families.digits(), verbose=False)[0]
    return {name: value for name, value in found.items() if name.startswith(("test/psnr", "test/mse", "test/ssim"))}


def images(data, split="test"):
    data.setup()
    indices = torch.arange(data.num_examples(split))
    return from_uint8(data.examples(split, indices)), data.labels(split, indices)


@pytest.mark.parametrize("num_classes", [None, 10])
def test_reconstructions_are_compared_image_by_image(tmp_path, num_classes):
    data, module = families.digits(image_size=16, resize="stretch"), large_vae(num_classes=num_classes)
    x, y = images(data)
    found = scores(tmp_path, module, data)
    expected = module.reconstruct(x, None if num_classes is None else y)
    assert found.keys() == {"test/psnr", "test/mse", "test/ssim"}
    for name, measure in (("psnr", psnr), ("mse", mean_squared_error), ("ssim", ssim)):
        assert found[f"test/{name}"] == pytest.approx(measure(expected, x).mean().item(), rel=1e-4)


def test_the_code_of_a_vqvae_needs_no_labels(tmp_path):
    module, data = families.build("vqvae"), families.digits()
    x, _ = images(data)
    found = scores(tmp_path, module, data)
    assert found["test/mse"] == pytest.approx(mean_squared_error(module.reconstruct(x), x).mean().item(), rel=1e-4)
    assert "test/ssim" not in found  # images are smaller than its window


def test_samples_by_super_resolution_are_compared_and_so_is_what_the_model_was_shown(tmp_path):
    module, data = super_resolution(), families.digits()
    x, _ = images(data)
    found = scores(tmp_path, module, data)
    shown, samples = module.samples_of(x, None, generators_of(x, "density", 0))
    for name, image in (("psnr", samples), ("psnr_shown", shown)):
        assert found[f"test/{name}"] == pytest.approx(psnr(image.clamp(-1, 1), x).mean().item(), abs=1e-3)
    other_batches = scores(tmp_path, module, families.digits(eval_batch_size=7))
    assert found == pytest.approx(other_batches, rel=1e-4)
    other_seed = scores(tmp_path, module, data, seed=1)
    assert found["test/psnr_shown"] == other_seed["test/psnr_shown"]
    assert found["test/psnr"] != other_seed["test/psnr"]


class Halved:
    """Gives images back at half their contrast."""

    def reconstruct(self, x, y=None):
        return x / 2


def test_similarity_needs_images_of_one_window():
    for side, expected in ((11, {"psnr", "mse", "ssim"}), (10, {"psnr", "mse"})):
        assert FidelityEvaluation().figures(Halved(), torch.rand(2, 1, side, 12), None).keys() == expected


class Twice(Condition):
    """An image, two times."""

    def of(self, x0):
        return torch.cat([x0, x0], dim=1)


def test_what_has_no_image_s_shape_is_not_compared(tmp_path):
    found = scores(tmp_path, super_resolution(Twice(), extra_channels=2))
    assert found.keys() == {"test/psnr", "test/mse"}


def test_a_model_with_classes_is_told_the_label_of_what_it_is_shown(tmp_path, monkeypatch):
    module, given = super_resolution(num_classes=10), []
    original = module.samples_of
    monkeypatch.setattr(module, "samples_of", lambda x, y, g: given.append(y) or original(x, y, g))
    data = families.digits()
    scores(tmp_path, module, data)
    torch.testing.assert_close(torch.cat(given), images(data)[1])


@pytest.mark.parametrize("asked", [True, False])
def test_validation_scores_the_average_unless_told_not_to(tmp_path, asked):
    callback, data = FidelityEvaluation(on_validation=asked), families.digits()
    run = families.trainer(tmp_path, callbacks=[EMA(half_life=1e9, ramp_up=None), callback], max_steps=5)
    untrained = families.build("vae")
    run.fit(families.build("vae"), data)
    if not asked:
        assert "val/psnr" not in run.callback_metrics
        return
    x, _ = images(data, "val")
    expected = psnr(untrained.reconstruct(x), x).mean().item()
    assert run.callback_metrics["val/psnr"].item() == pytest.approx(expected, rel=1e-3)


def test_fewer_batches_can_be_scored(tmp_path):
    data, module = families.digits(eval_batch_size=50), families.build("vae")
    x = images(data)[0][:100]
    found = scores(tmp_path, module, data, max_batches=2)
    assert found["test/psnr"] == pytest.approx(psnr(module.reconstruct(x), x).mean().item(), rel=1e-4)
    with pytest.raises(ValueError, match="FidelityEvaluation: max_batches must be at least 1, got 0"):
        FidelityEvaluation(max_batches=0)


@pytest.mark.parametrize("family", ["gan", "ddpm"])
def test_a_model_that_gives_no_image_back_is_refused(tmp_path, family):
    with pytest.raises(TypeError, match="neither encodes and decodes images nor draws from some"):
        scores(tmp_path, families.build(family))
