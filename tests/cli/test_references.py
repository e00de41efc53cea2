import numpy as np
import pytest
import torch

from lit_generative.cli.image_sets import FolderImages, NpzImages
from lit_generative.cli.references import image_set, load_reference, save_statistics
from lit_generative.metrics.evaluation import collect_features
from lit_generative.metrics.frechet import Frechet
from lit_generative.metrics.inception_score import InceptionScore
from lit_generative.metrics.kernel import Kernel
from lit_generative.metrics.sources import DataModuleImages
from tests.metrics.tiny_features import TinyFeatures


@pytest.fixture
def npz(tmp_path, monkeypatch):
    monkeypatch.setenv("LITGEN_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "a.npz"
    np.savez(path, images=np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1), dtype=np.uint8))
    return str(path)


def load(path, extractor, measures):
    return load_reference(
        str(path), "train", extractor, measures, lambda source, _: collect_features(source, extractor, measures, 8)
    )


def test_the_kind_of_set_follows_from_the_path(tmp_path, npz):
    assert isinstance(image_set(npz), NpzImages)
    from PIL import Image

    (tmp_path / "folder").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "folder" / "a.png")
    assert isinstance(image_set(str(tmp_path / "folder")), FolderImages)
    config = tmp_path / "a.yaml"
    config.write_text("class_path: lit_generative.data.digits.Digits")  # a data module alone is a config, too
    source = image_set(str(config), "val")
    assert isinstance(source, DataModuleImages)
    assert source.count == 162


def test_a_config_that_cannot_be_built_is_named_with_the_reason(tmp_path):
    config = tmp_path / "a.yaml"
    config.write_text("data: {class_path: lit_generative.data.digits.Digits, init_args: {image_sizes: 3}}")
    with pytest.raises(ValueError, match=r"a\.yaml: its data cannot be built: .*image_sizes"):
        image_set(str(config))


def test_statistics_come_back_whole(tmp_path, npz):
    extractor, measures = TinyFeatures(), [Frechet(), Kernel(), InceptionScore()]
    data, record = load(npz, extractor, measures)
    save_statistics(tmp_path / "s.safetensors", data, extractor, record)
    again, read = load(tmp_path / "s.safetensors", extractor, measures)
    assert read == record
    torch.testing.assert_close(again.moments.cov, data.moments.cov, rtol=0, atol=0)
    torch.testing.assert_close(again.embedding, data.embedding, rtol=0, atol=0)
    with pytest.raises(ValueError, match="another extractor: extractor_sha256"):
        load(tmp_path / "s.safetensors", TinyFeatures(seed=1), measures)


def test_a_file_of_the_cache_is_no_statistics(tmp_path, npz):
    load(npz, TinyFeatures(), [Frechet()])
    (cached,) = (tmp_path / "cache").iterdir()
    with pytest.raises(ValueError, match="does not say what it holds"):
        load(cached, TinyFeatures(), [Frechet()])


def test_the_inception_score_needs_nothing_of_the_reference(tmp_path):
    np.savez(tmp_path / "s.npz", mu=np.zeros(8), sigma=np.eye(8))
    data, record = load(tmp_path / "s.npz", TinyFeatures(), [Frechet(), InceptionScore()])
    assert data.moments.cov.dtype == torch.float64
    assert record["statistics"] == "s.npz"
    with pytest.raises(ValueError, match="does not hold what kid, kid_se need"):
        load(tmp_path / "s.npz", TinyFeatures(), [Kernel()])
