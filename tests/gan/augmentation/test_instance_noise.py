import pytest
import torch

from lit_generative.callbacks.checkpoint import Checkpoint
from lit_generative.gan.augmentation.instance_noise import InstanceNoise
from tests import tiny


def test_noise_has_its_deviation_and_fades_with_the_images_seen():
    torch.manual_seed(0)
    noise, x = InstanceNoise(std=0.2, anneal_images=100), torch.zeros(20_000, 2)
    for images, expected in ((0, 0.2), (50, 0.1), (50, 0.0), (500, 0.0)):
        noise.observe(torch.zeros(1), images)
        assert float(noise(x).std()) == pytest.approx(expected, rel=0.02)


def test_without_an_end_it_stays():
    torch.manual_seed(0)
    noise = InstanceNoise(std=0.2)
    noise.observe(torch.zeros(1), 10**9)
    assert float(noise(torch.zeros(20_000, 2)).std()) == pytest.approx(0.2, rel=0.02)


def test_gradients_pass_as_they_are():
    x = torch.zeros(3, 1, 2, 2, requires_grad=True)
    InstanceNoise()(x).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_what_was_seen_survives_a_resume(tmp_path):
    def train(steps, ckpt_path=None):
        module = tiny.gan(augmentation=InstanceNoise(std=0.5, anneal_images=100))
        options = {"callbacks": [Checkpoint(100, dirpath=str(tmp_path))], "max_steps": steps, "ckpt_path": ckpt_path}
        tiny.train(tmp_path, module, tiny.ring(batch_size=8), **options)
        return module

    whole = train(6)
    train(4)
    resumed = train(6, tmp_path / "last.ckpt")
    assert int(resumed.augmentation.images) == 48
    tiny.assert_same(tiny.weights(resumed), tiny.weights(whole))


@pytest.mark.parametrize("options", [{"std": 0.0}, {"anneal_images": 0}])
def test_numbers_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="InstanceNoise: "):
        InstanceNoise(**options)
