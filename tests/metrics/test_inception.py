import hashlib
import pickle
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch_fidelity import FeatureExtractorInceptionV3

from benchmarks import inception_speed
from lit_generative.metrics.inception import PUBLISHED_SHA256, WEIGHTS_VARIABLE, InceptionV3, find_weights
from lit_generative.metrics.resizing import CleanResize
from tests.inception_weights import pictures, weights_file

PUBLISHED = f"weights-inception-2015-12-05-{PUBLISHED_SHA256[:8]}.pth"


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    return str(weights_file(tmp_path_factory))


@pytest.fixture(scope="module")
def extractor(weights):
    return InceptionV3(weights)


@pytest.fixture(scope="module")
def bfloat16(weights):
    return InceptionV3(weights, dtype="bfloat16")


@pytest.fixture(scope="module")
def images():
    return pictures(6, torch.Generator().manual_seed(1))


def distance(a, b):
    """L2 norm of the difference, relative to how much the features of different images differ."""
    return float((a - b).norm() / (b - b.mean(dim=0)).norm())


@pytest.mark.parametrize("size", [(28, 28), (40, 64)])
def test_features_and_logits_are_those_of_torch_fidelity(extractor, weights, images, size):
    images = nn.functional.interpolate(images.float(), size=size).byte()
    layers = ["2048", "logits_unbiased"]
    reference = FeatureExtractorInceptionV3("inception-v3-compat", layers, feature_extractor_weights_path=weights)
    ours = extractor(images)
    for value, expected in zip(ours, reference(images), strict=True):
        assert value.shape == expected.shape
        assert value.dtype == torch.float32
        assert distance(value, expected) < 1e-4


def test_bfloat16_is_near_and_returned_in_float32(extractor, bfloat16, images):
    assert {p.dtype for p in bfloat16.trunk.parameters()} == {torch.bfloat16}
    for value, expected in zip(bfloat16(images[:4]), extractor(images[:4]), strict=True):
        assert value.dtype == torch.float32
        # Random weights magnify rounding; a trained net does less.
        assert 1e-3 < distance(value, expected) < 0.5


def test_no_batch_norm_is_left_and_nothing_is_trained(extractor):
    assert not any(isinstance(module, nn.BatchNorm2d) for module in extractor.modules())
    assert not any(p.requires_grad for p in extractor.parameters())
    assert not any(module.training for module in extractor.train().modules())


def test_an_images_features_do_not_depend_on_its_batch(extractor, images):
    assert distance(extractor(images[2:4]).embedding, extractor(images[:4]).embedding[2:]) < 1e-4


def test_a_grey_image_is_repeated_to_three_channels(extractor, images):
    grey = images[:2, :1]
    torch.testing.assert_close(extractor(grey), extractor(grey.expand(-1, 3, -1, -1)), rtol=1e-3, atol=1e-4)


def test_precision_settings_do_not_change_features(extractor, images):
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            fast = extractor(images[:2])
    finally:
        torch.set_float32_matmul_precision("highest")
    torch.testing.assert_close(fast, extractor(images[:2]), rtol=0, atol=0)


def test_the_record_says_what_scores_depend_on(extractor, bfloat16, weights):
    with open(weights, "rb") as file:
        digest = hashlib.sha256(file.read()).hexdigest()
    expected = {
        "extractor": "inception",
        "extractor_sha256": digest,
        "published_weights": False,
        "dim": 2048,
        "layer": "pool3 (2048), logits without bias",
        "resize": "tf1",
        "dtype": "float32",
        "grey_images": "repeated to 3 channels",
    }
    assert extractor.record() == expected
    assert bfloat16.record() == expected | {"dtype": "bfloat16"}


def test_another_resize_gives_other_features_and_another_record(extractor, weights, images):
    clean = InceptionV3(weights, resize=CleanResize())
    assert clean.record() == extractor.record() | {"resize": "clean"}
    assert distance(clean(images[:2]).embedding, extractor(images[:2]).embedding) > 1e-2


def test_only_the_published_weights_give_an_fid(weights):
    extractor = InceptionV3(weights)
    assert extractor.frechet_key == "fid"
    assert extractor.frechet_name == "FID with unpublished weights"
    extractor.weights_hash = PUBLISHED_SHA256
    assert extractor.frechet_name == "FID"
    assert extractor.record()["published_weights"] is True


def test_building_one_draws_no_random_numbers(weights):
    before = torch.get_rng_state()
    InceptionV3(weights)
    torch.testing.assert_close(torch.get_rng_state(), before)


