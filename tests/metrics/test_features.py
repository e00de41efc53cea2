import pytest
import torch
from torch import nn

from lit_generative.metrics.features import check_images, full_precision, state_hash
from lit_generative.metrics.small_nets import DigitsFeatures
from tests.metrics.tiny_features import TinyFeatures

CPU = torch.device("cpu")


def test_an_extractor_stays_in_evaluation_mode():
    extractor = TinyFeatures()
    nn.Sequential(extractor).train()
    assert not any(module.training for module in extractor.modules())


def test_other_extractors_than_inception_do_not_call_their_distance_fid():
    extractor = TinyFeatures()
    assert extractor.frechet_key == "fd_tiny"
    assert extractor.frechet_name == "Frechet distance (tiny features)"


def test_the_record_follows_the_weights():
    assert TinyFeatures(seed=1).record() == TinyFeatures(seed=1).record()
    assert TinyFeatures(seed=1).record() != TinyFeatures(seed=2).record()


def test_the_hash_sees_names_dtypes_shapes_and_values():
    def hashed(**buffers):
        module = nn.Module()
        for name, value in buffers.items():
            module.register_buffer(name, value)
        return state_hash(module)

    x = torch.zeros(2, 3)
    hashes = {hashed(a=x), hashed(b=x), hashed(a=x.view(3, 2)), hashed(a=x.to(torch.int32)), hashed(a=x + 1)}
    assert len(hashes) == 5
    assert hashed(a=x, b=x + 1) == hashed(b=x + 1, a=x)


@pytest.mark.parametrize(
    "images",
    [torch.zeros(2, 3, 4, 4), torch.zeros(3, 4, 4).byte(), torch.zeros(2, 2, 4, 4).byte()],
    ids=["float", "one image", "two channels"],
)
def test_what_is_no_batch_of_pictures_is_refused(images):
    with pytest.raises(ValueError, match=r"Who: need uint8 images \(N, C, H, W\).*to_uint8"):
        check_images(images, "Who")


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_are_not_refused(channels):
    check_images(torch.zeros(0, channels, 4, 5).byte(), "Who")


def test_precision_settings_do_not_change_features(fast_precision):
    images = torch.randint(256, (40, 1, 8, 8), dtype=torch.uint8)
    extractor = DigitsFeatures()
    with torch.autocast("cpu", torch.bfloat16):
        fast = extractor(images)
    torch.set_float32_matmul_precision("highest")
    torch.testing.assert_close(fast, extractor(images), rtol=0, atol=0)


def test_precision_settings_are_restored(fast_precision):
    def fail():
        with torch.autocast("cpu", torch.bfloat16), full_precision(CPU):
            assert not torch.is_autocast_enabled("cpu")
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    assert torch.get_float32_matmul_precision() == "medium"


@pytest.fixture
def fast_precision():
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")