def test_the_argument_comes_before_the_variable_and_that_before_the_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    in_hub = tmp_path / "hub" / "checkpoints" / PUBLISHED
    in_hub.parent.mkdir(parents=True)
    given, named = tmp_path / "given.pth", tmp_path / "named.pth"
    for path in (given, named, in_hub):
        path.touch()
    monkeypatch.delenv(WEIGHTS_VARIABLE, raising=False)
    assert find_weights() == in_hub
    monkeypatch.setenv(WEIGHTS_VARIABLE, str(named))
    assert find_weights() == named
    assert find_weights(str(given)) == given


def test_a_home_folder_may_be_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "given.pth").touch()
    assert find_weights("~/given.pth") == tmp_path / "given.pth"


def test_without_weights_the_error_says_which_file_to_put_where(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv(WEIGHTS_VARIABLE, raising=False)
    with pytest.raises(FileNotFoundError, match="the weights are not on this machine") as caught:
        InceptionV3()
    message = str(caught.value)
    assert f"Get {PUBLISHED} from https://" in message
    assert f"sha256 {PUBLISHED_SHA256}" in message
    assert str(tmp_path / "hub" / "checkpoints" / PUBLISHED) in message
    assert not list(tmp_path.iterdir())


def test_a_file_that_was_named_must_exist_whatever_the_hub_has(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    in_hub = tmp_path / "hub" / "checkpoints" / PUBLISHED
    in_hub.parent.mkdir(parents=True)
    in_hub.touch()
    with pytest.raises(FileNotFoundError, match=r"weights names gone\.pth, which is no file"):
        find_weights("gone.pth")
    monkeypatch.setenv(WEIGHTS_VARIABLE, "lost.pth")
    with pytest.raises(FileNotFoundError, match=rf"{WEIGHTS_VARIABLE} names lost\.pth, which is no file"):
        find_weights()


def saved(value, path):
    torch.save(value, path)
    return str(path)


def test_another_networks_weights_are_refused(tmp_path):
    other = saved({"stem.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"\(Conv2d_1a_3x3\.conv\.weight, .*missing, 1 \(stem\.weight\) unknown"):
        InceptionV3(other)


def test_a_layer_of_another_size_is_refused(tmp_path, weights):
    state = torch.load(weights, weights_only=True)
    state["fc.weight"] = torch.zeros(1000, 2048)
    with pytest.raises(ValueError, match=r"0 missing, 0 unknown, 1 \(fc\.weight\) of another shape"):
        InceptionV3(saved(state, tmp_path / "wide.pth"))


def test_counts_of_batches_are_not_needed(tmp_path, extractor, weights, images):
    state = torch.load(weights, weights_only=True)
    state = OrderedDict((key, value) for key, value in state.items() if "num_batches_tracked" not in key)
    older = InceptionV3(saved(state, tmp_path / "older.pth"))
    torch.testing.assert_close(older(images[:2]), extractor(images[:2]))


@pytest.mark.parametrize("value", [[1, 2], {"weights": 3}], ids=["list", "dict"])
def test_a_file_without_tensors_is_refused(tmp_path, value):
    with pytest.raises(ValueError, match=f"must hold a state dict of tensors, got {type(value).__name__}"):
        InceptionV3(saved(value, tmp_path / "plain.pth"))


def test_a_damaged_file_is_refused(tmp_path):
    (tmp_path / "damaged.pth").write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match="cannot be read, or holds code"):
        InceptionV3(str(tmp_path / "damaged.pth"))


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_code_in_a_file_is_not_run(tmp_path):
    sprung = tmp_path / "sprung"
    with open(tmp_path / "trap.pth", "wb") as file:
        pickle.dump({"fc.weight": Trap(str(sprung))}, file, protocol=2)
    with pytest.raises(ValueError, match="cannot be read, or holds code"):
        InceptionV3(str(tmp_path / "trap.pth"))
    assert not sprung.exists()


def test_an_unknown_dtype_is_refused(weights):
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, got 'half'"):
        InceptionV3(weights, dtype="half")


def test_floats_are_refused(extractor):
    with pytest.raises(ValueError, match="InceptionV3: need uint8"):
        extractor(torch.zeros(2, 3, 8, 8))


def test_the_benchmark_of_speed_writes_its_table(tmp_path):
    inception_speed.main(["--quick", "--out", str(tmp_path / "speed.md")])
    rows = [line.split("|")[1:-1] for line in (tmp_path / "speed.md").read_text().splitlines() if line.startswith("| ")]
    assert [row[0].strip() for row in rows[2:]] == ["torch-fidelity, batches of 64", "ours, float32", "ours, bfloat16"]
    assert all(float(row[1]) > 0 for row in rows[2:])
